"""Embedding, score and label tables: read with every check, written whole, joined on (subject_id, prediction_time)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mmjepa.files import atomic_path, read_json, sha256, write_json
from mmjepa.refusal import Refusal

SPLITS = ("train", "tuning", "held_out")
ScoreKind = Literal["log_odds", "probability"]


@dataclass(frozen=True)
class EmbeddingTable:
    """Embeddings of n rows, each of one subject at one time.

    subject_id: int64 [n]. prediction_time: datetime64[us] [n]. z: float32 [n, D].
    split: text [n] (``train``, ``tuning``, ``held_out``) or None. facts: what the json beside the file says.
    Raises Refusal ``TABLE_SHAPE``, ``TABLE_NOT_FINITE``, ``TABLE_DUPLICATE``, ``TABLE_SPLIT``, ``SPLIT_OVERLAP``.
    """

    subject_id: np.ndarray
    prediction_time: np.ndarray
    z: np.ndarray
    split: np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen; this only fixes the types once
        set_field(self, "subject_id", np.asarray(self.subject_id, np.int64))
        set_field(self, "prediction_time", np.asarray(self.prediction_time, "datetime64[us]"))
        set_field(self, "z", np.ascontiguousarray(self.z, np.float32))
        if self.z.ndim != 2 or self.z.shape[1] == 0 or len(self.z) != len(self.subject_id):
            raise Refusal(
                "TABLE_SHAPE", f"z is {list(self.z.shape)} for {len(self.subject_id)} rows, want [rows, width]"
            )
        bad = ~np.isfinite(self.z).all(axis=1)
        if bad.any():
            raise Refusal(
                "TABLE_NOT_FINITE",
                f"{int(bad.sum())} rows of z hold NaN or infinity, the first is row {int(bad.argmax())}",
                "Look for collapse or overflow in the model that made them",
            )
        refuse_bad_keys(self.keys, "embedding")
        if self.split is not None:
            set_field(self, "split", np.asarray(self.split, object))
            check_splits(self.subject_id, self.split)

    @property
    def keys(self) -> pd.DataFrame:
        """subject_id and prediction_time of every row."""
        return pd.DataFrame({"subject_id": self.subject_id, "prediction_time": self.prediction_time})

    def __len__(self) -> int:
        return len(self.subject_id)


@dataclass(frozen=True)
class ScoreTable:
    """Ready scores of n rows. score: float64 [n], a log-odds or a probability as ``kind`` says."""

    subject_id: np.ndarray
    prediction_time: np.ndarray
    score: np.ndarray
    kind: ScoreKind

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "subject_id", np.asarray(self.subject_id, np.int64))
        set_field(self, "prediction_time", np.asarray(self.prediction_time, "datetime64[us]"))
        set_field(self, "score", np.asarray(self.score, np.float64))
        if self.kind not in ("log_odds", "probability"):
            raise Refusal("SCORE_KIND", f"kind is {self.kind!r}, want 'log_odds' or 'probability'")
        bad = ~np.isfinite(self.score)
        if self.kind == "probability":
            bad |= (self.score < 0) | (self.score > 1)
        if bad.any():
            raise Refusal(
                "TABLE_NOT_FINITE",
                f"{int(bad.sum())} scores are not a finite {self.kind.replace('_', '-')}, the first is row {int(bad.argmax())}",
            )
        refuse_bad_keys(self.keys, "score")

    @property
    def keys(self) -> pd.DataFrame:
        """subject_id and prediction_time of every row."""
        return pd.DataFrame({"subject_id": self.subject_id, "prediction_time": self.prediction_time})

    @property
    def log_odds(self) -> np.ndarray:
        """Scores as log-odds, float64 [n]; a probability is held off 0 and 1 by 1e-9."""
        if self.kind == "log_odds":
            return self.score
        p = np.clip(self.score, 1e-9, 1 - 1e-9)
        return np.log(p) - np.log1p(-p)

    def __len__(self) -> int:
        return len(self.subject_id)


def refuse_bad_keys(keys: pd.DataFrame, what: str) -> None:
    """Refuse null or repeated (subject_id, prediction_time)."""
    if keys["prediction_time"].isna().any() or keys["subject_id"].isna().any():
        raise Refusal("TABLE_KEY_NULL", f"a {what} row has no subject_id or no prediction_time")
    repeated = keys.duplicated()
    if repeated.any():
        raise Refusal(
            "TABLE_DUPLICATE",
            f"{int(repeated.sum())} {what} rows repeat an earlier (subject_id, prediction_time), the first is row "
            f"{int(repeated.to_numpy().argmax())}",
            "Keep one row for each subject and time",
        )


def check_splits(subject_id: np.ndarray, split: np.ndarray) -> pd.Series:
    """One split for each subject, as a Series by subject_id; refuses unknown names and subjects in two splits."""
    unknown = sorted({str(name) for name in split} - set(SPLITS))
    if unknown:
        raise Refusal("TABLE_SPLIT", f"unknown split '{unknown[0]}'", f"Known splits: {', '.join(SPLITS)}")
    pairs = pd.DataFrame({"subject_id": subject_id, "split": split}).drop_duplicates()
    twice = int(pairs["subject_id"].duplicated().sum())
    if twice:
        raise Refusal("SPLIT_OVERLAP", f"{twice} subjects are in more than one split", "Split by subject, not by row")
    return pairs.set_index("subject_id")["split"]


def read_embeddings(path: Path | str) -> EmbeddingTable:
    """Read an embedding table: subject_id, prediction_time, z, optional split.

    Raises Refusal ``TABLE_MISSING``, ``TABLE_BROKEN``, ``TABLE_COLUMN``, ``TABLE_RAGGED``, ``TABLE_FINGERPRINT`` and
    those of ``EmbeddingTable``.
    """
    table, facts = _read(path, {"subject_id", "prediction_time", "z"}, "embedding table")
    split = table["split"].to_numpy(zero_copy_only=False) if "split" in table.column_names else None
    return EmbeddingTable(_integers(table), _times(table), _matrix(table["z"]), split, facts)


def write_embeddings(path: Path | str, table: EmbeddingTable) -> None:
    """Write the table as parquet (z a fixed-size list of float32) and its ``facts`` as json beside it."""
    width = table.z.shape[1]
    columns = _key_columns(table)
    if table.split is not None:
        columns["split"] = pa.array(table.split, pa.string())
    columns["z"] = pa.FixedSizeListArray.from_arrays(pa.array(table.z.reshape(-1), pa.float32()), width)
    _write(path, pa.table(columns), {**table.facts, "rows": len(table), "width": width})


def read_scores(path: Path | str) -> ScoreTable:
    """Read a score table: subject_id, prediction_time, score; ``kind`` stands in the json beside it."""
    table, facts = _read(path, {"subject_id", "prediction_time", "score"}, "score table")
    if "kind" not in facts:
        raise Refusal(
            "SCORE_KIND",
            f"{_beside(path)} does not say what the scores of {path} are",
            'Write {"kind": "log_odds"} there',
        )
    return ScoreTable(_integers(table), _times(table), table["score"].to_numpy(), facts["kind"])


def write_scores(path: Path | str, table: ScoreTable, facts: dict[str, Any] | None = None) -> None:
    """Write the scores as parquet and their kind (with ``facts``) as json beside it."""
    columns = {**_key_columns(table), "score": pa.array(table.score, pa.float64())}
    _write(path, pa.table(columns), {**(facts or {}), "kind": table.kind, "rows": len(table)})


def read_labels(folder: Path | str) -> pd.DataFrame:
    """Binary labels of one task in the MEDS label schema: every ``*.parquet`` under ``folder``, or one file.

    Returns columns subject_id, prediction_time, value (nullable boolean). The sidecar ``survival.parquet`` is not read.
    Raises Refusal ``LABELS_MISSING``, ``LABELS_KIND``, ``TABLE_DUPLICATE``.
    """
    folder = Path(folder)
    files = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*.parquet") if p.stem != "survival")
    if not files:
        raise Refusal("LABELS_MISSING", f"{folder} holds no label file", "Name the folder of one task, labels/<task>")
    pieces = []
    for file in files:
        table, _ = _read(file, {"subject_id", "prediction_time"}, "label file")
        if "boolean_value" not in table.column_names:
            raise Refusal("LABELS_KIND", f"{file} has no column boolean_value", "Only yes/no labels are judged")
        values = table["boolean_value"].to_pandas().astype("boolean")
        pieces.append(
            pd.DataFrame({"subject_id": _integers(table), "prediction_time": _times(table), "value": values.array})
        )
    labels = pd.concat(pieces, ignore_index=True)
    refuse_bad_keys(labels[["subject_id", "prediction_time"]], "label")
    return labels


@dataclass(frozen=True)
class Joined:
    """Rows that have both a label and an embedding or score.

    row: index into the table [n]. label_row: index into the labels [n]. y: int8 [n].
    excluded: counts of what was left out, by reason.
    """

    row: np.ndarray
    label_row: np.ndarray
    y: np.ndarray
    excluded: dict[str, int]


def join(table: EmbeddingTable | ScoreTable, labels: pd.DataFrame) -> Joined:
    """Join a table with labels (subject_id, prediction_time, value) on the first two, in the labels' order.

    Nothing is filled in. Raises Refusal ``LABELS_KIND`` when the values are not yes or no.
    """
    if "value" not in labels or not pd.api.types.is_bool_dtype(labels["value"]):
        raise Refusal("LABELS_KIND", "the labels have no yes/no column 'value'", "Only yes/no labels are judged")
    keys = table.keys.assign(row=np.arange(len(table)))
    wanted = labels[["subject_id", "prediction_time", "value"]].assign(label_row=np.arange(len(labels)))
    wanted["prediction_time"] = wanted["prediction_time"].to_numpy("datetime64[us]")
    known = wanted[wanted["value"].notna().to_numpy()]
    both = known.merge(keys, on=["subject_id", "prediction_time"], how="inner")
    return Joined(
        both["row"].to_numpy(),
        both["label_row"].to_numpy(),
        both["value"].to_numpy(bool).astype(np.int8),
        {
            "labels_without_value": len(wanted) - len(known),
            "labels_without_row": len(known) - len(both),
            "rows_without_label": len(keys) - len(both),
        },
    )


def _beside(path: Path | str) -> Path:
    return Path(path).with_suffix(".json")


def _read(path: Path | str, columns: set[str], what: str) -> tuple[pa.Table, dict[str, Any]]:
    path = Path(path)
    if not path.is_file():
        raise Refusal("TABLE_MISSING", f"{path} is not a file", f"Name the parquet file of the {what}")
    facts = read_json(_beside(path)) if _beside(path).is_file() else {}
    if "sha256" in facts and facts["sha256"] != sha256(path):
        raise Refusal(
            "TABLE_FINGERPRINT", f"{path} is not the file that {_beside(path)} describes", "Make the table again"
        )
    try:
        table = pq.read_table(path, partitioning=None)
    except (pa.ArrowInvalid, OSError) as error:
        raise Refusal("TABLE_BROKEN", f"{path} cannot be read as parquet ({str(error).splitlines()[0]})") from None
    missing = sorted(columns - set(table.column_names))
    if missing:
        raise Refusal(
            "TABLE_COLUMN", f"{path} has no column {missing[0]}", f"A {what} needs {', '.join(sorted(columns))}"
        )
    return table, facts


def _write(path: Path | str, table: pa.Table, facts: dict[str, Any]) -> None:
    path = Path(path)
    for file in (path, _beside(path)):
        if file.exists():
            raise Refusal("OUTPUT_EXISTS", f"{file} already exists", "Name another table")
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)
    write_json(_beside(path), {**facts, "sha256": sha256(path)})


def _key_columns(table: EmbeddingTable | ScoreTable) -> dict[str, pa.Array]:
    return {
        "subject_id": pa.array(table.subject_id, pa.int64()),
        "prediction_time": pa.array(table.prediction_time, pa.timestamp("us")),
    }


def _integers(table: pa.Table) -> np.ndarray:
    column = table["subject_id"]
    if not pa.types.is_integer(column.type) or column.null_count:
        raise Refusal("TABLE_KEY_NULL", "subject_id must be whole numbers without gaps")
    return column.to_numpy().astype(np.int64)


def _times(table: pa.Table) -> np.ndarray:
    column = table["prediction_time"]
    if not pa.types.is_timestamp(column.type) or column.type.tz is not None or column.null_count:
        raise Refusal(
            "TABLE_KEY_NULL", f"prediction_time is {column.type}", "Want timestamps without time zone and without gaps"
        )
    try:
        return column.cast(pa.timestamp("us")).to_numpy().astype("datetime64[us]")
    except pa.ArrowInvalid:
        raise Refusal(
            "TABLE_TIME", "a prediction_time is finer than one microsecond", "Round it to microseconds"
        ) from None


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A list column as float32 [rows, width]; refuses anything that is not one rectangle of numbers."""
    kind = column.type
    if not (pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise Refusal("TABLE_COLUMN", f"z is {kind}, want a list of float32")
    lists = column.combine_chunks() if column.num_chunks else pa.array([], kind)
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    flat = lists.flatten()
    if lists.null_count or flat.null_count or (len(lengths) and lengths.min() != lengths.max()):
        raise Refusal("TABLE_RAGGED", "the rows of z have different lengths or gaps", "Every row needs the same width")
    if not (pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type)):
        raise Refusal("TABLE_COLUMN", f"z holds {flat.type}, want float32")
    with np.errstate(over="ignore"):  # an overflow becomes infinity, which is refused as such
        values = flat.to_numpy(zero_copy_only=False).astype(np.float32)
    return (
        values.reshape(len(lists), -1)
        if len(lists)
        else values.reshape(0, kind.list_size if pa.types.is_fixed_size_list(kind) else 0)
    )
