"""MEDS 0.4 in: find a root, read its shards, and refuse what the format forbids before anything is built on it.

The ``meds`` package checks columns and types; it passes unsorted rows and subjects in several runs, and it silently
moves a time-zone aware time to UTC. So a time zone is refused first, then the table is aligned, then order, contiguity
and listed codes are checked here. Rows are counted from 0; no subject id is ever named.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import meds
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from flexible_schema import PyArrowSchema
from flexible_schema.exceptions import SchemaValidationError, TableValidationError

from mmjepa.files import atomic_path, fresh_folder
from mmjepa.refusal import Refusal

#: Columns beyond the MEDS core that this project reads where a source has them.
EXTRA_COLUMNS = ("available_time", "hadm_id", "image_id")


@dataclass(frozen=True)
class MedsRoot:
    """A MEDS root whose metadata has been read and checked.

    codes: every listed code, sorted. descriptions: code -> text, where known. splits: name -> ascending subject ids.
    """

    path: Path
    shards: tuple[Path, ...]
    codes: tuple[str, ...]
    descriptions: dict[str, str]
    splits: dict[str, np.ndarray]

    def files(self) -> list[Path]:
        """Every file that decides the content: shards and metadata, sorted."""
        metadata = sorted(path for path in (self.path / "metadata").iterdir() if path.is_file())
        return [*self.shards, *metadata]


@dataclass(frozen=True)
class Shard:
    """One checked shard: rows as read, and where each subject's run lies.

    codes: int32 [rows] into ``MedsRoot.codes``. times_us, available_us: int64 [rows], 0 where ``static`` (null time).
    values: float32 [rows], NaN = none. hadm_id: int64 [rows], -1 = none; None without the column. run_subjects, run_starts, run_lengths: int64 [runs].
    images: row of this shard -> image_id.
    """

    codes: np.ndarray
    times_us: np.ndarray
    available_us: np.ndarray
    values: np.ndarray
    hadm_id: np.ndarray | None
    static: np.ndarray
    images: dict[int, str]
    run_subjects: np.ndarray
    run_starts: np.ndarray
    run_lengths: np.ndarray


def open_root(path: Path | str) -> MedsRoot:
    """Find the shards under ``path`` and read its metadata.

    Raises Refusal: MEDS_MISSING, MEDS_EMPTY, MEDS_UNREADABLE, MEDS_SCHEMA.
    """
    path = Path(path)
    if not path.is_dir():
        raise Refusal("MEDS_MISSING", f"{path} is not a folder", "Name a MEDS root: a folder with data/ and metadata/")
    listing = path / "metadata" / "codes.parquet"
    for part, found in (("data/", (path / "data").is_dir()), ("metadata/codes.parquet", listing.is_file())):
        if not found:
            raise Refusal("MEDS_MISSING", f"{path} has no {part}", "A MEDS root holds data/ and metadata/codes.parquet")
    shards = tuple(sorted((path / "data").rglob("*.parquet")))
    if not shards:
        raise Refusal("MEDS_EMPTY", f"{path / 'data'} holds no .parquet file", "Export the events as MEDS 0.4 shards")
    codes, descriptions = _read_codes(listing)
    dataset = path / meds.dataset_metadata_filepath
    if dataset.is_file():
        _check_dataset(dataset)
    return MedsRoot(path, shards, codes, descriptions, _read_splits(path / meds.subject_splits_filepath))


def read_table(path: Path, schema: type[PyArrowSchema], columns: list[str] | None = None) -> pa.Table:
    """Read one parquet file under a MEDS schema: time zones refused, then aligned, nulls checked.

    columns: read only these (those the file lacks are skipped); the types of all are checked.
    Raises Refusal: MEDS_UNREADABLE, MEDS_TIMEZONE, MEDS_SCHEMA.
    """
    try:
        with pq.ParquetFile(path) as file:
            whole = file.schema_arrow
            wanted = None if columns is None else [name for name in columns if name in whole.names]
            zoned = [field.name for field in whole if pa.types.is_timestamp(field.type) and field.type.tz is not None]
            if zoned:
                raise Refusal(
                    "MEDS_TIMEZONE",
                    f"column {', '.join(zoned)} of {path} carries a time zone",
                    "Write local clock times without a zone; a silent move to UTC would shift every hour",
                )
            schema.align(whole.empty_table())
            table = file.read(columns=wanted)
        return schema.align(table)
    except (SchemaValidationError, TableValidationError, pa.ArrowTypeError) as error:
        hint = (
            f"MEDS 0.4 {schema.__name__} knows {', '.join(f'{field.name} ({field.type})' for field in schema.schema())}"
        )
        raise Refusal("MEDS_SCHEMA", f"{path} does not fit: {_line(error)}", hint) from None
    except (pa.ArrowException, OSError) as error:
        raise Refusal("MEDS_UNREADABLE", f"{path} cannot be read ({_line(error)})", "Copy or export it again") from None


def read_shard(root: MedsRoot, path: Path) -> Shard:
    """Read and check one shard.

    Raises Refusal: MEDS_UNREADABLE, MEDS_TIMEZONE, MEDS_SCHEMA, MEDS_UNSORTED, MEDS_CODE_UNLISTED.
    """
    core = ["subject_id", "time", "code", "numeric_value"]
    table = read_table(path, meds.DataSchema, [*core, *EXTRA_COLUMNS])
    static = _numpy(table["time"].is_null())
    times = _microseconds(table["time"], path)
    starts, subjects = _runs(_numpy(table["subject_id"]), path)
    lengths = np.diff(np.append(starts, table.num_rows))
    _check_order(times, static, np.repeat(np.arange(len(starts)), lengths), path)
    available = times
    if "available_time" in table.column_names:
        given = ~_numpy(table["available_time"].is_null())
        if (given & static).any():
            raise Refusal(
                "MEDS_SCHEMA",
                f"row {np.argmax(given & static)} of {path} has an available_time but no time",
                "A static row is visible always: give it a time, or leave its available_time null",
            )
        available = np.where(given, _microseconds(table["available_time"], path), times)
    values = np.full(table.num_rows, np.nan, np.float32)
    if "numeric_value" in table.column_names:
        values = _numpy(pc.fill_null(table["numeric_value"], float("nan"))).astype(np.float32, copy=False)
    return Shard(
        codes=_code_indices(root, table["code"], path),
        times_us=times,
        available_us=available,
        values=values,
        hadm_id=_admissions(table, path),
        static=static,
        images=_images(table),
        run_subjects=subjects,
        run_starts=starts,
        run_lengths=lengths,
    )


def read_shards(root: MedsRoot) -> Iterator[Shard]:
    """Read and check all shards in path order; MEDS_SUBJECT_SPLIT_FILES when a subject lies in two, MEDS_EMPTY when all are empty."""
    seen = np.zeros(0, np.int64)
    for path in root.shards:
        shard = read_shard(root, path)
        again = np.isin(shard.run_subjects, seen)
        if again.any():
            row = shard.run_starts[np.argmax(again)]
            raise Refusal(
                "MEDS_SUBJECT_SPLIT_FILES",
                f"the subject at row {row} of {path} also has rows in an earlier shard",
                "Keep all rows of a subject in one file",
            )
        seen = np.concatenate([seen, shard.run_subjects])
        yield shard
    if not len(seen):
        raise Refusal("MEDS_EMPTY", f"the shards of {root.path} hold no row", "Export the events as MEDS 0.4 shards")


def ingest_meds(source: Path | str, cohort: Path | str, *, labels: Path | str | None = None) -> dict[str, Any]:
    """Check the MEDS root of ``source`` (``source/ehr``, or ``source`` itself) and its labels, and put both into ``cohort``.

    labels: the folder of label tasks; ``source/labels`` by default, and none is fine.
    Files are hard-linked where the disk allows it, else copied: byte-equal either way. Nothing existing is overwritten,
    and each folder appears whole or not at all. Returns counts: rows, static_rows, subjects, codes, splits, labels.
    Raises Refusal: the MEDS_* codes, LABELS_* codes, OUTPUT_EXISTS.
    """
    from mmjepa.cohort import read_labels, task_names

    source, cohort = Path(source), Path(cohort)
    if not source.is_dir():
        raise Refusal("MEDS_MISSING", f"{source} is not a folder", "Name a folder with ehr/, or a MEDS root itself")
    root = open_root(source / "ehr" if (source / "ehr").is_dir() else source)
    labels = source / "labels" if labels is None else Path(labels)
    for name in ("ehr", "labels"):
        fresh_folder(cohort / name, "cohort")
    rows = static = subjects = 0
    for shard in read_shards(root):
        rows, static = rows + len(shard.codes), static + int(shard.static.sum())
        subjects += len(shard.run_subjects)
    counts = {name: len(read_labels(labels, name)) for name in task_names(labels)}
    _place([path.relative_to(root.path) for path in root.files()], root.path, cohort / "ehr")
    if counts:
        files = [path for name in counts for path in sorted((labels / name).rglob("*.parquet"))]
        _place([path.relative_to(labels) for path in files], labels, cohort / "labels")
    splits = {name: len(ids) for name, ids in root.splits.items()}
    return {
        "rows": rows,
        "static_rows": static,
        "subjects": subjects,
        "codes": len(root.codes),
        "splits": splits,
        "labels": counts,
    }


def _place(files: list[Path], source: Path, target: Path) -> None:
    if target.is_dir():  # empty, as fresh_folder has checked; a rename needs the name free
        target.rmdir()
    with atomic_path(target) as temporary:
        for file in files:
            (temporary / file).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source / file, temporary / file)
            except OSError:
                shutil.copyfile(source / file, temporary / file)


def _read_codes(path: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    table = read_table(path, meds.CodeMetadataSchema, ["code", "description"])
    codes = table["code"].to_pylist()
    texts = table["description"].to_pylist() if "description" in table.column_names else [None] * len(codes)
    described = {code: text.strip() for code, text in zip(codes, texts, strict=True) if text and text.strip()}
    return tuple(sorted(set(codes))), described


def _read_splits(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    table = read_table(path, meds.SubjectSplitSchema)
    ids, names = _numpy(table["subject_id"]), np.asarray(table["split"].to_pylist(), dtype=object)
    if len(np.unique(ids)) != len(ids):
        raise Refusal("MEDS_SCHEMA", f"{path} lists a subject twice", "Give every subject one split")
    return {name: np.sort(ids[names == name]) for name in sorted(set(names))}


def _check_dataset(path: Path) -> None:
    try:
        dataset = json.loads(path.read_text())
    except ValueError as error:
        raise Refusal("MEDS_UNREADABLE", f"{path} is not valid JSON ({error})", "Write it again") from None
    try:
        if not isinstance(dataset, dict):
            raise ValueError(f"it holds a {type(dataset).__name__}, want an object")
        meds.DatasetMetadataSchema.validate(dataset)
    except (SchemaValidationError, TableValidationError, ValueError) as error:
        raise Refusal("MEDS_SCHEMA", f"{path} does not fit DatasetMetadataSchema: {_line(error)}") from None


def _runs(subjects: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
    starts = np.flatnonzero(np.diff(subjects, prepend=subjects[:1] - 1)).astype(np.int64)
    ids = subjects[starts]
    first = np.unique(ids, return_index=True)[1]
    if len(first) != len(ids):
        row = starts[np.setdiff1d(np.arange(len(ids)), first)[0]]
        raise Refusal(
            "MEDS_UNSORTED",
            f"row {row} of {path} returns to a subject whose rows ended before",
            "Keep the rows of a subject together, sorted by time",
        )
    return starts, ids


def _check_order(times: np.ndarray, static: np.ndarray, run: np.ndarray, path: Path) -> None:
    timed = np.flatnonzero(~static)
    earlier = (np.diff(times[timed]) < 0) & (np.diff(run[timed]) == 0)
    if earlier.any():
        raise Refusal(
            "MEDS_UNSORTED",
            f"row {timed[np.argmax(earlier) + 1]} of {path} is earlier than the row before it",
            "Sort the rows of every subject by time",
        )


def _code_indices(root: MedsRoot, column: pa.ChunkedArray, path: Path) -> np.ndarray:
    positions = pc.call_function("index_in", [column], pc.SetLookupOptions(value_set=pa.array(root.codes, pa.string())))
    unlisted = _numpy(positions.is_null())
    if unlisted.any():
        row = int(np.argmax(unlisted))
        raise Refusal(
            "MEDS_CODE_UNLISTED",
            f"the code '{column[row].as_py()}' (row {row} of {path}) is not in metadata/codes.parquet",
            "List every code of the data there",
        )
    return _numpy(positions).astype(np.int32, copy=False)


def _admissions(table: pa.Table, path: Path) -> np.ndarray | None:
    if "hadm_id" not in table.column_names:
        return None
    try:
        return _numpy(pc.fill_null(table["hadm_id"].cast(pa.int64()), -1))
    except pa.ArrowException as error:
        raise Refusal("MEDS_SCHEMA", f"hadm_id of {path} is not a whole number ({_line(error)})") from None


def _images(table: pa.Table) -> dict[int, str]:
    if "image_id" not in table.column_names:
        return {}
    rows = np.flatnonzero(~_numpy(table["image_id"].is_null()))
    return {int(row): str(image) for row, image in zip(rows, table["image_id"].take(rows).to_pylist(), strict=True)}


def _microseconds(column: pa.ChunkedArray, path: Path) -> np.ndarray:
    try:
        column = column.cast(pa.timestamp("us"))
    except pa.ArrowException as error:
        raise Refusal("MEDS_SCHEMA", f"a time column of {path} is not a timestamp ({_line(error)})") from None
    return _numpy(pc.fill_null(column.cast(pa.int64()), 0))


def _numpy(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy()


def _line(error: Exception) -> str:
    """The error in one line; long numbers, which could be identifiers, are masked."""
    return re.sub(r"\d{4,}", "#", " ".join(str(error).split()))
