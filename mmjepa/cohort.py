"""A cohort: one folder with records, images and labels, or a bare MEDS root; this file knows where things lie in it."""

import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mmjepa.refusal import Refusal

if TYPE_CHECKING:
    import pandas as pd

    from mmjepa.ehr.store import EventStore

VALUE_COLUMNS = ("boolean_value", "integer_value", "float_value", "categorical_value")
SURVIVAL_FILE = "survival.parquet"  # time-to-event sidecar of a task: not in the closed MEDS label schema


class Cohort:
    """An opened cohort. ``meds_root``: its MEDS root. ``ct_folder``: where images lie, if any."""

    def __init__(self, path: Path, meds_root: Path) -> None:
        self.path, self.meds_root = path, meds_root
        self.ct_folder, self.labels_folder, self.store_folder = path / "ct", path / "labels", path / "store"

    @classmethod
    def open(cls, path: Path | str) -> "Cohort":
        """Open a cohort folder or a bare MEDS root. Raises Refusal COHORT_MISSING, COHORT_EMPTY."""
        path = Path(path)
        if not path.is_dir():
            raise Refusal(
                "COHORT_MISSING", f"{path} is not a folder", "Make one with mmjepa ingest, or name a MEDS root"
            )
        for root in (path / "ehr", path):
            if (root / "data").is_dir() and (root / "metadata").is_dir():
                return cls(path, root)
        raise Refusal(
            "COHORT_EMPTY",
            f"{path} holds neither ehr/ nor a MEDS root",
            "A cohort holds ehr/data and ehr/metadata; make one with mmjepa ingest",
        )

    @property
    def has_images(self) -> bool:
        """Whether CT volumes were ingested."""
        return (self.ct_folder / "index.parquet").is_file()

    @property
    def images_paired(self) -> bool:
        """Whether the images' subject ids are those of the records; False when they were merely numbered at ingest."""
        from mmjepa.files import read_json

        manifest = self.ct_folder / "manifest.json"
        return self.has_images and manifest.is_file() and bool(read_json(manifest).get("paired"))

    def events(self) -> "EventStore":
        """The event store: the one in ``store/`` when it is of exactly these records, else built there.

        It is built in memory where the folder cannot be written, and for a bare MEDS root, whose folder stays as it is.
        Raises Refusal: the MEDS_* codes.
        """
        return self._events

    @cached_property
    def _events(self) -> "EventStore":
        from mmjepa.ehr.build import is_current
        from mmjepa.ehr.store import EventStore

        if is_current(self.store_folder, self.meds_root):
            return EventStore.open(self.store_folder)
        if self.meds_root == self.path or not os.access(self.path, os.W_OK):
            return EventStore.in_memory(self.meds_root)
        return EventStore.build(self.meds_root, self.store_folder)

    @property
    def tasks(self) -> list[str]:
        """Names of the label tasks."""
        return task_names(self.labels_folder)

    def labels(self, task: str) -> "pd.DataFrame":
        """Labels of one task: subject_id int64, prediction_time datetime64[us], value. See ``read_labels``."""
        return read_labels(self.labels_folder, task)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the records' content and of the image index; written into every run."""
        digest = hashlib.sha256(self.events().fingerprint.encode())
        if self.has_images:
            digest.update((self.ct_folder / "index.parquet").read_bytes())
        return digest.hexdigest()[:32]


def task_names(folder: Path | str) -> list[str]:
    """Names of the tasks under a labels folder: its subfolders that hold a parquet file."""
    folder = Path(folder)
    return sorted(path.name for path in folder.iterdir() if _label_files(path)) if folder.is_dir() else []


def read_labels(folder: Path | str, task: str) -> "pd.DataFrame":
    """Read the MEDS label files of one task, sorted by (subject_id, prediction_time).

    Returns subject_id int64, prediction_time datetime64[us] (inclusive end of usable data) and value (the one value
    column that the files carry). Raises Refusal: LABELS_MISSING, LABELS_EMPTY, LABELS_UNREADABLE, LABELS_TIMEZONE,
    LABELS_SCHEMA (other columns, nulls, none or several value columns), LABELS_DUPLICATE.
    """
    import meds
    import pandas as pd

    from mmjepa.ehr.meds_io import read_table

    files = _label_files(Path(folder) / task)
    if not files:
        known = ", ".join(task_names(folder)) or "none"
        raise Refusal("LABELS_MISSING", f"{Path(folder) / task} holds no labels", f"Tasks there: {known}")
    tables = []
    for file in files:
        try:
            tables.append(read_table(file, meds.LabelSchema).to_pandas())
        except Refusal as refusal:
            raise Refusal(refusal.code.replace("MEDS_", "LABELS_"), refusal.message, refusal.hint) from None
    frame = pd.concat(tables, ignore_index=True)
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
    frame = frame[["subject_id", "prediction_time", values[0]]].rename(columns={values[0]: "value"})
    twice = frame.duplicated(["subject_id", "prediction_time"])
    if twice.any():
        raise Refusal(
            "LABELS_DUPLICATE",
            f"{twice.sum()} labels of {Path(folder) / task} repeat a subject and prediction_time (first: row {twice.argmax()})",
            "Keep one label for each subject and time",
        )
    return frame.sort_values(["subject_id", "prediction_time"], ignore_index=True)


def _label_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.parquet") if path.name != SURVIVAL_FILE) if folder.is_dir() else []
