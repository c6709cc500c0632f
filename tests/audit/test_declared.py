"""What a task declares of itself is judged, and checked against the record."""

import json

import numpy as np
import pytest

from mmjepa.audit.declared import (
    Declaration,
    Step,
    declared_flow,
    declared_window,
    flow_is_of_these_labels,
    other_stays,
    outcome_codes_known,
    read_declaration,
)
from mmjepa.audit.labels import Task
from mmjepa.audit.outcome import outcome_of, window_reads_the_past
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


def task_of(people: int, positives: int) -> Task:
    """Two rows a subject."""
    subject = np.repeat(np.arange(people), 2)
    y = (subject < positives).astype(float)
    return Task("t", subject, np.arange(2 * people), y, subject, np.arange(2 * people))


@pytest.mark.parametrize(("people", "positives", "verdict"), [(85, 20, "pass"), (44, 20, "fail"), (85, 19, "fail")])
def test_a_flow_that_ends_with_other_subjects_than_the_labels_fails(tmp_path, people, positives, verdict):
    declared = Declaration(
        flow=(Step(step="all", subjects=106, positives=20), Step(step="in", subjects=85, positives=20))
    )
    (found,) = flow_is_of_these_labels(declared, task_of(people, positives), tmp_path)
    assert found.verdict == verdict, found.sentence


def test_subjects_lost_to_censoring_are_counted_where_the_steps_lie_beside(tmp_path):
    declared = Declaration(flow=(Step(step="in", subjects=85, positives=20),))
    steps = [{"rows": 2 * n, "subjects": n, "positives": p} for n, p in ((85, 20), (70, 18))]
    (tmp_path / "flow.json").write_text(json.dumps(steps))
    verdicts = [flow_is_of_these_labels(declared, task_of(*n), tmp_path)[0].verdict for n in ((70, 18), (85, 20))]
    assert verdicts == ["pass", "fail"]
    (tmp_path / "flow.json").write_text(json.dumps([steps[-1] | {"rows": 139}]))
    assert flow_is_of_these_labels(declared, task_of(70, 18), tmp_path)[0].count == 1
    (tmp_path / "flow.json").write_text("[]")
    with pytest.raises(Refusal, match="FILE_BROKEN"):
        flow_is_of_these_labels(declared, task_of(70, 18), tmp_path)


@pytest.mark.parametrize(
    ("says", "verdict"),
    [
        ({"outcome_codes": ("NOPE",)}, "fail"),
        ({"outcome_codes": ("NOPE", "SEPSIS")}, "warn"),
        ({"outcome_codes": ("SEPSIS",)}, "pass"),
        ({"outcome_codes": ("NOPE",), "outcome_given": True}, None),
        ({}, None),
    ],
)
def test_declared_outcome_codes_that_the_record_does_not_know_are_named(events_of, says, verdict):
    found = outcome_codes_known(events_of([(0, 1, "SEPSIS")], 1), Declaration(**says))
    assert [finding.verdict for finding in found] == ([] if verdict is None else [verdict])
    assert all("NOPE" in finding.sentence for finding in found if verdict != "pass")


@pytest.mark.parametrize(("hour", "verdict", "count"), [(30, "pass", 0), (10, "fail", 20)])
def test_declared_codes_that_do_not_tell_the_label_alone_are_still_looked_for_before_the_time(
    events_of, hour, verdict, count
):
    """Half of the false labels have the code after the time too: a value decides."""
    people = 60
    rows = [(s, hour if s < 20 else 30, "LAB//CREATININE", 1.0) for s in range(40)] + [
        (s, 50, "LAB//0") for s in range(60)
    ]
    asked = Rows(np.arange(people), np.full(people, 20 * HOUR_US), (np.arange(people) < 20).astype(float))
    events = events_of(rows, people)
    assert outcome_of(events, asked) is None
    early, repeated = window_reads_the_past(outcome_of(events, asked, ["LAB//CREATININE"]), ["LAB//CREATININE"])
    assert (early.verdict, early.count, repeated.verdict) == (verdict, count, "not-applicable")


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
