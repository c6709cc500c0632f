"""What a scan over codes sees: ties, values so far, and codes that are nearly one class's own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import fisher_exact

from mmjepa.audit.labels import codes_of_one_class, single_features
from mmjepa.audit.scan import Rows, fisher, grouped_auroc, scan

HOUR_US, N, ASK = 3_600_000_000, 200, 100
Y = np.arange(N) % 2 == 0
ROWS = Rows(np.arange(N), np.full(N, ASK * HOUR_US), Y.astype(float))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.1, 1.0, 1 / 3, 59_999_999.0, 1e-9]))
def test_a_constant_column_tells_nothing_however_many_rows_a_subject_has(seed, constant):
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 60, size=40)
    subject = np.repeat(np.arange(40), sizes)
    rows = Rows(subject, np.zeros(len(subject), np.int64), (subject % 2).astype(float))
    auroc, p = grouped_auroc(np.full((len(subject), 1), constant), rows)
    assert (auroc[0], p[0]) == (0.5, 1.0)


def test_equal_shares_of_groups_of_other_sizes_tie():
    subject = np.repeat([0, 1, 2], [3, 6, 9])
    present = np.concatenate([np.arange(n) < n // 3 for n in (3, 6, 9)])[:, None]
    rows = Rows(subject, np.zeros(18, np.int64), (subject == 1).astype(float))
    assert grouped_auroc(present, rows)[0][0] == 0.5


def test_small_differences_are_no_ties():
    column = 1e9 + np.arange(N, dtype=float)[:, None]
    assert grouped_auroc(column, Rows(ROWS.subject, ROWS.t_us, (np.arange(N) >= 100) * 1.0))[0][0] == 1.0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 20), st.integers(0, 30))
def test_fishers_test_is_twice_the_smaller_tail(a, b):
    table = [[a, 20 - a], [b, 30 - b]]
    tails = [fisher_exact(table, alternative=side).pvalue for side in ("less", "greater")]
    assert fisher(np.array([a]), np.array([b]), 20, 30)[0] == pytest.approx(min(1, 2 * min(tails)))


def with_code(events_of, positive: float, negative: float):
    """Noise for all; a code in a share of either class."""
    draw = np.random.default_rng(0)
    noise = [(s, float(h), f"LAB//{draw.integers(9)}", 1.0) for s in range(N) for h in draw.uniform(1, 99, 8)]
    ranks = np.arange(N) // 2 / (N // 2)  # of a subject within its class, in [0, 1)
    having = np.flatnonzero(ranks < np.where(Y, positive, negative))
    return events_of([*noise, *((int(s), 50.0, "ORDER//X") for s in having)], N)


@pytest.mark.parametrize(
    ("positive", "negative", "verdict"),
    [
        *[(0.85, 0.01, "warn"), (0.5, 0, "warn"), (0.7, 0, "warn"), (0, 0.5, "warn"), (0.15, 1, "warn")],
        *[(1, 0.6, "pass"), (0.4, 0.1, "pass"), (0.1, 0, "pass"), (0.5, 0.5, "pass"), (0.8, 0.2, "pass")],
    ],
)
def test_a_code_that_hardly_anyone_of_one_class_has_warns(events_of, positive, negative, verdict):
    found = codes_of_one_class(scan(with_code(events_of, positive, negative), ROWS), ROWS)
    assert found.verdict == verdict, found.sentence
    assert ("ORDER//X" in found.sentence) == (verdict == "warn")


@pytest.mark.parametrize("kind", ["first", "low", "high", "count"])
def test_a_leak_in_the_first_lowest_or_highest_value_or_in_the_count_fails(events_of, kind):
    """Four values each, of which only one place, or only their number, is tied to the label."""
    draw, rows = np.random.default_rng(1), []
    for s in range(N):
        values = draw.normal(100, 5, 4)
        shift = {"first": -40, "low": -60, "high": 60, "count": 0}[kind] * Y[s]
        values[0 if kind == "first" else draw.integers(3)] += shift
        if kind == "first" and not Y[s]:
            values[draw.integers(1, 3)] -= 40
        hours = range(4 if kind != "count" or Y[s] else 3)
        rows += [(s, float(10 + h), "LAB//X", float(values[h])) for h in hours]
    found = scan(events_of(rows, N), ROWS)
    told = set(found.loc[(found["auroc"] - 0.5).abs() > 0.45, "kind"])
    assert told == {kind}
    assert single_features(found, ROWS).verdict == "fail"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_values_so_far_equal_those_of_each_subjects_past(events_of, seed):
    draw = np.random.default_rng(seed)
    table = [(int(draw.integers(30)), float(h), "LAB//X", float(draw.integers(5))) for h in draw.permutation(200)]
    asked = Rows(np.arange(30), draw.integers(200, size=30) * HOUR_US, (np.arange(30) % 2).astype(float))
    found = scan(events_of(table, 30), asked).set_index("kind")["auroc"]
    seen = {
        s: [v for who, h, _, v in sorted(table, key=lambda row: row[1]) if who == s and h * HOUR_US <= t]
        for s, t in enumerate(asked.t_us)
    }
    some = np.array([s for s in seen if seen[s]])
    rows = Rows(some, asked.t_us[some], asked.y[some])
    if min(rows.class_sizes()) >= 10:
        ways = {"first": lambda v: v[0], "value": lambda v: v[-1], "low": min, "high": max, "count": len}
        for kind, way in ways.items():
            column = np.array([[float(way(seen[s]))] for s in some])
            assert found[kind] == pytest.approx(grouped_auroc(column, rows)[0][0])
