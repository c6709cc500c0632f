"""Codes and units that jump between splits or sites warn; the same law on both sides does not."""

import numpy as np
import pytest

from mmjepa.audit.jumps import jumps

PEOPLE = 200
SPLITS = {"train": list(range(100)), "held_out": list(range(100, 200))}


def cohort(events_of, store_of, unit: float = 1.0, coded: float = 0.5):
    draw = np.random.default_rng(3)
    rows = []
    for s in range(PEOPLE):
        abroad = s >= 100
        rows += [
            (s, h, f"LAB//{h}", float(draw.normal(100, 10)) * (unit if abroad and h == 2 else 1)) for h in range(9)
        ]
        rows += [(s, 20, f"DX//{k}") for k in range(9) if draw.random() < (coded if abroad and k == 4 else 0.5)]
    events = events_of(rows, PEOPLE)
    store = store_of(events, SPLITS, {s: f"SITE//{'b' if s % 2 else 'a'}" for s in range(PEOPLE)})
    return {finding.check: finding for finding in jumps(events, store)}


@pytest.mark.parametrize(("change", "what"), [({"unit": 18.0}, "LAB//2 median"), ({"coded": 0.05}, "DX//4")])
def test_a_unit_or_a_coding_that_changes_between_splits_warns_and_is_named(events_of, store_of, change, what):
    found = cohort(events_of, store_of, **change)
    assert found["15"].verdict == "warn"
    assert what in found["15"].sentence
    assert found["15b"].verdict == "pass"


def test_one_law_everywhere_does_not_warn(events_of, store_of):
    assert {finding.verdict for finding in cohort(events_of, store_of).values()} == {"pass"}


def test_a_difference_that_is_sure_but_small_does_not_warn(events_of, store_of):
    assert cohort(events_of, store_of, unit=1.1)["15"].verdict == "pass"


def test_without_two_groups_it_says_so(events_of, store_of):
    events = events_of([(s, 1.0, "LAB//0", 1.0) for s in range(5)], 5)
    assert [f.verdict for f in jumps(events, store_of(events, {"train": [0]}))] == ["not-applicable"] * 2
