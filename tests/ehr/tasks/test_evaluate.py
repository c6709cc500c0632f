"""Labels of a task are those of a slow reading, row by row, and of ACES; no one lost becomes a negative."""

import itertools
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjepa.ehr.store import EventStore
from mmjepa.ehr.tasks.evaluate import evaluate
from mmjepa.ehr.tasks.language import Bound, Extras, FollowUp, Predicate, Task, Window, read_task
from mmjepa.refusal import Refusal

HOUR_US = 3_600_000_000
DATASETS = Path(__file__).parents[3] / "datasets"
MEDS_DEV_ICU = """
trigger: icu_admission
predicates:
  icu_discharge_or_death: {expr: "or(icu_discharge, death)"}
windows:
  input: {start: null, end: trigger + 24h, start_inclusive: true, end_inclusive: true, index_timestamp: end}
  gap:
    {start: trigger, end: start + 48h, start_inclusive: false, end_inclusive: true,
     has: {icu_admission: "(None, 0)", icu_discharge_or_death: "(None, 0)"}}
  target:
    {start: gap.end, end: start -> icu_discharge_or_death, start_inclusive: false, end_inclusive: true, label: death}
"""
READMISSION = """
trigger: hospital_discharge
windows:
  input: {start: null, end: trigger, start_inclusive: true, end_inclusive: true, index_timestamp: end}
  target: {start: input.end, end: start + 30d, start_inclusive: false, end_inclusive: true, label: hospital_admission}
"""


def rows(found):
    hours = found.frame["prediction_time"].to_numpy().astype(np.int64) / HOUR_US
    return list(
        zip(found.frame["subject_id"].tolist(), hours.tolist(), found.frame["boolean_value"].tolist(), strict=True)
    )


def slowly(events, task):
    """Every trigger of every subject by hand; (subject, prediction hour, label)."""
    found = []
    for subject in sorted({row[0] for row in events}):
        mine = sorted((row[1], row[2]) for row in events if row[0] == subject)
        for trigger in sorted({hour for hour, code in mine if code == "A"}):
            ends, row, keep = {"trigger": trigger}, {}, True
            for window in task.windows:
                for side in ("end", "start") if window.start.reference == "end" else ("start", "end"):
                    bound = getattr(window, side)
                    key = (
                        bound.reference
                        if bound.reference not in ("start", "end")
                        else f"{window.name}.{bound.reference}"
                    )
                    at = ends[key] + bound.offset_us / HOUR_US if key else {"start": -1e9, "end": 1e9}[side]
                    if bound.arrow == "->":
                        later = [
                            h for h, c in mine if c == bound.predicate and (h >= at if window.end_inclusive else h > at)
                        ]
                        at = min(later, default=None)
                    elif bound.arrow == "<-":
                        early = [
                            h
                            for h, c in mine
                            if c == bound.predicate and (h <= at if window.start_inclusive else h < at)
                        ]
                        at = max(early, default=None)
                    if at is None:
                        keep, at = False, 0.0
                    ends[f"{window.name}.{side}"] = at
                low, high = ends[f"{window.name}.start"], ends[f"{window.name}.end"]
                inside = [
                    c
                    for h, c in mine
                    if (h >= low if window.start_inclusive else h > low)
                    and (h <= high if window.end_inclusive else h < high)
                ]
                for name, (least, most) in window.has.items():
                    keep &= (least or 0) <= inside.count(name) <= (1e9 if most is None else most)
                if window.label:
                    row["label"] = window.label in inside
                if window.index_timestamp:
                    row["t"] = ends[f"{window.name}.{window.index_timestamp}"]
            if keep:
                found.append((subject, row["t"], row["label"]))
    return sorted(found)


NAMES = st.sampled_from("ABC")
EVENTS = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 30), NAMES), max_size=30)
BOOLS = st.tuples(st.booleans(), st.booleans())


@st.composite
def tasks(draw):
    far = draw(st.sampled_from([Bound("start", 5 * HOUR_US), Bound("start", 0, "->", "B"), Bound(None)]))
    back = draw(st.sampled_from([Bound("end", -4 * HOUR_US), Bound("end", 0, "<-", "C"), Bound(None)]))
    anchor = Bound("trigger", draw(st.integers(0, 3)) * HOUR_US)
    limits = draw(st.dictionaries(NAMES, st.sampled_from([(None, 0), (1, None), (1, 2)]), max_size=1))
    windows = (
        Window("past", back, anchor, *draw(BOOLS), limits, None, "end"),
        Window("future", Bound("past.end"), far, *draw(BOOLS), {}, draw(NAMES), None),
    )
    return Task("t", "A", windows, {c: Predicate(codes=(c,)) for c in "ABC"}, Extras(), FollowUp())


@settings(max_examples=150, deadline=None)
@given(events=EVENTS, task=tasks())
def test_labels_equal_a_slow_reading(make_store, events, task):
    if not events:
        return
    found = evaluate(make_store(events, more_codes="ABC"), task)
    assert rows(found) == slowly(events, task)


@pytest.mark.parametrize(("inclusive", "label"), [((False, True), False), ((False, False), True)])
def test_a_far_end_that_is_included_may_lie_at_the_near_end_as_in_aces(
    make_store, make_task, within, window, inclusive, label
):
    store = make_store([(1, 0, "IN"), (1, 0, "OUT"), (1, 2, "EVENT"), (1, 4, "OUT")])
    ahead = window("input.end", "start -> out", inclusive, label="event")
    assert rows(evaluate(store, make_task(within() | {"target": ahead}))) == [(1, 0, label)]


def test_counts_of_values_and_of_events_at_once(make_store, make_task, within):
    limits = {"high": {"code": "LAB", "value_min": 5, "value_min_inclusive": True}, "both": {"expr": "and(high, in)"}}
    events = [(1, 0, "IN"), (1, 5, "EVENT"), (2, 0, "IN"), (2, 0, "LAB", 5.0), (3, 0, "IN"), (3, 0, "LAB", 4.9)]
    store = make_store(events, more_codes=["OUT", "MEDS_DEATH"])
    past = {"start": None, "end": "trigger", "start_inclusive": True, "end_inclusive": True}
    assert rows(evaluate(store, make_task(within(e={**past, "has": {"both": "(1, None)"}}), more=limits))) == [
        (2, 0, False)
    ]
    anything = within(e={**past, "has": {"_ANY_EVENT": "(None, 1)"}})
    assert [row[0] for row in rows(evaluate(store, make_task(anything)))] == [1, 2, 3]  # moments, not rows


def test_a_predicate_that_fits_no_code_is_refused_instead_of_a_label_that_is_never_true(make_store, make_task, within):
    with pytest.raises(Refusal, match="TASK_PREDICATE"):
        evaluate(make_store([(1, 0, "IN")]), make_task(within()))


def test_given_events_count_as_if_they_were_in_the_records(make_store, make_task, within):
    store = make_store([(7, 0, "IN"), (9, 0, "IN")])
    given = pd.DataFrame({"subject_id": [9], "time": pd.to_datetime(["1970-01-01 03:00"]), "code": ["EVENT"]})
    assert rows(evaluate(store, make_task(within()), given)) == [(7, 0, False), (9, 0, True)]
    with pytest.raises(Refusal, match="SUBJECT_UNKNOWN"):
        evaluate(store, make_task(within()), given.assign(subject_id=8))


def test_who_is_lost_before_the_end_of_the_window_is_left_out_and_counted(make_store, make_task, within):
    events = [(1, 0, "IN"), (1, 30, "OUT"), (2, 0, "IN"), (2, 20, "OUT"), (3, 0, "IN"), (3, 5, "EVENT")]
    events += [(4, 0, "IN"), (4, 9, "MEDS_DEATH"), (5, 0, "IN"), (5, 24, "OUT")]
    found = evaluate(make_store(events), make_task(within(), extras={"follow_up": True}))
    assert rows(found) == [(1, 0, False), (3, 0, True), (4, 0, False), (5, 0, False)]  # the dead are not lost
    assert [(step.kind, step.rows, step.positives) for step in found.flow] == [("cohort", 5, 1), ("censored", 4, 1)]
    assert len(evaluate(make_store(events), make_task(within())).frame) == 5  # plain ACES: subject 2 is a negative


def test_deaths_are_known_for_as_long_as_declared(make_store, make_task, within, window):
    windows = within() | {"target": window("input.end", "start + 100d", label="death")}
    store = make_store([(1, 0, "IN"), (1, 40 * 24, "OUT"), (2, 0, "IN"), (2, 39 * 24, "OUT"), (3, 1, "MEDS_DEATH")])
    long = {"known_after_last_event": ["MEDS_DEATH"], "days": 60}
    found = evaluate(store, make_task(windows, extras={"follow_up": True}, given=long))
    assert rows(found) == [(1, 0, False)]


def test_a_death_at_midnight_counts_at_the_end_of_its_day(make_store, make_task, within, window):
    windows = within() | {"target": window("input.end", "start + 48h", label="death")}
    store = make_store([(1, 30, "IN"), (1, 24, "MEDS_DEATH"), (2, 10, "IN"), (2, 48, "MEDS_DEATH"), (3, 0, "IN")])
    stamped = evaluate(store, make_task(windows))
    moved = evaluate(store, make_task(windows, extras={"midnight_deaths": "end_of_day"}))
    assert rows(stamped) == [(1, 30, False), (2, 10, True), (3, 0, False)]
    assert rows(moved) == [(1, 30, True), (2, 10, False), (3, 0, False)]


def test_a_window_under_a_day_leaves_out_deaths_of_an_unknown_hour(make_store, make_task, within, window):
    windows = within() | {"target": window("input.end", "start + 23h", label="death")}
    events = [
        (1, 30, "IN"),
        (1, 24, "MEDS_DEATH"),
        (2, 10, "IN"),
        (2, 240, "MEDS_DEATH"),
        (3, 0, "IN"),
        (3, 5, "MEDS_DEATH"),
    ]
    found = evaluate(make_store(events), make_task(windows, extras={"midnight_deaths": "end_of_day"}))
    assert rows(found) == [(2, 10, False), (3, 0, True)]
    assert (found.flow[-1].kind, found.flow[-1].rows) == ("censored", 2)


def test_absence_is_the_label_of_a_stay_that_has_not_ended(make_store, make_task, within, window):
    windows = within() | {"target": window("input.end", "start + 10h", label="out")}
    store = make_store([(1, 0, "IN"), (1, 10, "OUT"), (2, 0, "IN"), (2, 11, "OUT"), (3, 0, "IN")])
    found = evaluate(store, make_task(windows, extras={"true_when": "absent", "follow_up": True}))
    assert rows(found) == [(1, 0, False), (2, 0, True)]  # subject 3 was lost in the stay


def test_a_criterion_that_reads_the_future_says_how_far(make_store, make_task, within, window):
    gap = window("trigger", "start + 12h", has={"out": "(None, 0)"})
    store = make_store([(1, 0, "IN"), (1, 10, "OUT"), (2, 0, "IN"), (2, 20, "EVENT")])
    found = evaluate(store, make_task(within(gap=gap)))
    assert [(step.rows, step.reads_until_days) for step in found.flow] == [(2, 0.0), (1, 0.5)]


def test_two_labels_of_one_prediction_time_are_refused(make_store, make_task, window):
    windows = {
        "t": window("trigger", "start -> out", index_timestamp="end"),
        "y": window("t.end", "trigger + 10h", label="event"),
    }
    events = [(1, 0, "IN"), (1, 5, "IN"), (1, 9, "OUT"), (1, 12, "EVENT")]
    with pytest.raises(Refusal, match="TASK_AMBIGUOUS"):
        evaluate(make_store(events), make_task(windows))


def test_triggers_of_one_prediction_time_are_one_row_and_the_flow_says_so(make_store, make_task, window):
    windows = {
        "t": window("trigger", "start -> out", index_timestamp="end"),
        "y": window("t.end", "start + 3h", label="event"),
    }
    events = [(1, 0, "IN"), (1, 5, "IN"), (1, 9, "OUT"), (1, 11, "EVENT")]
    found = evaluate(make_store(events), make_task(windows))
    assert rows(found) == [(1, 9, True)]
    assert [(step.kind, step.rows, step.subjects) for step in found.flow] == [("cohort", 2, 1), ("merged", 1, 1)]


def test_who_died_before_the_prediction_is_no_survivor(make_store, make_task, within, window):
    windows = within() | {"target": window("input.end", "start + 48h", label="death")}
    events = [(1, 24, "MEDS_DEATH"), (1, 72, "IN"), (1, 200, "OUT"), (2, 72, "IN"), (2, 200, "OUT")]
    events += [(3, 72, "IN"), (3, 80, "MEDS_DEATH"), (4, 50, "IN"), (4, 50, "MEDS_DEATH")]
    found = evaluate(make_store(events), make_task(windows, extras={"follow_up": True}))
    assert rows(found) == [(2, 72, False), (3, 72, True)]
    assert [(step.kind, step.rows, step.reads_until_days) for step in found.flow[:2]] == [
        ("cohort", 4, 0.0),
        ("cohort", 2, 0.0),
    ]


@pytest.mark.parametrize(("midnight", "kept"), [("as_stamped", []), ("end_of_day", [(1, 30, False)])])
def test_a_death_at_midnight_is_before_a_later_prediction_only_as_stamped(
    make_store, make_task, within, midnight, kept
):
    store = make_store([(1, 30, "IN"), (1, 24, "MEDS_DEATH"), (2, 0, "EVENT")], more_codes=["OUT"])
    extras = {"follow_up": True, "midnight_deaths": midnight}
    assert rows(evaluate(store, make_task(within(48), extras=extras))) == kept


def test_a_late_window_under_a_day_leaves_out_deaths_of_an_unknown_hour(make_store, make_task, within, window):
    windows = within() | {"target": window("input.end + 24h", "start + 20h", label="death")}
    events = [(1, 10, "IN"), (1, 48, "MEDS_DEATH"), (2, 10, "IN"), (2, 240, "MEDS_DEATH"), (3, 10, "IN")]
    events += [(3, 50, "MEDS_DEATH"), (4, 10, "IN"), (4, 0, "MEDS_DEATH")]
    found = evaluate(make_store(events), make_task(windows, extras={"midnight_deaths": "end_of_day"}))
    assert rows(found) == [(2, 10, False), (3, 10, True), (4, 10, False)]
    assert (found.flow[-1].kind, found.flow[-1].rows) == ("censored", 3)


@pytest.mark.parametrize(
    ("start", "end", "says"),
    [
        ("input.end", "start - 2h", "ends before it opens"),
        ("input.end + 48h", "trigger + 24h", "ends before it opens"),
        ("input.end - 2h", "input.end + 24h", "opens before the prediction time"),
        (None, "input.end + 24h", "opens before the prediction time"),
    ],
)
def test_a_label_window_that_runs_backwards_or_into_the_past_is_refused(
    make_store, make_task, within, window, start, end, says
):
    windows = within() | {"target": window(start, end, label="event")}
    with pytest.raises(Refusal, match=f"TASK_WINDOW.*{says}"):
        evaluate(make_store([(1, 0, "IN"), (1, 1, "EVENT")]), make_task(windows))


@pytest.mark.parametrize(("midnight", "hours", "kept"), [("as_stamped", 10, 2), ("end_of_day", 18, 1)])
def test_any_event_counts_a_death_at_midnight_where_the_task_counts_it(
    make_store, make_task, within, window, midnight, hours, kept
):
    gap = window("trigger", f"start + {hours}h", has={"_ANY_EVENT": "(1, None)"})
    store = make_store(
        [(1, 30, "IN"), (1, 24, "MEDS_DEATH"), (2, 20, "IN"), (2, 24, "MEDS_DEATH")], more_codes=["EVENT", "OUT"]
    )
    found = evaluate(store, make_task(within(gap=gap), extras={"midnight_deaths": midnight}))
    assert [subject for subject, _, _ in rows(found)] == [kept]


def test_deaths_with_a_cause_in_their_code_are_known_as_long_as_declared(make_store, make_task, within, window):
    windows = within() | {"target": window("input.end", "start + 50d", label="death")}
    deaths = {"death": {"code": {"regex": "^MEDS_DEATH(//|$)"}}}
    store = make_store(
        [(1, 0, "IN"), (1, 24, "OUT"), (2, 0, "IN"), (2, 300, "MEDS_DEATH//X")], more_codes=["MEDS_DEATH"]
    )
    long = {"known_after_last_event": ["MEDS_DEATH"], "days": 60}
    found = evaluate(store, make_task(windows, extras={"follow_up": True}, more=deaths, given=long))
    assert rows(found) == [(1, 0, False), (2, 0, True)]


@pytest.fixture(scope="module")
def demo(request):
    return request.getfixturevalue("data_folder") / "mimic_iv_demo_meds"


@pytest.fixture(scope="module")
def demo_store(demo):
    return EventStore.in_memory(demo)


@pytest.mark.real_data
def test_the_published_tasks_have_their_counts_on_the_demo(demo_store, tmp_path):
    expected = {"icu": ([54, 12, 8], [8, 0, 1]), "readmission": ([199, 41, 35], [35, 10, 8])}
    for (name, counts), text in zip(expected.items(), (MEDS_DEV_ICU, READMISSION), strict=True):
        (tmp_path / f"{name}.yaml").write_text(text)
        frame = evaluate(
            demo_store, read_task(tmp_path / f"{name}.yaml", DATASETS / "mimic_iv" / "predicates.yaml")
        ).frame
        parts = [frame[frame["subject_id"].isin(demo_store.splits[split])] for split in ("train", "tuning", "held_out")]
        assert ([len(part) for part in parts], [part["boolean_value"].sum() for part in parts]) == counts


@pytest.mark.real_data
def test_the_icu_outcomes_of_the_demo_nest(demo_store):
    files = sorted((DATASETS / "mimic_iv" / "tasks").glob("*.yaml"))
    given = pd.DataFrame(
        {"subject_id": demo_store.subjects[:1], "time": pd.to_datetime(["2300-01-01"]), "code": "SEPSIS//ONSET"}
    )
    found = {
        file.stem: evaluate(demo_store, read_task(file, DATASETS / "mimic_iv" / "predicates.yaml"), given)
        for file in files
    }
    assert {name: len(one.frame) for name, one in found.items()} == dict.fromkeys(found, 106)
    truth = {name: one.frame["boolean_value"] for name, one in found.items()}
    assert truth.pop("sepsis_ever").sum() == 0
    assert {name: int(value.sum()) for name, value in truth.items()} == {
        "hospital_mortality": 11,
        "true_icu_mortality": 8,
        "mortality_7d": 5,
        "mortality_14d": 10,
        "mortality_30d": 14,
        "mortality_90d": 20,
        "prolonged_stay_7d": 18,
    }
    nested = [truth[f"mortality_{k}d"] for k in (7, 14, 30, 90)]
    assert all((~one | other).all() for one, other in itertools.pairwise(nested))
    assert (~truth["true_icu_mortality"] | truth["hospital_mortality"]).all()


@pytest.mark.real_data
def test_rows_and_counts_are_those_of_aces(demo, demo_store, tmp_path):
    """Needs es-aces, which wants an environment of its own; the exact tasks without what goes beyond its language."""
    aces = pytest.importorskip("aces")
    from aces import config, predicates, query
    from omegaconf import DictConfig

    logging.getLogger(aces.__name__).setLevel(logging.ERROR)
    given = DATASETS / "mimic_iv" / "predicates.yaml"
    files = [file for file in sorted((DATASETS / "mimic_iv" / "tasks").glob("*.yaml")) if file.stem != "sepsis_ever"]
    for name, text in (("icu", MEDS_DEV_ICU), ("readmission", READMISSION)):
        (tmp_path / f"{name}.yaml").write_text(text)
        files.append(tmp_path / f"{name}.yaml")
    for file in files:
        task = read_task(file, given)
        plain = Task(task.name, task.trigger, task.windows, task.predicates, Extras(), FollowUp())
        ours = rows(evaluate(demo_store, plain))
        theirs = []
        for split in ("train", "tuning", "held_out"):
            asked = config.TaskExtractorConfig.load(file, given)
            data = DictConfig({"path": str(demo / "data" / split / "0.parquet"), "standard": "meds", "ts_format": None})
            table = query.query(asked, predicates.get_predicates_df(asked, data)).select(
                "subject_id", "index_timestamp", "label"
            )
            theirs += [(s, pd.Timestamp(t).value / 1e9, y > 0) for s, t, y in table.iter_rows()]
        assert sorted((s, round(h * 3600), y) for s, h, y in ours) == sorted((s, round(t), y) for s, t, y in theirs), (
            file.stem
        )
