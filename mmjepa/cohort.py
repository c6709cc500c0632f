"""A cohort: one folder with records, images and labels, or a bare MEDS root; this file knows where things lie in it."""

import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mmjepa.labels import SURVIVAL_FILE, read_labels, read_survival, task_names
from mmjepa.refusal import Refusal

if TYPE_CHECKING:
    import pandas as pd

    from mmjepa.ehr.store import EventStore

__all__ = ["SURVIVAL_FILE", "Cohort", "read_labels", "task_names"]


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

    def survival(self, task: str) -> "pd.DataFrame":
        """Times to an event of one task: time_to_event_days float64, event int64 (0 censored). See ``read_survival``."""
        return read_survival(self.labels_folder, task)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the records' content and of the image index; written into every run."""
        digest = hashlib.sha256(self.events().fingerprint.encode())
        if self.has_images:
            digest.update((self.ct_folder / "index.parquet").read_bytes())
        return digest.hexdigest()[:32]
