"""Parquet files of a source folder, written piece by piece, so that memory does not grow with the cohort."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mmjepa.files import write_json
from synthetic.events import NO_TIME, NO_VISIT, Rows
from synthetic.plan import SPLITS

_STAMP = pa.timestamp("us")


class Tables(ExitStack):
    """Parquet files that grow by pieces of one schema each; closed together."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._open: dict[str, pq.ParquetWriter] = {}

    def add(self, name: str, piece: Mapping[str, Any] | pa.Table, *, closed: bool = False) -> None:
        """Append a piece to the file ``name`` of the folder. closed: its columns hold no null, and the schema says so."""
        table = piece if isinstance(piece, pa.Table) else pa.table(dict(piece))
        if closed:
            table = table.cast(pa.schema([field.with_nullable(False) for field in table.schema]))
        if name not in self._open:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            self._open[name] = self.enter_context(pq.ParquetWriter(self.folder / name, table.schema))
        self._open[name].write_table(table)


def record(rows: Rows, subject_id: int, visit_base: int, codes: list[str], image_ids: Mapping[int, str]) -> pa.Table:
    """One subject's rows in MEDS columns. image_ids: time in us of a CT row -> its image; visit ids start at ``visit_base``."""
    is_ct = np.array([codes[i].startswith("CT//") for i in rows.code], bool)
    image_id = [image_ids[int(t)] if hit else None for t, hit in zip(rows.time, is_ct, strict=True)]
    return pa.table(
        {
            "subject_id": pa.array(np.full(len(rows.time), subject_id)),
            "time": pa.array(rows.time, _STAMP, mask=rows.time == NO_TIME),
            "code": pa.array([codes[i] for i in rows.code], pa.string()),
            "numeric_value": pa.array(rows.value, pa.float32(), mask=np.isnan(rows.value)),
            "available_time": pa.array(rows.available, _STAMP, mask=rows.available == NO_TIME),
            "visit_id": pa.array(visit_base + rows.visit, mask=rows.visit == NO_VISIT),
            "image_id": pa.array(image_id, pa.string()),
        }
    )


def add_records(tables: Tables, number: int, splits: pd.DataFrame, records: pa.Table) -> None:
    """One shard: a file for each split, every subject's rows together and in time order. splits: subject_id, split."""
    subject = records["subject_id"].to_numpy()
    for split in SPLITS:
        ids = splits["subject_id"][splits["split"] == split].to_numpy(np.int64)
        if len(ids):
            tables.add(
                f"ehr/data/{split}/{number}.parquet", records.filter(pa.array(np.isin(subject, ids))).combine_chunks()
            )
    pieces = {"subject_id": splits["subject_id"].to_numpy(), "split": pa.array(splits["split"].tolist(), pa.string())}
    tables.add("ehr/metadata/subject_splits.parquet", pieces)


def write_metadata(root: Path, name: str, version: str, codes: Mapping[str, str]) -> None:
    """What a MEDS 0.4 root says of itself. codes: code -> description, every code that may occur."""
    parents = pa.nulls(len(codes), pa.list_(pa.string()))
    columns = {"code": list(codes), "description": list(codes.values()), "parent_codes": parents}
    pq.write_table(pa.table(columns), root / "metadata" / "codes.parquet")
    write_json(
        root / "metadata" / "dataset.json",
        {
            "dataset_name": name,
            "dataset_version": version,
            "etl_name": "synthetic",
            "meds_version": "0.4.1",
            "additional_value_modality_columns": ["image_id"],
            "other_extension_columns": ["available_time", "visit_id"],
        },
    )
