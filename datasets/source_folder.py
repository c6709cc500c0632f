"""What every converter shares: tables read with checks, image headers read once, a source folder written whole or not at all.

A source folder is what ``mmjepa ingest`` reads: ``ehr/`` (MEDS), ``images/`` (a link to the files, which stay where they are),
``labels/<task>/``, ``identity/crosswalk.csv`` and ``identity/salt.txt``. Run by path beside the converters, never a package.
"""

import argparse
import csv
import json
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mmjepa import console, progress
from mmjepa.ct.dicom import Left, Slice, looks_like_dicom, read_header
from mmjepa.ct.series import first_moment
from mmjepa.files import atomic_path, fresh_folder
from mmjepa.identity import COLUMNS, Crosswalk, salt_at
from mmjepa.refusal import Refusal

EVENTS = pa.schema(
    {
        "subject_id": pa.int64(),
        "time": pa.timestamp("us"),
        "code": pa.string(),
        "numeric_value": pa.float32(),
        "image_id": pa.string(),
    }
)
_LABEL_TYPES = {"boolean_value": pa.bool_(), "integer_value": pa.int64(), "float_value": pa.float32()}
_SURVIVAL = {"event": pa.int64(), "time_to_event_days": pa.float64()}


def run(convert: Callable[[argparse.Namespace], dict], parser: argparse.ArgumentParser) -> int:
    """Add SOURCE, OUT, --json and --debug to the parser, call the converter, show its counts; returns the exit code."""
    parser.add_argument("source", type=Path, help="the folder of the download, laid out as the card says")
    parser.add_argument("out", type=Path, help="the source folder to make, for `mmjepa ingest`; must not exist")
    parser.add_argument("--json", action="store_true", help="one JSON object as the only line of standard output")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args()

    def call() -> dict:
        if not options.source.is_dir():
            raise Refusal("SOURCE_MISSING", f"{options.source} is not a folder", "Name the folder of the download")
        if options.out.resolve().is_relative_to(options.source.resolve()):
            raise Refusal("OUT_IN_SOURCE", f"{options.out} lies inside {options.source}", "Name a folder of its own")
        result = convert(options)
        if not options.json:
            console.show_mapping(result)
        return result

    return console.run(call, as_json=options.json, debug=options.debug)


def find_one(source: Path, *patterns: str) -> Path:
    """The one file or folder of ``source`` (or of a folder in it) that fits a pattern.

    Raises Refusal SOURCE_FILE_MISSING, SOURCE_FILE_SEVERAL.
    """
    found = sorted({path for name in patterns for where in (name, f"*/{name}") for path in source.glob(where)})
    wanted = " or ".join(patterns)
    if not found:
        raise Refusal(
            "SOURCE_FILE_MISSING", f"{source} holds no {wanted}", "The card says how the download is laid out"
        )
    if len(found) > 1:
        raise Refusal("SOURCE_FILE_SEVERAL", f"{source} holds {len(found)} of {wanted}", "Keep one version")
    return found[0]


def read_table(path: Path, columns: Iterable[str], separator: str = ",", first_line: bool = False) -> pd.DataFrame:
    """The named columns of a text table, every cell as stripped text; extra columns are left alone.

    first_line: a column goes by the first line of its header, which then explains its codes.

    Raises Refusal SOURCE_COLUMNS, SOURCE_UNREADABLE (ragged rows, another encoding).
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            rows = list(csv.reader(handle, delimiter=separator, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error):
        raise Refusal("SOURCE_UNREADABLE", f"{path} cannot be read as a UTF-8 table") from None
    if rows and first_line:
        rows[0] = [(name.strip().splitlines() or [""])[0] for name in rows[0]]
    return table_of(rows, columns, path)


def table_of(rows: list[list[str]], columns: Iterable[str], path: Path) -> pd.DataFrame:
    """The named columns of rows of text whose first row is the header (compatibility letters count as plain ones).

    Raises Refusal SOURCE_COLUMNS, SOURCE_UNREADABLE.
    """
    header = [unicodedata.normalize("NFKC", name).strip() for name in rows[0]] if rows else []
    absent = [name for name in columns if name not in header]
    if absent:
        raise Refusal("SOURCE_COLUMNS", f"{path} has no column {', '.join(absent)}", "Is it another version or table?")
    body = [row for row in rows[1:] if any(cell.strip() for cell in row)]
    ragged = [n for n, row in enumerate(body, start=1) if len(row) != len(header)]
    if ragged:
        raise Refusal("SOURCE_UNREADABLE", f"row {ragged[0]} of {path} has another number of cells than the header")
    where = {name: header.index(name) for name in columns}
    return pd.DataFrame({name: [row[at].strip() for row in body] for name, at in where.items()}, dtype=object)


def numbers(table: pd.DataFrame, column: str, path: Path, empty: Iterable[str] = ("",)) -> pd.Series:
    """A text column as float64, NaN where the cell is one of ``empty``. Raises Refusal SOURCE_VALUE."""
    text = table[column].where(~table[column].isin(list(empty)))
    values = pd.to_numeric(text, errors="coerce").astype(np.float64)
    wrong = (text.notna() & ~np.isfinite(values)).to_numpy()
    if wrong.any():
        raise Refusal("SOURCE_VALUE", f"{column} in row {wrong.argmax() + 1} of {path} is not a number")
    return values


def unique(table: pd.DataFrame, column: str, path: Path) -> pd.DataFrame:
    """The table indexed by a column. Raises Refusal SOURCE_DUPLICATE when a value is empty or repeated."""
    wrong = (table[column].duplicated() | (table[column] == "")).to_numpy()
    if wrong.any():
        raise Refusal("SOURCE_DUPLICATE", f"{column} in row {wrong.argmax() + 1} of {path} is empty or repeated")
    return table.set_index(column)


@dataclass(frozen=True)
class Series:
    """One DICOM series as its headers tell it. Holds identifiers: never printed, never written.

    time: the earliest acquisition (else series, else study) time, as ``mmjepa ingest`` takes it, unshifted; None if unknown.
    """

    patient_id: str
    uid: str
    time: datetime | None
    sop_uids: tuple[str, ...]


def read_series(images: Path) -> tuple[list[Series], Counter[str]]:
    """Every CT series below a folder, and how many files were left out by code. Only headers are read, each once."""
    slices: dict[tuple[str, str], list[Slice]] = {}
    skipped: Counter[str] = Counter()
    paths = sorted(Path(folder) / name for folder, _, names in os.walk(images) for name in names)
    for number, path in enumerate(progress.track(paths, "reading headers"), start=1):
        try:
            with open(path, "rb") as handle:
                is_dicom = looks_like_dicom(handle.read(132))
            header = read_header(path, number) if is_dicom else Left("CT_NOT_DICOM")
        except Refusal as refusal:
            header = Left(refusal.code)
        if isinstance(header, Slice):
            slices.setdefault((header.patient_id, header.series_uid), []).append(header)
        else:
            skipped[header.code] += 1
    found = [
        Series(patient, uid, first_moment(parts), tuple(part.sop_uid for part in parts))
        for (patient, uid), parts in sorted(slices.items())
    ]
    return found, skipped


class SourceFolder:
    """A source folder being written.

    people: the crosswalk. numbered: subject numbers and date shifts come from a fresh secret salt; else a patient's own number
    is the subject's and dates stay, for sources whose records are on that footing already.
    """

    def __init__(self, path: Path, patients: Iterable[str], numbered: bool = True) -> None:
        self.path = path
        table = path / "identity" / "crosswalk.csv"
        table.parent.mkdir(parents=True)
        salt = salt_at(table.with_name("salt.txt"), cohort=path / "ehr")
        patients = sorted({patient for patient in patients if patient})
        people = Crosswalk.none(salt).numbered(patients)
        with open(table, "w", newline="") as handle:
            rows = csv.writer(handle)
            rows.writerow(COLUMNS)
            for name in patients:
                rows.writerow(
                    (name, people.subject_id(name), people.date_shift_days(name)) if numbered else (name, name, 0)
                )
        self.people = Crosswalk.read(table, table.with_name("salt.txt"))

    def moved(self, patient: str, moment: datetime) -> pd.Timestamp:
        """A source date-time on the cohort's clock."""
        return pd.Timestamp(moment) + pd.Timedelta(days=self.people.date_shift_days(patient))

    def link(self, name: str, target: Path) -> None:
        """Let ``name`` point to files that stay where they are."""
        (self.path / name).symlink_to(target.resolve(), target_is_directory=target.is_dir())

    def write_events(self, rows: list[tuple], name: str) -> int:
        """MEDS from (subject_id, time or None, code, number or None[, image_id]); returns the number of rows."""
        frame = pd.DataFrame([(*row, None)[: len(EVENTS)] for row in rows], columns=EVENTS.names)
        frame = frame.astype({"time": "datetime64[us]", "numeric_value": "float32"})
        frame = frame.sort_values(["subject_id", "time", "code"], na_position="first", kind="stable")
        for part in ("data", "metadata"):
            (self.path / "ehr" / part).mkdir(parents=True)
        pq.write_table(_table(frame, EVENTS), self.path / "ehr" / "data" / "0.parquet")
        codes = pa.schema(
            [("code", pa.string()), ("description", pa.string()), ("parent_codes", pa.list_(pa.string()))]
        )
        listed = [{"code": code} for code in sorted(set(frame["code"]))]
        pq.write_table(pa.Table.from_pylist(listed, codes), self.path / "ehr" / "metadata" / "codes.parquet")
        facts = {"dataset_name": name, "meds_version": "0.4.0", "etl_name": f"datasets/{name}"}
        (self.path / "ehr" / "metadata" / "dataset.json").write_text(json.dumps(facts) + "\n")
        return len(frame)

    def write_splits(self, split_of: dict[int, str]) -> None:
        """``metadata/subject_splits.parquet`` beside the events."""
        schema = pa.schema([("subject_id", pa.int64()), ("split", pa.string())])
        rows = [{"subject_id": subject, "split": split} for subject, split in sorted(split_of.items())]
        pq.write_table(pa.Table.from_pylist(rows, schema), self.path / "ehr" / "metadata" / "subject_splits.parquet")

    def write_labels(self, task: str, rows: list[tuple], kind: str = "boolean_value") -> int:
        """One task from (subject_id, prediction_time, value); nothing is written for no row. Returns the number of rows."""
        return self._write_rows(task, "0", rows, {kind: _LABEL_TYPES[kind]})

    def write_survival(self, task: str, rows: list[tuple]) -> int:
        """The time-to-event sidecar of a task: (subject_id, prediction_time, event, days from there to event or last sight)."""
        return self._write_rows(task, "survival", rows, _SURVIVAL)

    def _write_rows(self, task: str, file: str, rows: list[tuple], values: dict[str, pa.DataType]) -> int:
        rows = sorted(set(rows))  # several reconstructions of one scan share its time
        if rows:
            keys = [("subject_id", pa.int64()), ("prediction_time", pa.timestamp("us"))]
            schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in [*keys, *values.items()]])
            (self.path / "labels" / task).mkdir(parents=True, exist_ok=True)
            frame = pd.DataFrame(rows, columns=schema.names).astype({"prediction_time": "datetime64[us]"})
            pq.write_table(_table(frame, schema), self.path / "labels" / task / f"{file}.parquet")
        return len(rows)


def _table(frame: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pandas(frame, schema, preserve_index=False)


@contextmanager
def new_source_folder(out: Path, patients: Iterable[str], numbered: bool = True) -> Iterator[SourceFolder]:
    """A source folder that appears at ``out`` whole, or not at all. Raises Refusal OUTPUT_EXISTS."""
    fresh_folder(out, "folder")
    if out.is_dir():
        out.rmdir()  # empty; a rename needs the name free
    with atomic_path(out) as temporary:
        yield SourceFolder(temporary, patients, numbered)


def said(label: str, counts: Counter[str]) -> dict[str, dict[str, int]]:
    """Counts for a converter's result."""
    return {label: dict(sorted(counts.items()))}


if __name__ == "__main__":
    sys.exit("This file is shared by the converters; run one of datasets/*/convert.py")
