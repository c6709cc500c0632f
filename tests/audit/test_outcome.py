"""A label's window is read off its rows, and subjects left out because of the outcome are seen."""

import numpy as np
import pytest

from mmjepa.audit.labels import Task
from mmjepa.audit.outcome import left_out_by_outcome, outcome_of, window_reads_the_past
from mmjepa.audit.scan import Rows

HOUR_US, N, ASK = 3_600_000_000, 60, 100


def rows_of(subject: list[int], hour: list[float], y: list[bool]) -> Rows:
    return Rows(np.array(subject), (np.array(hour) * HOUR_US).astype(np.int64), np.array(y, float))


def task_of(rows: Rows) -> Task:
    return Task("t", rows.subject, rows.t_us, rows.y, rows.subject, np.arange(len(rows.y)))


def histories(sick_hour, *, people: int = N) -> list[tuple]:
    """Noise for all; a scan at ASK; every third subject is sick at ``sick_hour(subject)``."""
    draw = np.random.default_rng(0)
    rows = [(s, float(h), f"LAB//{draw.integers(9)}", 1.0) for s in range(people) for h in draw.uniform(1, 99, 8)]
    rows += [(s, ASK, "CT//CHEST") for s in range(people)]
    return rows + [(s, sick_hour(s), "DIAGNOSIS//SICK") for s in range(0, people, 3)]


def verdicts(events, rows: Rows) -> dict[str, tuple[str, int]]:
    return {f.check: (f.verdict, f.count) for f in window_reads_the_past(outcome_of(events, rows))}


SICK = [s % 3 == 0 for s in range(N)]
ONE_EACH = rows_of(list(range(N)), [ASK] * N, SICK)


def test_a_window_after_the_prediction_time_passes_and_names_its_code(events_of):
    events = events_of(histories(lambda s: ASK + 10 + s), N)
    assert outcome_of(events, ONE_EACH).code == "DIAGNOSIS//SICK"
    assert verdicts(events, ONE_EACH) == {"4d": ("pass", 0), "4e": ("pass", 0)}


@pytest.mark.parametrize("at", [ASK, ASK - 5])
def test_a_label_whose_event_lies_at_or_before_its_time_fails_with_its_count(events_of, at):
    events = events_of(histories(lambda s: at if s < 30 else ASK + 10), N)
    assert verdicts(events, ONE_EACH)["4d"] == ("fail", 10)


def test_an_event_that_comes_back_may_lie_before_too(events_of):
    """Readmission: everyone was admitted before; the label is another admission within 50 h."""
    past = [(s, 50.0 + s / 10, "ADMIT") for s in range(N)]
    later = [(s, ASK + (30 if s % 3 == 0 else 400), "ADMIT") for s in range(N)]
    events = events_of(past + later, N)
    assert outcome_of(events, ONE_EACH).code == "ADMIT"
    assert verdicts(events, ONE_EACH)["4d"] == ("pass", 0)


def test_one_label_for_all_times_of_a_subject_fails_and_labels_that_change_do_not(events_of):
    events = events_of(histories(lambda s: ASK + 10), N)
    people = [*range(N), *range(N)]
    hours = [ASK] * N + [ASK + 20] * N
    assert verdicts(events, rows_of(people, hours, SICK + SICK))["4e"] == ("fail", 20)
    assert verdicts(events, rows_of(people, hours, SICK + [False] * N)) == {"4d": ("pass", 0), "4e": ("pass", 0)}


def test_a_label_that_no_code_tells_says_that_it_cannot_be_checked(events_of):
    draw = np.random.default_rng(1)
    events = events_of(histories(lambda s: ASK + 10), N)
    assert outcome_of(events, rows_of(list(range(N)), [ASK] * N, list(draw.random(N) < 0.4))) is None
    few = rows_of([0, 1, 2, 3], [ASK] * 4, SICK[:4])
    assert outcome_of(events, few) is None


def test_subjects_left_out_for_want_of_the_outcome_fail_and_those_left_out_at_random_do_not(events_of):
    events = events_of(histories(lambda s: ASK + 10), N)
    for keep, verdict in (
        ([s for s in range(N) if SICK[s] or s % 2], "fail"),
        ([s for s in range(N) if s % 4], "pass"),
        (list(range(N)), "pass"),
    ):
        rows = rows_of(keep, [ASK] * len(keep), [SICK[s] for s in keep])
        found = left_out_by_outcome(events, task_of(rows), outcome_of(events, rows))
        assert found.verdict == verdict, found.sentence
        assert found.count == (N - len(keep) if verdict == "fail" else 0)


def test_subjects_that_never_came_to_be_asked_are_not_left_out(events_of):
    """Another hundred have no scan and no outcome: nobody would have asked of them."""
    others = [(s, 5.0, "LAB//0", 1.0) for s in range(N, N + 100)]
    events = events_of(histories(lambda s: ASK + 10) + others, N + 100)
    assert left_out_by_outcome(events, task_of(ONE_EACH), outcome_of(events, ONE_EACH)).count == 0


def test_mostly_but_not_only_healthy_subjects_left_out_warn(events_of):
    events = events_of(histories(lambda s: ASK + 10), N)
    keep = [s for s in range(N) if (SICK[s] and s) or s % 10 == 1]
    rows = rows_of(keep, [ASK] * len(keep), [SICK[s] for s in keep])
    outcome = outcome_of(events, rows, ["DIAGNOSIS//SICK"])
    assert left_out_by_outcome(events, task_of(rows), outcome).verdict == "warn"


def test_labels_that_differ_within_a_subject_are_not_one_label_for_all_times(events_of):
    events = events_of(histories(lambda s: ASK + 10), N)
    people, hours = [*range(N)] * 3, [5] * N + [ASK] * N + [ASK + 20] * N
    assert verdicts(events, rows_of(people, hours, [False] * N + SICK + SICK)) == {
        "4d": ("fail", 20),
        "4e": ("pass", 0),
    }


HALF = [s for s in range(N) if SICK[s] or s % 2]  # twenty healthy subjects are left out


def left_out(events, hour: float):
    rows = rows_of(HALF, [hour] * len(HALF), [SICK[s] for s in HALF])
    return left_out_by_outcome(events, task_of(rows), outcome_of(events, rows))


def test_an_honest_reason_known_at_the_time_is_no_filter_and_one_that_labelled_subjects_share_is(events_of):
    gone = [s for s in range(N) if s not in HALF]
    healthy_and_sick = histories(lambda s: ASK + 10)
    honest = events_of(healthy_and_sick + [(s, ASK - 1, "LEFT_UNIT") for s in gone], N)
    shared = events_of(healthy_and_sick + [(s, ASK - 1, "LEFT_UNIT") for s in [*gone, *range(0, N, 3)]], N)
    assert [left_out(events, ASK).verdict for events in (honest, shared)] == ["pass", "fail"]


def test_who_is_dead_or_out_of_sight_by_the_time_is_not_left_out(events_of):
    base = histories(lambda s: ASK + 30)
    seen = events_of(base + [(s, ASK + 50, "LAB//0", 1.0) for s in range(N)], N)
    unseen = events_of(base + [(s, ASK + 50, "LAB//0", 1.0) for s in HALF], N)
    dead = [(s, ASK + 5, "MEDS_DEATH") for s in range(N) if s not in HALF]
    died = events_of(base + [(s, ASK + 50, "LAB//0", 1.0) for s in range(N)] + dead, N)
    assert [left_out(events, ASK + 20).verdict for events in (seen, unseen, died)] == ["fail", "pass", "pass"]


@pytest.mark.parametrize(("flow_declared", "asks"), [(False, True), (True, False)])
def test_a_filter_that_cannot_be_seen_is_said_to_be_not_judged_and_only_what_is_missing_is_asked_for(
    events_of, flow_declared, asks
):
    """Half of the healthy are dropped, at times that no event marks: nothing tells when they would have been asked."""
    events = events_of(histories(lambda s: ASK + 30), N)
    rows = rows_of(HALF, [20 + s / 2 for s in HALF], [SICK[s] for s in HALF])
    for outcome in (outcome_of(events, rows), None):
        found = left_out_by_outcome(events, task_of(rows), outcome, flow_declared)
        assert found.verdict == "not-applicable"
        assert found.sentence.startswith("not judged")
        assert ("declare its flow" in found.sentence) == asks
    for window_declared in (False, True):
        early, _ = window_reads_the_past(None, window_declared=window_declared)
        assert ("declare it" in early.sentence) != window_declared
