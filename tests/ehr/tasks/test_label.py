"""``label`` writes what ``read_labels`` and the audit read, whole or not at all."""

import json

import pandas as pd
import pytest

from mmjepa import cli_show
from mmjepa.audit.declared import read_declaration
from mmjepa.cohort import Cohort
from mmjepa.ehr.tasks import label
from mmjepa.ehr.tasks.label import read_events
from mmjepa.refusal import Refusal

TIMES = pd.to_datetime(["2020-01-01", "2020-01-03", "2020-01-01", "2020-02-01"])


@pytest.fixture
def cohort(tmp_path):
    """Subject 1: IN, then EVENT after 2 days; subject 2: IN, then OUT after a month."""
    root = tmp_path / "cohort" / "ehr"
    for part in ("data", "metadata"):
        (root / part).mkdir(parents=True)
    frame = pd.DataFrame(
        {"subject_id": [1, 1, 2, 2], "time": TIMES.as_unit("us"), "code": ["IN", "EVENT", "IN", "OUT"]}
    )
    frame.to_parquet(root / "data" / "0.parquet")
    pd.DataFrame({"code": ["IN", "EVENT", "OUT", "MEDS_DEATH"]}).to_parquet(root / "metadata" / "codes.parquet")
    return tmp_path / "cohort"


@pytest.fixture
def files(tmp_path, make_task, within):
    """The paths of a task (an event within 7 days) and its predicates."""
    make_task(within(hours=168), extras={"follow_up": True})
    return tmp_path / "task.yaml", tmp_path / "predicates.yaml"


def test_labels_are_read_back_and_declare_themselves_to_the_audit(cohort, files):
    result = label(cohort, *files)
    assert (result["rows"], result["positives"], result["subjects"]) == (2, 1, 2)
    assert Cohort.open(cohort).labels("task")["value"].tolist() == [True, False]
    declared = read_declaration(cohort / "labels" / "task")
    assert (declared.window_days, declared.includes_start, declared.outcome_codes) == ((0.0, 7.0), False, ("EVENT",))
    assert [(step.step, step.subjects, step.positives) for step in declared.flow] == [("trigger in", 2, 1)]
    flow = json.loads((cohort / "labels" / "task" / "flow.json").read_text())
    assert [(step["kind"], step["rows"]) for step in flow] == [("cohort", 2), ("censored", 2)]


def test_a_bare_root_is_not_written_into(cohort, files, tmp_path):
    before = sorted(cohort.rglob("*"))
    with pytest.raises(Refusal, match=r"OUT_MISSING.*--out"):
        label(cohort / "ehr", *files)
    assert sorted(cohort.rglob("*")) == before
    assert label(cohort / "ehr", *files, tmp_path / "out")["rows"] == 2


@pytest.mark.parametrize(("hours", "alike"), [(1, "false"), (24 * 60, "true")])
def test_labels_that_are_all_alike_are_noted(cohort, tmp_path, make_task, within, hours, alike, capsys):
    make_task(within(hours=hours))
    events = tmp_path / "events.csv"
    events.write_text("subject_id,time,code\n2,2020-01-05,EVENT\n")
    found = label(cohort, tmp_path / "task.yaml", tmp_path / "predicates.yaml", events=events)
    assert found["note"].startswith(f"all 2 labels are {alike}: ")
    cli_show.labels(found)
    assert "warning: all 2 labels" in capsys.readouterr().err


def test_mixed_labels_carry_no_note(cohort, files):
    assert "note" not in label(cohort, *files)


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_task_file_that_is_not_there_is_said_not_to_exist(cohort, files, tmp_path, lacking):
    given = [*files]
    given[lacking] = tmp_path / "nowhere.yaml"
    with pytest.raises(Refusal, match=r"TASK_MISSING.*nowhere.yaml does not exist"):
        label(cohort, *given)


def test_an_existing_folder_is_never_written_over(cohort, files, tmp_path):
    label(cohort, *files)
    with pytest.raises(Refusal, match="OUTPUT_EXISTS"):
        label(cohort, *files)
    label(cohort, *files, tmp_path / "other")


def test_no_row_is_a_refusal_that_tells_the_flow(cohort, tmp_path, make_task, within, window):
    past = window(None, "trigger", (True, True), has={"out": "(1, None)"})
    make_task(within(first=past))
    with pytest.raises(Refusal, match="LABELS_EMPTY") as info:
        label(cohort, tmp_path / "task.yaml", tmp_path / "predicates.yaml")
    assert "trigger in: 2 rows" in str(info.value.hint)
    assert not (cohort / "labels").exists()


def test_given_events_are_read_from_csv(cohort, files, tmp_path):
    (tmp_path / "onsets.csv").write_text("subject_id,time,code\n2,2020-01-02 10:00:00,EVENT\n")
    assert label(cohort, *files, events=tmp_path / "onsets.csv")["positives"] == 2
    (folder,) = (cohort / "labels").iterdir()
    assert read_declaration(folder).outcome_given  # its codes need not be in the record


@pytest.mark.parametrize(
    "text",
    [
        "subject_id,time\n1,2020-01-01\n",
        "subject_id,time,code\n1,soon,E\n",
        "subject_id,time,code\n1.5,2020-01-01,E\n",
        "subject_id,time,code\n1,,E\n",
        "subject_id,time,code\n1,2020-01-01T00:00:00+02:00,E\n",
    ],
)
def test_tables_that_hold_no_events_are_refused(tmp_path, text):
    (tmp_path / "events.csv").write_text(text)
    with pytest.raises(Refusal, match="EVENTS_SCHEMA"):
        read_events(tmp_path / "events.csv")
