"""What a task declares of itself is judged, and checked against the record."""

import json

import numpy as np
import pytest

from mmjepa.audit.declared import Declaration, Step, declared_flow, declared_window, other_stays, read_declaration
from mmjepa.audit.outcome import outcome_of
from mmjepa.audit.scan import Rows
from mmjepa.refusal import Refusal

HOUR_US = 3_600_000_000


@pytest.mark.parametrize(
    ("window", "includes_start", "verdict"),
    [((0, 30), False, "pass"), ((1, 30), True, "pass"), ((0, 30), True, "fail"), ((-1, 30), False, "fail")],
)
def test_a_declared_window_that_opens_at_or_before_the_prediction_time_fails(window, includes_start, verdict):
    (found,) = declared_window(Declaration(window_days=window, includes_start=includes_start))
    assert found.verdict == verdict


def test_a_criterion_that_reads_the_future_fails_and_a_step_that_moves_the_share_warns():
    flow = (
        Step(step="all", subjects=1000, positives=100),
        Step(step="adults", subjects=900, positives=91),
        Step(step="followed up or sick", subjects=400, positives=91, reads_until_days=365),
    )
    found = {f.check: f for f in declared_flow(Declaration(flow=flow))}
    assert (found["11b"].verdict, found["11b"].count) == ("fail", 1)
    assert (found["11c"].verdict, found["11c"].count) == ("warn", 1)
    assert "followed up or sick: 91 of 400" in found["11b"].sentence
    assert [f.verdict for f in declared_flow(Declaration(flow=flow[:2]))] == ["pass", "pass"]


def test_nothing_declared_finds_nothing(tmp_path):
    declared = read_declaration(tmp_path)
    assert declared_window(declared) == declared_flow(declared) == []


@pytest.mark.parametrize(
    "bad",
    [
        {"windows": [0, 1]},
        {"window_days": [1, 0]},
        {"flow": [{"step": "all", "subjects": 1, "positives": 2}]},
        {"flow": [{"step": "a", "subjects": 1, "positives": 1}, {"step": "b", "subjects": 2, "positives": 1}]},
    ],
)
def test_a_declaration_that_makes_no_sense_is_refused(tmp_path, bad):
    (tmp_path / "task.json").write_text(json.dumps(bad))
    with pytest.raises(Refusal, match="CONFIG_"):
        read_declaration(tmp_path)


def test_an_outcome_in_another_stay_fails_where_the_task_is_of_one(events_of):
    people = 40
    rows = [(s, h, c) for s in range(people) for h, c in ((0, "ADMISSION"), (50, "DISCHARGE"))]
    rows += [(s, 900, "ADMISSION") for s in range(people)] + [(s, 990, "DISCHARGE") for s in range(people)]
    rows += [(s, 40 if s < 14 else 950, "SEPSIS") for s in range(0, people, 2)]
    events = events_of(rows, people)
    asked = Rows(np.arange(people), np.full(people, 20 * HOUR_US), (np.arange(people) % 2 == 0).astype(float))
    outcome = outcome_of(events, asked)
    (found,) = other_stays(events, Declaration(within_stay=True), outcome)
    assert (found.verdict, found.count) == ("fail", 13)
    assert other_stays(events, Declaration(), outcome) == []
