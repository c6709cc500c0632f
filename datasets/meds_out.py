"""What the converters of records share: tables streamed with checks, and a MEDS 0.4 root written shard by shard.

Memory stays bounded: rows are spilled to one file a shard as they are read (a subject belongs to one shard), then each shard
is sorted by itself. The same input gives the same bytes. Run by path beside the converters, never a package.
"""

import gzip
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import meds
import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from mmjepa import __version__, keyed
from mmjepa.files import atomic_path, fresh_folder
from mmjepa.refusal import Refusal

pc: Any = pyarrow.compute  # its functions are made at import, where no type checker sees them
TIME = pa.timestamp("us")
EVENTS = pa.schema(
    [
        pa.field("subject_id", pa.int64(), nullable=False),
        pa.field("time", TIME),
        pa.field("code", pa.string(), nullable=False),
        pa.field("numeric_value", pa.float32()),
    ]
)
HOUR_US, DAY_US = 3_600_000_000, 86_400_000_000
SPLITS = (("train", 0.70), ("tuning", 0.85), ("held_out", 1.0))
_SHARD_BYTES, _MOST_SHARDS, _BLOCK_BYTES = 64 << 20, 512, 2 << 20
_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that appears at ``out`` whole, or not at all. Raises Refusal OUTPUT_EXISTS."""
    fresh_folder(out, "folder")
    if out.is_dir():
        out.rmdir()  # empty; a rename needs the name free
    with atomic_path(out) as temporary:
        temporary.mkdir(parents=True)
        yield temporary


def read_tables(path: Path, columns: dict[str, pa.DataType], optional: Sequence[str] = ()) -> Iterator[pa.Table]:
    """Stream the named columns of a csv (comma or tab, plain or .gz) or parquet file, in file order.

    Names are matched without regard to case; a column of ``optional`` that is absent comes as nulls; an empty cell is null.
    Raises Refusal SOURCE_COLUMNS, SOURCE_VALUE (a cell of another type), SOURCE_UNREADABLE.
    """
    names, batches = _open(path, columns)
    absent = [name for name in columns if name not in names and name not in optional]
    if absent:
        raise Refusal("SOURCE_COLUMNS", f"{path} has no column {', '.join(absent)}", "Is it another version or table?")
    try:
        for batch in batches:
            arrays = [
                _cast(batch.column(names[name]), kind, name, path) if name in names else pa.nulls(len(batch), kind)
                for name, kind in columns.items()
            ]
            yield pa.table(arrays, names=list(columns))
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _cast(array: pa.Array, kind: pa.DataType, name: str, path: Path) -> pa.Array:
    try:
        return array.cast(kind)
    except pa.ArrowException:
        raise Refusal("SOURCE_VALUE", f"{name} of {path} holds a value that is not a {kind}") from None


def _open(path: Path, columns: dict[str, pa.DataType]) -> tuple[dict[str, int], Iterable[pa.RecordBatch]]:
    """Lower-case name -> place of the column among those read, and the batches."""
    try:
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            chosen = [name for name in file.schema_arrow.names if name.lower() in columns]
            return _places(chosen), file.iter_batches(columns=chosen)
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as handle:
            header = handle.readline().decode("utf-8-sig").rstrip("\r\n")
        tab = "\t" in header
        # The tab-separated vocabularies of OHDSI hold bare quotation marks.
        parse = pa_csv.ParseOptions(delimiter="\t" if tab else ",", quote_char=False if tab else '"')
        listed = header.split("\t") if tab else [name.strip('"') for name in header.split(",")]
        chosen = [name for name in listed if name.lower() in columns]
        options = pa_csv.ConvertOptions(
            include_columns=chosen,
            column_types={name: columns[name.lower()] for name in chosen},
            null_values=[""],
            strings_can_be_null=True,
        )
        read = pa_csv.ReadOptions(block_size=_BLOCK_BYTES)
        stream = pa.input_stream(str(path), compression="gzip" if path.suffix == ".gz" else None)
        if not chosen:
            return {}, ()
        return _places(chosen), pa_csv.open_csv(stream, read, parse, options)
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _places(chosen: list[str]) -> dict[str, int]:
    return {name.lower(): place for place, name in enumerate(chosen)}


def _unreadable(path: Path, error: Exception) -> Refusal:
    """Arrow's message quotes the cell: only the number of its column is taken from it."""
    found = re.search(r"column #(\d+):.*CSV conversion error to ([^:]+):", str(error), re.DOTALL)
    if found:
        place, kind = int(found[1]) + 1, found[2]
        return Refusal("SOURCE_VALUE", f"column {place} of {path} holds a value that is not a {kind}")
    return Refusal("SOURCE_UNREADABLE", f"{path} cannot be read as a table", "Copy or export it again")


def numbers(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text cells that spell a number as float32, else null."""
    spelled = pc.match_substring_regex(text, _NUMBER)
    return pc.cast(pc.utf8_trim_whitespace(pc.if_else(spelled, text, None)), pa.float64()).cast(pa.float32())


def shard_count(paths: Iterable[Path]) -> int:
    """How many shards keep each below some 64 MiB of source text (a tenth of that, compressed)."""
    size = sum(path.stat().st_size * (1 if path.suffix == ".csv" else 10) for path in paths)
    return max(1, min(_MOST_SHARDS, -(-size // _SHARD_BYTES)))


class MedsOut:
    """A MEDS root being written under ``folder``.

    columns: extra columns of the data, by name. finish: called with the rows of each shard before they are sorted; it may fill
    and drop columns. Rows of one moment keep the order in which they were added.
    """

    def __init__(
        self,
        folder: Path,
        shards: int,
        columns: dict[str, pa.DataType] | None = None,
        finish: Callable[[pa.Table], pa.Table] | None = None,
    ) -> None:
        self.folder, self.shards, self.finish = folder, shards, finish
        self.schema = EVENTS
        for name, kind in (columns or {}).items():
            self.schema = self.schema.append(pa.field(name, kind))
        self._spill = folder / ".spill"
        self._files: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        self._spill.mkdir(parents=True)
        (folder / "data").mkdir()
        (folder / "metadata").mkdir()

    def add(self, **columns: Any) -> None:
        """Rows by column: arrays, or one value for all; a column not named is null. Raises Refusal SOURCE_VALUE: no subject."""
        length = next(
            len(value) for value in columns.values() if hasattr(value, "__len__") and not isinstance(value, str)
        )
        arrays = [_column(columns.get(field.name), field.type, length) for field in self.schema]
        table = pa.Table.from_arrays(arrays, schema=self.schema)
        if table["subject_id"].null_count or table["code"].null_count:
            raise Refusal("SOURCE_VALUE", "a row without a subject or without a code reached the output")
        shard = table["subject_id"].to_numpy() % self.shards
        order = np.argsort(shard, kind="stable")
        table, bounds = table.take(order), np.searchsorted(shard[order], np.arange(self.shards + 1))
        for k in np.flatnonzero(np.diff(bounds)).tolist():
            if k not in self._files:
                self._files[k] = pa.ipc.new_stream(str(self._spill / str(k)), self.schema)
            self._files[k].write_table(table.slice(bounds[k], bounds[k + 1] - bounds[k]))

    def close(
        self, name: str, describe: Callable[[str], str | None], split_of: dict[int, str] | None = None
    ) -> dict[str, int]:
        """Sort and write the shards, then ``metadata/``; returns rows, static_rows, subjects and codes.

        split_of: each subject's split; by default drawn by hash. Raises Refusal MEDS_EMPTY.
        """
        counts = {"rows": 0, "static_rows": 0, "subjects": 0, "codes": 0}
        codes: set[str] = set()
        subjects: set[int] = set()
        for k in sorted(self._files):
            self._files[k].close()
            with pa.memory_map(str(self._spill / str(k))) as source:
                table = pa.ipc.open_stream(source).read_all()
                table = sort_rows(self.finish(table) if self.finish else table)
                pq.write_table(table, self.folder / "data" / f"{k:04d}.parquet")
            codes.update(pc.unique(table["code"]).to_pylist())
            subjects.update(pc.unique(table["subject_id"]).to_pylist())
            counts["rows"] += len(table)
            counts["static_rows"] += table["time"].null_count
        shutil.rmtree(self._spill)
        if not counts["rows"]:
            raise Refusal("MEDS_EMPTY", "the source gives no event", "The card says how it is laid out")
        write_codes(self.folder, {code: describe(code) for code in codes})
        write_facts(self.folder, name)
        drawn = split_of if split_of is not None else {subject: draw_split(name, subject) for subject in subjects}
        write_splits(self.folder, {subject: split for subject, split in drawn.items() if subject in subjects})
        return counts | {"subjects": len(subjects), "codes": len(codes)}


def _column(value: Any, kind: pa.DataType, length: int) -> pa.Array | pa.ChunkedArray:
    if value is None or isinstance(value, (str, int, float, bool)):
        return pa.nulls(length, kind) if value is None else pa.repeat(pa.scalar(value, kind), length)
    array = value if isinstance(value, (pa.Array, pa.ChunkedArray)) else pa.array(value)
    if pa.types.is_floating(kind):
        array = pc.if_else(pc.is_finite(array), array, None)
    return array.cast(kind)


def sort_rows(table: pa.Table) -> pa.Table:
    """The rows by subject and time, static rows first; rows of one moment keep their order."""
    times = pc.fill_null(table["time"].cast(pa.int64()), np.iinfo(np.int64).min).to_numpy()
    return table.take(np.lexsort((times, table["subject_id"].to_numpy())))


def draw_split(name: str, subject: int) -> str:
    """train (70 %), tuning (15 %) or held_out (15 %), by a hash of the source's name and the subject alone."""
    share = keyed.key_words("split", name, subject)[0] / 2**32
    return next(split for split, limit in SPLITS if share < limit)


def write_codes(root: Path, described: dict[str, str | None]) -> None:
    """``metadata/codes.parquet``."""
    rows = [{"code": code, "description": described[code], "parent_codes": None} for code in sorted(described)]
    pq.write_table(pa.Table.from_pylist(rows, meds.CodeMetadataSchema.schema()), root / meds.code_metadata_filepath)


def write_facts(root: Path, name: str) -> None:
    """``metadata/dataset.json``."""
    facts = {"dataset_name": name, "etl_name": f"mmjepa datasets/{name}", "etl_version": __version__}
    (root / meds.dataset_metadata_filepath).write_text(json.dumps(facts | {"meds_version": "0.4"}) + "\n")


def write_splits(root: Path, split_of: dict[int, str]) -> None:
    """``metadata/subject_splits.parquet``."""
    rows = [{"subject_id": subject, "split": split} for subject, split in sorted(split_of.items())]
    pq.write_table(pa.Table.from_pylist(rows, meds.SubjectSplitSchema.schema()), root / meds.subject_splits_filepath)


def write_labels(folder: Path, task: str, subjects: Any, times: Any, values: Any, kind: str = "boolean_value") -> int:
    """``labels/<task>/0.parquet``, sorted; nothing is written for no row. Returns the number of rows.

    times: inclusive end of usable data. kind: the MEDS value column.
    """
    types = {"boolean_value": pa.bool_(), "integer_value": pa.int64(), "float_value": pa.float32()}
    keys = [("subject_id", pa.int64()), ("prediction_time", TIME), (kind, types[kind])]
    schema = pa.schema([pa.field(name, type_, nullable=False) for name, type_ in keys])
    arrays = [
        _column(value, type_, len(values)) for value, (_, type_) in zip((subjects, times, values), keys, strict=True)
    ]
    table = pa.Table.from_arrays(arrays, schema=schema)
    if len(table):
        table = table.sort_by([("subject_id", "ascending"), ("prediction_time", "ascending")])
        (folder / "labels" / task).mkdir(parents=True)
        pq.write_table(table, folder / "labels" / task / "0.parquet")
    return len(table)
