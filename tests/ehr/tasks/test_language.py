"""What is not understood is refused; what is, is read as ACES reads it."""

from pathlib import Path

import pytest

from mmjepa.ehr.tasks import read_task
from mmjepa.refusal import Refusal

DATASETS = Path(__file__).parents[3] / "datasets"


def refused(code, call, *arguments, **named):
    with pytest.raises(Refusal) as info:
        call(*arguments, **named)
    assert info.value.code == code
    return info.value


@pytest.mark.parametrize("dataset", ["mimic_iv", "inspect"])
def test_every_built_in_task_reads_with_its_predicates(dataset):
    files = sorted((DATASETS / dataset / "tasks").glob("*.yaml"))
    tasks = {file.stem: read_task(file, DATASETS / dataset / "predicates.yaml") for file in files}
    assert len(tasks) == 8
    for name, task in tasks.items():
        assert not task.label_window.start_inclusive, f"{name} counts events at the prediction time"
        assert task.extras.midnight_deaths == "end_of_day"
        if task.label_window.end.arrow == "" and name != "pe_positive_nlp":
            assert task.extras.follow_up, f"{name} makes the lost negative"


def test_the_eight_outcomes_of_the_icu_are_there():
    names = {file.stem for file in (DATASETS / "mimic_iv" / "tasks").glob("*.yaml")}
    days = {f"mortality_{k}d" for k in (7, 14, 30, 90)}
    assert names == days | {"hospital_mortality", "true_icu_mortality", "prolonged_stay_7d", "sepsis_ever"}


def test_predicates_of_the_data_set_replace_the_tasks_own(tmp_path):
    (tmp_path / "t.yaml").write_text(
        "trigger: a\npredicates:\n  a: ???\n  b: {code: OLD}\nwindows:\n"
        "  w: {start: trigger, end: start + 1 day 2h, start_inclusive: false, end_inclusive: true, label: b, index_timestamp: start}\n"
    )
    (tmp_path / "p.yaml").write_text("predicates:\n  a: {code: {any: [X, Y]}}\n  b: {code: NEW}\n")
    task = read_task(tmp_path / "t.yaml", tmp_path / "p.yaml")
    assert task.predicates["a"].codes == ("X", "Y")
    assert task.predicates["b"].codes == ("NEW",)
    assert task.windows[0].end.offset_us == 26 * 3_600_000_000
    refused("TASK_PREDICATE", read_task, tmp_path / "t.yaml")  # ??? alone defines nothing


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("TASK_UNSUPPORTED", {"more": {"event": {"code": "E", "static": True}}}),
        ("TASK_UNSUPPORTED", {"more": {"event": {"code": "E", "other_cols": {"unit": "x"}}}}),
        ("TASK_UNSUPPORTED", {"more": {"event": {"expr": "not(in)"}}}),
        ("TASK_PREDICATE", {"more": {"event": {"code": {"regex": "("}}}}),
        ("TASK_PREDICATE", {"more": {"event": {"expr": "or(event, in)"}}}),
        ("TASK_PREDICATE", {"more": {"event": {"expr": "or(nothing, in)"}}}),
        ("TASK_PREDICATE", {"trigger": "nothing"}),
        ("CONFIG_UNKNOWN_KEY", {"extras": {"folow_up": True}}),
    ],
)
def test_predicates_outside_the_language_are_refused(make_task, within, code, change):
    refused(code, make_task, within(), **change)


@pytest.mark.parametrize(
    ("code", "bad"),
    [
        ("TASK_UNSUPPORTED", {"end": "start -> _RECORD_END"}),
        ("TASK_UNSUPPORTED", {"end": "start + soon"}),
        ("TASK_UNSUPPORTED", {"end": "start + 1..5h"}),
        ("TASK_UNSUPPORTED", {"end": "start + 1.5.5h"}),
        ("TASK_UNSUPPORTED", {"end": "start * 2"}),
        ("TASK_WINDOW", {"has": {"event": "(3, 1)"}}),
        ("TASK_UNSUPPORTED", {"closed": "both"}),
        ("TASK_WINDOW", {"end_inclusive": None}),
        ("TASK_WINDOW", {"end": "other.end"}),
        ("TASK_WINDOW", {"start": "end", "end": "start"}),
        ("TASK_WINDOW", {"has": {"event": "many"}}),
        ("TASK_WINDOW", {"label": None}),
        ("TASK_WINDOW", {"index_timestamp": "middle"}),
        ("TASK_WINDOW", {"index_timestamp": "end"}),  # two prediction times
    ],
)
def test_windows_outside_the_language_are_refused(make_task, within, code, bad):
    windows = within()
    windows["target"] = {**windows["target"], **bad}
    refused(code, make_task, windows)


def test_a_prediction_at_the_open_end_of_the_record_is_refused(make_task, window):
    bad = {"w": window("trigger", None, label="event", index_timestamp="end")}
    refused("TASK_WINDOW", make_task, bad)


@pytest.mark.parametrize("text", ["[", "- a", ""])
def test_files_that_are_no_task_are_refused(tmp_path, text):
    (tmp_path / "t.yaml").write_text(text)
    refused("TASK_UNREADABLE", read_task, tmp_path / "t.yaml")
    refused("TASK_MISSING", read_task, tmp_path / "absent.yaml")
