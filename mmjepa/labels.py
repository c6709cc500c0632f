"""Label files at the door: MEDS labels, what ACES writes, and the sidecar of times to an event.

A task is a folder. Its parquet files are MEDS labels (subject_id, prediction_time, one value column), except ``survival.parquet``:
subject_id int64, prediction_time timestamp[us], time_to_event_days float (days after prediction_time, 0 or more) and event int
(0: censored then, 1 and up: the cause). The MEDS label schema is closed, so times to an event have no place in it. A censored
subject may have a row there and no yes-or-no label; a label without such a row is refused.
"""

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmjepa.files import atomic_path, read_json, sha256, write_json
from mmjepa.refusal import Refusal

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

VALUE_COLUMNS = ("boolean_value", "integer_value", "float_value", "categorical_value")
SURVIVAL_FILE = "survival.parquet"
SURVIVAL_COLUMNS = ("subject_id", "prediction_time", "time_to_event_days", "event")
DECLARATIONS = ("task.json", "flow.json")  # what a task says of itself, see mmjepa.audit.declared
SOURCE_TASKS = "source.json"  # in a labels folder: names of the tasks that came from the source, beside those made here
KEY = ["subject_id", "prediction_time"]


def task_names(folder: Path | str) -> list[str]:
    """Names of the tasks under a labels folder: its subfolders that hold a parquet file."""
    folder = Path(folder)
    return sorted(path.name for path in folder.iterdir() if label_files(path)) if folder.is_dir() else []


def label_files(folder: Path) -> list[Path]:
    """The label files of one task."""
    return sorted(path for path in folder.rglob("*.parquet") if path.name != SURVIVAL_FILE) if folder.is_dir() else []


def read_labels(folder: Path | str, task: str) -> "pd.DataFrame":
    """Read the MEDS label files of one task, sorted by (subject_id, prediction_time).

    Returns subject_id int64, prediction_time datetime64[us] (inclusive end of usable data) and value (the one value
    column that the files carry). What had to be cast is told in ``frame.attrs["casts"]``, sentence -> labels: a whole number in
    boolean_value, and the result of ACES in Python (``label``, ``index_timestamp``), are counts, true from 1 up; value columns
    without any value are left out. Raises Refusal: LABELS_MISSING, LABELS_EMPTY, LABELS_UNREADABLE, LABELS_TIMEZONE,
    LABELS_SCHEMA (other columns, nulls, none or several value columns, counts below 0), LABELS_DUPLICATE.
    """
    import pandas as pd

    files = label_files(Path(folder) / task)
    if not files:
        known = ", ".join(task_names(folder)) or "none"
        raise Refusal("LABELS_MISSING", f"{Path(folder) / task} holds no labels", f"Tasks there: {known}")
    casts: Counter[str] = Counter()
    frame = pd.concat([_read(file, casts).to_pandas() for file in files], ignore_index=True)
    if frame.empty:
        raise Refusal("LABELS_EMPTY", f"the label files of {Path(folder) / task} hold no row")
    values = [name for name in VALUE_COLUMNS if name in frame]
    if len(values) != 1 or frame[values[0]].isna().any():
        found = ", ".join(values) or "none"
        raise Refusal(
            "LABELS_SCHEMA",
            f"the value columns of {Path(folder) / task} are {found}, and each label needs exactly one value",
            f"Give all files of a task one of {', '.join(VALUE_COLUMNS)}, never missing",
        )
    frame = frame[[*KEY, values[0]]].rename(columns={values[0]: "value"})
    _refuse_repeated(frame, Path(folder) / task, "LABELS_DUPLICATE", "labels")
    frame = frame.sort_values(KEY, ignore_index=True)
    frame.attrs["casts"] = dict(casts)
    return frame


def read_survival(folder: Path | str, task: str) -> "pd.DataFrame":
    """The times to an event of one task, see the head of this module, sorted by (subject_id, prediction_time).

    Returns subject_id int64, prediction_time datetime64[us], time_to_event_days float64, event int64. Raises Refusal:
    SURVIVAL_MISSING, SURVIVAL_UNREADABLE, SURVIVAL_TIMEZONE, SURVIVAL_SCHEMA (columns, types, nulls), SURVIVAL_VALUE (a time that
    is negative or not finite, an event below 0), SURVIVAL_DUPLICATE, SURVIVAL_UNMATCHED (labels without a row).
    """
    import numpy as np
    import pyarrow as pa

    path = Path(folder) / task / SURVIVAL_FILE
    if not path.is_file():
        raise Refusal("SURVIVAL_MISSING", f"{path} does not exist", f"It needs {', '.join(SURVIVAL_COLUMNS)}")
    table = _raw(path, "SURVIVAL")
    whole = {
        name: pa.types.is_integer(table.schema.field(name).type)
        for name in ("subject_id", "event")
        if name in table.column_names
    }
    if set(table.column_names) != set(SURVIVAL_COLUMNS) or not all(whole.values()):
        raise Refusal(
            "SURVIVAL_SCHEMA", f"{path} does not hold {', '.join(SURVIVAL_COLUMNS)}, ids and events as integers"
        )
    days = table.schema.field("time_to_event_days").type
    if any(table[name].null_count for name in SURVIVAL_COLUMNS) or not (
        pa.types.is_floating(days) or pa.types.is_integer(days)
    ):
        raise Refusal("SURVIVAL_SCHEMA", f"{path} holds missing values, or times that are no number of days")
    if not pa.types.is_timestamp(table.schema.field("prediction_time").type):
        raise Refusal("SURVIVAL_SCHEMA", f"prediction_time of {path} is no timestamp")
    frame = table.select(SURVIVAL_COLUMNS).to_pandas()
    frame = frame.astype(
        {"subject_id": np.int64, "prediction_time": "datetime64[us]", "time_to_event_days": float, "event": np.int64}
    )
    bad = ~np.isfinite(frame["time_to_event_days"]) | (frame["time_to_event_days"] < 0) | (frame["event"] < 0)
    if bad.any():
        raise Refusal(
            "SURVIVAL_VALUE",
            f"{bad.sum()} rows of {path} have a time that is negative or not finite, or an event below 0 (first: row {bad.argmax()})",
            "Days count from the prediction time; 0 stands for censored, causes start at 1",
        )
    _refuse_repeated(frame, path, "SURVIVAL_DUPLICATE", "rows")
    if label_files(path.parent):
        labels = read_labels(folder, task)[KEY].merge(frame[KEY], how="left", on=KEY, indicator=True)
        lacking = int((labels["_merge"] == "left_only").sum())
        if lacking:
            raise Refusal(
                "SURVIVAL_UNMATCHED",
                f"{lacking} labels have no row in {path}",
                "Give every label its time, censored or not",
            )
    return frame.sort_values(KEY, ignore_index=True)


def check_labels(source: Path) -> dict[str, "pd.DataFrame"]:
    """All tasks under ``source`` and their sidecars, read. Raises Refusal: those of ``read_labels`` and ``read_survival``."""
    tasks = {name: read_labels(source, name) for name in task_names(source)}
    for name in tasks:
        if (source / name / SURVIVAL_FILE).is_file():
            read_survival(source, name)
    return tasks


def place_labels(tasks: Mapping[str, "pd.DataFrame"], source: Path, target: Path) -> dict[str, Any]:
    """Put checked tasks into ``target``, whole or not at all.

    Files are copied, so that a source that is written again later does not change the cohort; a task whose values had to be cast is written anew as
    ``0.parquet``. Sidecars and declarations come along, the names of the tasks stand in ``source.json``. Returns ``labels`` by task and, where there are any, ``label_casts``.
    """
    casts = {name: frame.attrs["casts"] for name, frame in tasks.items() if frame.attrs["casts"]}
    if tasks:
        if target.is_dir():  # empty; a rename needs the name free
            target.rmdir()
        with atomic_path(target) as temporary:
            for name, frame in tasks.items():
                (temporary / name).mkdir(parents=True)
                if name in casts:
                    _write_cast(frame, source / name, temporary / name / "0.parquet")
                for file in kept_files(source / name, cast=name in casts):
                    (temporary / name / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source / name / file, temporary / name / file)
            write_json(temporary / SOURCE_TASKS, sorted(tasks))
    return {"labels": {name: len(frame) for name, frame in tasks.items()}, **({"label_casts": casts} if casts else {})}


def same_labels(source: Path, target: Path) -> bool:
    """Whether ``target`` holds the labels of ``source`` as ``place_labels`` would put them there, and none that have left it.

    Tasks made in the target, and declarations written there, do not count.
    """
    names, record = task_names(source), target / SOURCE_TASKS
    if record.is_file() and read_json(record) != names:
        return False
    for name in names:
        frame = read_labels(source, name)
        if not label_files(target / name) or not frame.equals(read_labels(target, name)):
            return False
        if (target / name / SURVIVAL_FILE).is_file() and not (source / name / SURVIVAL_FILE).is_file():
            return False
        for file in kept_files(source / name, cast=True):
            other = target / name / file
            if not other.is_file() or sha256(source / name / file) != sha256(other):
                return False
    return True


def kept_files(folder: Path, *, cast: bool) -> list[Path]:
    """Files of a task, relative to its folder, that are taken over byte for byte; of a cast one all but the label files."""
    beside = [path for path in folder.rglob(SURVIVAL_FILE)] + [
        folder / name for name in DECLARATIONS if (folder / name).is_file()
    ]
    return [path.relative_to(folder) for path in [*sorted(beside), *([] if cast else label_files(folder))]]


def _write_cast(frame: "pd.DataFrame", folder: Path, file: Path) -> None:
    table = _read(label_files(folder)[0], Counter())
    column = next(name for name in VALUE_COLUMNS if name in table.column_names)
    frame.rename(columns={"value": column}).to_parquet(file, index=False)


def _read(file: Path, casts: "Counter[str]") -> "pa.Table":
    """One label file under the MEDS schema; ``casts`` counts what was changed."""
    import meds

    from mmjepa.ehr.meds_io import refusals

    table = _as_labels(_raw(file, "LABELS"), file, casts)
    try:
        with refusals(file, meds.LabelSchema):
            return meds.LabelSchema.align(table)
    except Refusal as refusal:
        hint = refusal.hint
        if any(name.startswith("__index_level_") for name in table.column_names):
            hint = "__index_level_0__ is the index that pandas wrote along: write with to_parquet(..., index=False)"
        raise Refusal(refusal.code.replace("MEDS_", "LABELS_"), refusal.message, hint) from None


def _raw(file: Path, kind: str) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    from mmjepa.ehr.meds_io import line

    try:
        table = pq.ParquetFile(file).read()  # not read_table: it would take folder names for columns
    except (pa.ArrowException, OSError) as error:
        raise Refusal(
            f"{kind}_UNREADABLE", f"{file} cannot be read ({line(error)})", "Copy or export it again"
        ) from None
    zoned = [field.name for field in table.schema if pa.types.is_timestamp(field.type) and field.type.tz is not None]
    if zoned:
        raise Refusal(
            f"{kind}_TIMEZONE",
            f"column {', '.join(zoned)} of {file} carries a time zone",
            "Write local clock times without a zone; a silent move to UTC would shift every hour",
        )
    return table


def _as_labels(table: "pa.Table", file: Path, casts: "Counter[str]") -> "pa.Table":
    import pyarrow as pa

    if {"label", "index_timestamp"} <= set(table.column_names) and "prediction_time" not in table.column_names:
        table = table.select(["subject_id", "index_timestamp", "label"]).rename_columns([*KEY, "boolean_value"])
    empty = [name for name in VALUE_COLUMNS if name in table.column_names and table[name].null_count == len(table) > 0]
    if empty and len(empty) < sum(name in VALUE_COLUMNS for name in table.column_names):
        casts["value columns without any value are left out"] += len(table)
        table = table.drop_columns(empty)
    if "boolean_value" not in table.column_names or pa.types.is_boolean(table["boolean_value"].type):
        return table
    counts = table["boolean_value"]
    if not pa.types.is_integer(counts.type) or counts.null_count or (counts.to_numpy() < 0).any():
        raise Refusal(
            "LABELS_SCHEMA",
            f"boolean_value of {file} is {counts.type}, which is neither true or false nor whole numbers from 0 up",
            "Write true and false, or counts, which are true from 1 up; never missing",
        )
    numbers = counts.to_numpy()
    for sentence, found in (
        ("counts made true from 1 up", len(numbers)),
        ("of them above 1", int((numbers > 1).sum())),
    ):
        if found:
            casts[sentence] += found
    place = table.column_names.index("boolean_value")
    return table.set_column(place, "boolean_value", pa.array(numbers > 0))


def _refuse_repeated(frame: "pd.DataFrame", where: Path, code: str, what: str) -> None:
    twice = frame.duplicated(KEY)
    if twice.any():
        raise Refusal(
            code,
            f"{twice.sum()} {what} of {where} repeat a subject and prediction_time (first: row {twice.argmax()})",
            "Keep one for each subject and time",
        )
