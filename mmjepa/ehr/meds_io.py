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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import meds
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from flexible_schema import PyArrowSchema
from flexible_schema.exceptions import SchemaValidationError, TableValidationError

from mmjepa.files import atomic_path, fresh_folder, write_json
from mmjepa.labels import check_labels, place_labels
from mmjepa.refusal import Refusal

SOURCE_FILE = "source.json"  # in the records of a cohort: the marks of the files that they were copied from


@dataclass(frozen=True)
class MedsRoot:
    """A MEDS root whose metadata has been read and checked.

    codes: every listed code, sorted. descriptions: code -> text, where known. splits: name -> ascending subject ids.
    notes: for people, what below ``data/`` is not read.
    """

    path: Path
    shards: tuple[Path, ...]
    codes: tuple[str, ...]
    descriptions: dict[str, str]
    splits: dict[str, np.ndarray]
    notes: tuple[str, ...] = ()

    def files(self) -> list[Path]:
        """Every file that decides the content: shards and metadata, sorted."""
        metadata = (self.path / "metadata").iterdir()
        return [*self.shards, *sorted(path for path in metadata if path.is_file() and not path.name.startswith("."))]

    def marks(self) -> dict[str, list[int]]:
        """Of every file its name in the root, and size, change time and inode change time, which a rewritten file does not keep."""
        stats = {path.relative_to(self.path).as_posix(): path.stat() for path in self.files()}
        return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats.items()}


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
    shards, notes = _shards(path / "data")
    if not shards:
        raise Refusal("MEDS_EMPTY", f"{path / 'data'} holds no .parquet file", "Export the events as MEDS 0.4 shards")
    codes, descriptions = _read_codes(listing)
    dataset = path / meds.dataset_metadata_filepath
    if dataset.is_file():
        _check_dataset(dataset)
    return MedsRoot(path, shards, codes, descriptions, _read_splits(path / meds.subject_splits_filepath), notes)


def read_table(path: Path, schema: type[PyArrowSchema], columns: list[str] | None = None) -> pa.Table:
    """Read one parquet file under a MEDS schema: time zones refused, then aligned, nulls checked.

    columns: read only these (those the file lacks are skipped); the types of all are checked.
    Raises Refusal: MEDS_UNREADABLE, MEDS_TIMEZONE, MEDS_SCHEMA.
    """
    with refusals(path, schema), open_parquet(path, schema) as file:
        known = file.schema_arrow.names
        return schema.align(file.read(columns=None if columns is None else [name for name in columns if name in known]))


def ingest_meds(source: Path | str, cohort: Path | str, *, labels: Path | str | None = None) -> dict[str, Any]:
    """Check the MEDS root of ``source`` (``source/ehr``, or ``source`` itself) and its labels, and put both into ``cohort``.

    labels: the folder of label tasks; ``source/labels`` by default, and none is fine.
    Files are copied byte for byte, so that a source that is written again later does not change the cohort; ``ehr/source.json``
    keeps the marks that tell so. Nothing existing is overwritten, and each folder appears whole or not at all. Returns counts:
    rows, static_rows, subjects, codes, splits, values_not_finite (infinite or too large: read as none), labels, label_casts where
    label values had to be cast (see ``mmjepa.labels``), and notes for people.
    Raises Refusal: the MEDS_* codes, LABELS_* and SURVIVAL_* codes, OUTPUT_EXISTS.
    """

    source, cohort = Path(source), Path(cohort)
    if not source.is_dir():
        raise Refusal("MEDS_MISSING", f"{source} is not a folder", "Name a folder with ehr/, or a MEDS root itself")
    root = open_root(source / "ehr" if (source / "ehr").is_dir() else source)
    labels = source / "labels" if labels is None else Path(labels)
    for name in ("ehr", "labels"):
        fresh_folder(cohort / name, "cohort")
    from mmjepa.ehr.shards import check_indices, index_shard, read_pieces

    marks = root.marks()
    indices = [index_shard(path) for path in root.shards]
    check_indices(root, indices)
    values = not_finite = 0
    for index in indices:
        for piece in read_pieces(root, index):
            values += int(np.isfinite(piece.values).sum())
            not_finite += int(piece.not_finite.sum())
    tasks = check_labels(labels)
    _place(marks, root.path, cohort / "ehr")
    labelled = place_labels(tasks, labels, cohort / "labels")
    splits = {name: len(ids) for name, ids in root.splits.items()}
    notes = [*root.notes, *_split_notes(root.splits, np.concatenate([index.subjects for index in indices]))]
    if not values:
        notes.append("no row has a numeric value: MEDS wants them in the column numeric_value")
    return {
        "rows": sum(int(index.ends[-1]) for index in indices),
        "static_rows": sum(int(index.static.sum()) for index in indices),
        "subjects": sum(len(index.subjects) for index in indices),
        "codes": len(root.codes),
        "splits": splits,
        "values_not_finite": not_finite,
        **labelled,
        "notes": notes,
    }


def _place(marks: dict[str, list[int]], source: Path, target: Path) -> None:
    if target.is_dir():  # empty, as fresh_folder has checked; a rename needs the name free
        target.rmdir()
    with atomic_path(target) as temporary:
        for name in marks:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, temporary / name)
        write_json(temporary / SOURCE_FILE, marks)


def _shards(data: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The parquet files below a folder, sorted, and notes of what else lies there.

    Links to folders are followed, each folder once. Names that begin with a dot are other systems' own.
    """
    shards, others, seen = [], 0, set()

    def stop(error: OSError) -> None:
        raise Refusal("MEDS_UNREADABLE", f"a folder below {data} cannot be read ({error.strerror})")

    for folder, folders, files in os.walk(data, followlinks=True, onerror=stop):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        others += sum(name.startswith(".") for name in (*folders, *files))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in (Path(folder, name) for name in files if not name.startswith(".")):
            if file.is_symlink() and not file.exists():
                raise Refusal("MEDS_UNREADABLE", f"a link below {data} leads nowhere", "Mount or copy what it names")
            if file.suffix == ".parquet":
                shards.append(file)
            else:
                others += 1
    notes = (
        (f"{others} entries below {data} are not read: they are hidden or do not end in .parquet",) if others else ()
    )
    return tuple(sorted(shards)), notes


def _split_notes(splits: dict[str, np.ndarray], subjects: np.ndarray) -> list[str]:
    """How many subjects have a split and no row, or rows and no split."""
    if not splits:
        return []
    listed = np.concatenate(list(splits.values()))
    counts = {
        "of metadata/subject_splits.parquet have no row": len(np.setdiff1d(listed, subjects)),
        "with rows are in no split": len(np.setdiff1d(subjects, listed)),
    }
    return [f"{count} subjects {what}" for what, count in counts.items() if count]


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
    ids, names = table["subject_id"].to_numpy(), np.asarray(table["split"].to_pylist(), dtype=object)
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
        raise Refusal("MEDS_SCHEMA", f"{path} does not fit DatasetMetadataSchema: {line(error)}") from None


@contextmanager
def refusals(path: Path, schema: type[PyArrowSchema]) -> Iterator[None]:
    """Turn what pyarrow and the schema raise over a file into refusals."""
    try:
        yield
    except (SchemaValidationError, TableValidationError, pa.ArrowTypeError) as error:
        known = ", ".join(f"{field.name} ({field.type})" for field in schema.schema())
        raise Refusal(
            "MEDS_SCHEMA", f"{path} does not fit: {line(error)}", f"MEDS 0.4 {schema.__name__} knows {known}"
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise Refusal("MEDS_UNREADABLE", f"{path} cannot be read ({line(error)})", "Copy or export it again") from None


def open_parquet(path: Path, schema: type[PyArrowSchema]) -> pq.ParquetFile:
    """Open a parquet file whose columns can take the types of the schema; to be used inside ``refusals``."""
    file = pq.ParquetFile(path)
    whole = file.schema_arrow
    zoned = [field.name for field in whole if pa.types.is_timestamp(field.type) and field.type.tz is not None]
    if zoned:
        raise Refusal(
            "MEDS_TIMEZONE",
            f"column {', '.join(zoned)} of {path} carries a time zone",
            "Write local clock times without a zone; a silent move to UTC would shift every hour",
        )
    schema.align(whole.empty_table())
    return file


def line(error: Exception) -> str:
    """The error in one line; long numbers, which could be identifiers, are masked."""
    return re.sub(r"\d{4,}", "#", " ".join(str(error).split()))
