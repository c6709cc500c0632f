"""``mmjepa label``: a task file and a cohort into MEDS labels, with the flow of the cohort beside them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from mmjepa.cohort import Cohort
from mmjepa.ehr.tasks.evaluate import FlowStep, Labelled, evaluate
from mmjepa.ehr.tasks.language import Task, read_task
from mmjepa.files import atomic_path, fresh_folder, write_json
from mmjepa.refusal import Refusal


def label(
    cohort: Path | str,
    task: Path | str,
    predicates: Path | str | None,
    out: Path | str | None = None,
    *,
    events: Path | str | None = None,
) -> dict[str, Any]:
    """Label a cohort by a task file; ``out`` is ``COHORT/labels/<name of the task file>`` by default; of a bare MEDS root, which is
    somebody's download and stays as it is, it must be named.

    events: a parquet or csv table of further events (subject_id, time, code, perhaps numeric_value), such as given onsets of
    sepsis; its subjects must be in the cohort. Writes ``0.parquet`` (MEDS labels), ``flow.json`` (rows and subjects that each step
    leaves) and ``task.json`` (what the audit reads: window, codes, steps). Returns rows, positives, subjects, flow, out and,
    where all labels are alike, a note. Raises Refusal: the TASK_* codes, EVENTS_*, LABELS_EMPTY, OUTPUT_EXISTS, OUT_MISSING.
    """
    opened = Cohort.open(cohort)
    if out is None and opened.meds_root == opened.path:
        raise Refusal(
            "OUT_MISSING", f"{cohort} is a bare MEDS root, which stays as it is", "Name the folder to write with --out"
        )
    says = read_task(task, predicates)
    folder = fresh_folder(opened.labels_folder / says.name if out is None else Path(out), "folder with --out")
    found = evaluate(opened.events(), says, None if events is None else read_events(Path(events)))
    if found.frame.empty:
        raise Refusal(
            "LABELS_EMPTY",
            f"no row of the cohort is left after the steps of {task}",
            "; ".join(f"{step.step}: {step.rows} rows" for step in found.flow),
        )
    if folder.is_dir():
        folder.rmdir()  # empty, as fresh_folder has checked; a rename needs the name free
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        found.frame.to_parquet(temporary / "0.parquet", index=False)
        write_json(temporary / "flow.json", [asdict(step) for step in found.flow])
        write_json(temporary / "task.json", declaration(says, found) | ({"outcome_given": True} if events else {}))
    rows, positives = len(found.frame), int(found.frame["boolean_value"].sum())
    result = {
        "task": says.name,
        "out": str(folder),
        "rows": rows,
        "positives": positives,
        "subjects": int(found.frame["subject_id"].nunique()),
        "flow": [asdict(step) for step in found.flow],
    }
    if positives in (0, rows):
        alike = "true" if positives else "false"
        result["note"] = (
            f"all {rows} labels are {alike}: nothing can be learned or judged. Do the predicates fit the cohort's codes?"
        )
    return result


def declaration(task: Task, found: Labelled) -> dict[str, Any]:
    """``task.json`` as ``mmjepa.audit.declared`` reads it. Censoring is no criterion of inclusion and stands in flow.json alone."""
    steps = [_step(step) for step in found.flow if step.kind == "cohort"]
    says: dict[str, Any] = {
        "includes_start": task.label_window.start_inclusive,
        "within_stay": task.extras.within_stay,
        "flow": steps,
    }
    if found.window_days is not None and found.window_days[0] < found.window_days[1]:
        says["window_days"] = list(found.window_days)
    if task.extras.true_when == "present":
        says["outcome_codes"] = list(found.codes)
    return says


def _step(step: FlowStep) -> dict[str, Any]:
    return {name: getattr(step, name) for name in ("step", "subjects", "positives", "reads_until_days")}


def read_events(path: Path) -> pd.DataFrame:
    """Events of a table, parquet or csv. Raises Refusal EVENTS_MISSING, EVENTS_SCHEMA."""
    if not path.is_file():
        raise Refusal("EVENTS_MISSING", f"{path} does not exist")
    try:
        frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
        if missing := {"subject_id", "time", "code"} - set(frame):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if frame[["subject_id", "time", "code"]].isna().any().any():
            raise ValueError("it holds missing values")
        if not pd.api.types.is_integer_dtype(frame["subject_id"]):
            raise ValueError("subject_id is no integer")
        times = pd.to_datetime(frame["time"])
        if times.dt.tz is not None:
            raise ValueError("time carries a time zone")
        return frame.assign(time=times.astype("datetime64[us]"), code=frame["code"].astype(str))
    except (ValueError, TypeError, AttributeError, OSError) as error:
        why = str(error) if str(error).startswith(("it ", "subject_id", "time ")) else type(error).__name__
        raise Refusal(
            "EVENTS_SCHEMA", f"{path} is no table of events ({why})", "It needs subject_id, time, code"
        ) from None
