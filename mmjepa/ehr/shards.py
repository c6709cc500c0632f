"""The rows of MEDS shards, read in pieces of whole subjects so that memory does not grow with the file.

Order, contiguity and listed codes are checked on the way (the ``meds`` package passes unsorted rows and subjects in
several runs). Rows are counted from 0; no subject id is ever named.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import meds
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmjepa.ehr.meds_io import MedsRoot, line, open_parquet, refusals
from mmjepa.refusal import Refusal

#: Columns beyond the MEDS core that this project reads where a source has them.
EXTRA_COLUMNS = ("available_time", "hadm_id", "image_id")
CORE_COLUMNS = ("subject_id", "time", "code", "numeric_value")
BATCH_ROWS, PIECE_ROWS = 1 << 18, 1 << 20  # rows read at once, rows held at once


@dataclass(frozen=True)
class ShardIndex:
    """Where the subjects of one shard lie, its order checked.

    subjects: int64 [n] in the order of the file. ends: int64 [n + 1]; rows ``ends[i]:ends[i + 1]`` are subject i's.
    static: int64 [n], how many of them have no time. columns: the columns of the file that are read.
    """

    path: Path
    subjects: np.ndarray
    ends: np.ndarray
    static: np.ndarray
    columns: tuple[str, ...]

    def pieces(self) -> np.ndarray:
        """Subjects at which the shard is cut into pieces of at most PIECE_ROWS rows, or of one subject: int64 [pieces + 1]."""
        cuts = [0]
        while cuts[-1] < len(self.subjects):
            reach = int(np.searchsorted(self.ends, self.ends[cuts[-1]] + PIECE_ROWS, side="right")) - 1
            cuts.append(max(reach, cuts[-1] + 1))
        return np.array(cuts, np.int64)


@dataclass(frozen=True)
class Piece:
    """Checked rows of some whole subjects of a shard, as they lie in the file.

    codes: int32 [rows] into ``MedsRoot.codes``. times_us, available_us: int64 [rows], 0 where ``static`` (null time).
    values: float32 [rows], NaN = none. not_finite: bool [rows], whose value is none because float32 cannot hold it (infinite or
    too large). hadm_id: int64 [rows], -1 = none; None without the column.
    images: row of this piece -> image_id. subjects: int64 [n]. ends: int64 [n + 1], as in ``ShardIndex``, from 0.
    """

    codes: np.ndarray
    times_us: np.ndarray
    available_us: np.ndarray
    values: np.ndarray
    not_finite: np.ndarray
    hadm_id: np.ndarray | None
    static: np.ndarray
    images: dict[int, str]
    subjects: np.ndarray
    ends: np.ndarray


def index_shard(path: Path) -> ShardIndex:
    """Find the subjects of a shard and check their order, one batch of rows in memory at a time.

    Raises Refusal: MEDS_UNREADABLE, MEDS_TIMEZONE, MEDS_SCHEMA, MEDS_UNSORTED.
    """
    with refusals(path, meds.DataSchema), open_parquet(path, meds.DataSchema) as file:
        known = set(file.schema_arrow.names)
    subjects, starts, static = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    rows, runs, last, stamp = 0, 0, np.zeros(0, np.int64), np.zeros(0, np.int64)
    for first, batch in _batches(path, ("subject_id", "time")):
        subject, (times, timeless) = _subjects(batch, path, first), _times(batch["time"], path)
        fresh = np.append(len(last) == 0 or subject[0] != last[0], subject[1:] != subject[:-1])
        run = runs - 1 + np.cumsum(fresh)
        starts.append(first + np.flatnonzero(fresh))
        subjects.append(subject[fresh])
        static.append(run[timeless])
        stamp = _check_order(times, run, np.flatnonzero(~timeless), stamp, path, first)
        rows, runs, last = first + len(subject), int(run[-1]) + 1, subject[-1:]
    ids, begins = np.concatenate(subjects), np.concatenate(starts)
    _check_runs(ids, begins, path)
    columns = tuple(name for name in (*CORE_COLUMNS, *EXTRA_COLUMNS) if name in known)
    return ShardIndex(path, ids, np.append(begins, rows), np.bincount(np.concatenate(static), minlength=runs), columns)


def check_indices(root: MedsRoot, indices: Sequence[ShardIndex]) -> None:
    """Raise MEDS_SUBJECT_SPLIT_FILES when a subject lies in two shards, MEDS_EMPTY when all shards are empty."""
    subjects = np.concatenate([index.subjects for index in indices])
    if not len(subjects):
        raise Refusal("MEDS_EMPTY", f"the shards of {root.path} hold no row", "Export the events as MEDS 0.4 shards")
    order = np.argsort(subjects, kind="stable")
    again = order[1:][np.diff(subjects[order]) == 0]
    if len(again):
        first = np.cumsum([0, *(len(index.subjects) for index in indices)])
        shard = int(np.searchsorted(first, again.min(), side="right")) - 1
        row = indices[shard].ends[again.min() - first[shard]]
        raise Refusal(
            "MEDS_SUBJECT_SPLIT_FILES",
            f"the subject at row {row} of {indices[shard].path} also has rows in an earlier shard",
            "Keep all rows of a subject in one file",
        )


def read_pieces(root: MedsRoot, index: ShardIndex, first: int = 0) -> Iterator[Piece]:
    """Read and check the pieces of a shard, from number ``first`` on; memory holds one piece and one batch.

    Raises Refusal: MEDS_UNREADABLE, MEDS_SCHEMA, MEDS_CODE_UNLISTED.
    """
    cuts = index.pieces()[first:]
    held: list[_Batch] = []
    batches = _decoded(root, index, int(index.ends[cuts[0]]))
    for one, other in pairwise(cuts.tolist()):
        low, high = int(index.ends[one]), int(index.ends[other])
        while not held or held[-1].stop < high:
            held.append(next(batches))
        parts = [{name: x[max(low - b.start, 0) : high - b.start] for name, x in b.columns.items()} for b in held]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        images = {row - low: image for b in held for row, image in b.images.items() if low <= row < high}
        held = [b for b in held if b.stop > high]
        hadm_id = joined.pop("hadm_id", None)
        joined.setdefault("available_us", joined["times_us"])
        yield Piece(
            **joined,
            hadm_id=hadm_id,
            images=images,
            subjects=index.subjects[one:other],
            ends=index.ends[one : other + 1] - low,
        )


@dataclass(frozen=True)
class _Batch:
    """Rows start:stop of a file: columns, and row of the file -> image_id."""

    start: int
    stop: int
    columns: dict[str, np.ndarray]
    images: dict[int, str]


def _batches(path: Path, columns: tuple[str, ...], row: int = 0) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(number of its first row, batch) from the row group on that holds ``row``; codes come as dictionaries.

    Pages are streamed, so that a row group of any size takes no more memory than a small one.
    """
    with (
        refusals(path, meds.DataSchema),
        pq.ParquetFile(path, read_dictionary=("code",), buffer_size=1 << 20, pre_buffer=False) as file,
    ):
        ends = np.cumsum([0, *(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))])
        group = int(np.searchsorted(ends[1:], row, side="right"))
        at, groups = int(ends[min(group, len(ends) - 1)]), range(group, file.num_row_groups)
        for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=list(columns), use_threads=False):
            if batch.num_rows:
                yield at, batch
            at += batch.num_rows


def _decoded(root: MedsRoot, index: ShardIndex, row: int) -> Iterator[_Batch]:
    """The batches of a shard, checked, from the row group on that holds ``row``."""
    path, listed = index.path, pa.array(root.codes, pa.string())
    names = tuple(name for name in index.columns if name != "subject_id")
    for start, batch in _batches(path, names, row):
        times, static = _times(batch["time"], path)
        columns = {"codes": _codes(batch, listed, path, start), "times_us": times, "static": static}
        columns["values"] = np.full(len(static), np.nan, np.float32)
        if "numeric_value" in names:
            columns["values"] = _cast(batch, "numeric_value", pa.float32(), path).to_numpy(zero_copy_only=False)
        columns["not_finite"] = np.isinf(columns["values"])
        columns["values"] = np.where(columns["not_finite"], np.float32(np.nan), columns["values"])
        if "available_time" in names:
            columns["available_us"] = _available(batch["available_time"], times, static, path, start)
        if "hadm_id" in names:
            columns["hadm_id"] = pc.fill_null(_cast(batch, "hadm_id", pa.int64(), path), -1).to_numpy()
        images = {}
        if "image_id" in names:
            ids = _cast(batch, "image_id", pa.string(), path)
            rows = np.flatnonzero(ids.is_valid().to_numpy(zero_copy_only=False))
            images = dict(zip((start + rows).tolist(), ids.take(pa.array(rows)).to_pylist(), strict=True))
        yield _Batch(start, start + len(static), columns, images)


def _cast(batch: pa.RecordBatch, name: str, kind: pa.DataType, path: Path) -> pa.Array:
    column = batch[name]
    if pa.types.is_integer(kind) and pa.types.is_floating(column.type):  # whole numbers with gaps, as pandas has them
        column = pc.call_function(
            "if_else", [pc.call_function("is_nan", [column]), pa.scalar(None, column.type), column]
        )
    try:
        return column.cast(kind)
    except pa.ArrowException as error:
        raise Refusal("MEDS_SCHEMA", f"column {name} of {path} is not of type {kind} ({line(error)})") from None


def _subjects(batch: pa.RecordBatch, path: Path, row: int) -> np.ndarray:
    ids = _cast(batch, "subject_id", pa.int64(), path)
    _check_nulls(ids, "subject_id", path, row)
    return ids.to_numpy()


def _check_nulls(column: pa.Array, name: str, path: Path, row: int) -> None:
    if column.null_count:
        at = row + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise Refusal("MEDS_SCHEMA", f"row {at} of {path} has no {name}", "MEDS wants one in every row")


def _times(column: pa.Array, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """int64 microseconds, 0 where null; where null."""
    try:
        whole = column.cast(pa.timestamp("us")).cast(pa.int64())
    except pa.ArrowException as error:
        raise Refusal("MEDS_SCHEMA", f"a time column of {path} is not a timestamp ({line(error)})") from None
    return pc.fill_null(whole, 0).to_numpy(), whole.is_null().to_numpy(zero_copy_only=False)


def _available(column: pa.Array, times: np.ndarray, static: np.ndarray, path: Path, row: int) -> np.ndarray:
    available, silent = _times(column, path)
    if (~silent & static).any():
        raise Refusal(
            "MEDS_SCHEMA",
            f"row {row + np.argmax(~silent & static)} of {path} has an available_time but no time",
            "A static row is visible always: give it a time, or leave its available_time null",
        )
    return np.where(silent, times, available)


def _codes(batch: pa.RecordBatch, listed: pa.Array, path: Path, row: int) -> np.ndarray:
    """int32 indices into the listed codes: each distinct code of the batch is looked up once."""
    column = batch["code"]
    column = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    _check_nulls(column, "code", path, row)
    found = pc.call_function("index_in", [column.dictionary.cast(pa.string())], pc.SetLookupOptions(listed))
    codes = pc.fill_null(found, -1).to_numpy()[column.indices.to_numpy()]
    if found.null_count and (codes < 0).any():
        at = int(np.argmax(codes < 0))
        raise Refusal(
            "MEDS_CODE_UNLISTED",
            f"the code '{column[at].as_py()}' (row {row + at} of {path}) is not in metadata/codes.parquet",
            "List every code of the data there",
        )
    return codes


def _check_order(
    times: np.ndarray, run: np.ndarray, timed: np.ndarray, before: np.ndarray, path: Path, row: int
) -> np.ndarray:
    """Check that times ascend inside each run, also from the (time, run) ``before`` this batch; returns its own last one."""
    stamps, runs = np.append(before[:1], times[timed]), np.append(before[1:], run[timed])
    earlier = (stamps[1:] < stamps[:-1]) & (runs[1:] == runs[:-1])
    if earlier.any():
        raise Refusal(
            "MEDS_UNSORTED",
            f"row {row + timed[np.argmax(earlier) + 1 - len(before[:1])]} of {path} is earlier than the row before it",
            "Sort the rows of every subject by time",
        )
    return np.array([stamps[-1], runs[-1]]) if len(stamps) else before


def _check_runs(subjects: np.ndarray, starts: np.ndarray, path: Path) -> None:
    first = np.unique(subjects, return_index=True)[1]
    if len(first) != len(subjects):
        row = starts[np.setdiff1d(np.arange(len(subjects)), first)[0]]
        raise Refusal(
            "MEDS_UNSORTED",
            f"row {row} of {path} returns to a subject whose rows ended before",
            "Keep the rows of a subject together, sorted by time",
        )
