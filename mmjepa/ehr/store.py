"""The event store: all events of a MEDS root as flat arrays with one offset a subject, memory-mapped when on disk."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from mmjepa.ehr.build import VERSION, build_in_folder, build_in_memory
from mmjepa.ehr.meds_io import open_root
from mmjepa.ehr.sinks import ARRAYS
from mmjepa.refusal import Refusal

TIME_HINT = "Give datetime64 or whole microseconds since 1970, none missing"


@dataclass(frozen=True, eq=False)
class EventStore:
    """Events of ``n`` subjects. Times are int64 microseconds since 1970, local clock.

    subjects: int64 [n], ascending.
    offsets: int64 [n + 1]; the timed rows of subject row i are ``offsets[i]:offsets[i + 1]``, in the order in which they
        became available (then by time, then as in the file): what is known at any t is a prefix, see ``as_of``.
    times_us, available_us: int64 [rows]; available_us is when the row could be known, times_us where the source is
        silent. Only available_us ascends within a subject.
    codes: int32 [rows] into ``vocabulary``. values: float32 [rows], NaN = none.
    hadm_id: int64 [rows], the hospital admission, -1 = none (all, where the source has no such column).
    static_offsets [n + 1], static_codes, static_values: the rows without a time, always visible.
    vocabulary: every code that the root lists, sorted. descriptions: code -> text where known.
    image_ids: row -> image_id, for the rows that have one; image_rows: those rows, ascending.
    splits: name -> ascending subject ids; empty when the root has none.
    fingerprint: hash of the content, the same however the root is sharded.
    folder: where it lies; None in memory.
    """

    subjects: np.ndarray
    offsets: np.ndarray
    times_us: np.ndarray
    available_us: np.ndarray
    codes: np.ndarray
    values: np.ndarray
    static_offsets: np.ndarray
    static_codes: np.ndarray
    static_values: np.ndarray
    hadm_id: np.ndarray
    image_rows: np.ndarray
    image_ids: dict[int, str]
    vocabulary: list[str]
    descriptions: dict[str, str]
    splits: dict[str, np.ndarray]
    fingerprint: str
    folder: Path | None = field(default=None)

    @classmethod
    def build(cls, root: Path | str, folder: Path | str) -> "EventStore":
        """Build the store of a MEDS root in ``folder``, out of core; see ``build.build_in_folder``.

        Raises Refusal: the MEDS_* codes of ``meds_io`` and ``shards``, OUTPUT_EXISTS, OUT_IN_SOURCE, DISK_FULL.
        """
        build_in_folder(open_root(root), Path(folder))
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path | str) -> "EventStore":
        """Open a built store; its arrays are memory maps. Raises Refusal STORE_MISSING, STORE_BROKEN."""
        folder = Path(folder)
        if not (mark := _mark(folder)):
            raise Refusal("STORE_MISSING", f"{folder} holds no event store", "Build it from its MEDS root")
        try:
            meta = json.loads((folder / "store.json").read_text())
            if not isinstance(meta, dict) or meta.get("version") != VERSION:
                raise ValueError("store.json is of another version")
            arrays = {name: _load(folder / f"{name}.npy") for name in ARRAYS}
            _check(arrays, meta)
        except (OSError, ValueError, EOFError) as error:
            if _mark(folder) == mark:
                raise Refusal(
                    "STORE_BROKEN", f"{folder} is damaged ({error})", "Delete it; it is built again"
                ) from None
        if _mark(folder) != mark:  # another store took its place meanwhile: what was read may be of both
            return cls.open(folder)
        return cls._of(arrays, meta, folder.absolute())

    @classmethod
    def in_memory(cls, root: Path | str) -> "EventStore":
        """The store of a MEDS root in memory, for small roots and read-only places."""
        arrays, meta = build_in_memory(open_root(root))
        return cls._of(arrays, meta, None)

    @classmethod
    def _of(cls, arrays: dict[str, np.ndarray], meta: dict[str, Any], folder: Path | None) -> "EventStore":
        split_of = arrays["split_of"]
        if not len(arrays["available_us"]):
            arrays["available_us"] = arrays["times_us"]
        if not len(arrays["hadm_id"]):
            arrays["hadm_id"] = np.broadcast_to(np.int64(-1), arrays["codes"].shape)
        return cls(
            **{name: array for name, array in arrays.items() if name != "split_of"},
            image_ids=dict(zip(arrays["image_rows"].tolist(), meta["images"], strict=True)),
            vocabulary=meta["vocabulary"],
            descriptions=meta["descriptions"],
            splits={name: np.asarray(arrays["subjects"][split_of == i]) for i, name in enumerate(meta["splits"])},
            fingerprint=meta["fingerprint"],
            folder=folder,
        )

    def __reduce__(self) -> tuple[Callable[..., "EventStore"], tuple[Any, ...]]:
        """Another process opens the maps by path instead of receiving the arrays. Raises there Refusal STORE_CHANGED."""
        if self.folder is not None:
            return _reopen, (self.folder, self.fingerprint)
        return EventStore, tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def rows(self, subjects: np.ndarray) -> np.ndarray:
        """int64 [B]: the row of each subject. Raises Refusal SUBJECT_UNKNOWN."""
        subjects = np.asarray(subjects, np.int64)
        rows = np.minimum(np.searchsorted(self.subjects, subjects), len(self.subjects) - 1)
        unknown = self.subjects[rows] != subjects
        if np.any(unknown):
            raise Refusal(
                "SUBJECT_UNKNOWN",
                f"{np.sum(unknown)} of {unknown.size} subjects asked for are not in the event store "
                f"(the first is number {np.argmax(unknown)} of the list)",
                "Check that the subject ids and the store belong to the same cohort",
            )
        return rows

    def row(self, subject_id: int) -> int:
        """The row of one subject. Raises Refusal SUBJECT_UNKNOWN."""
        return int(self.rows(np.asarray([subject_id]))[0])

    def as_of(self, subjects: np.ndarray, times: Any) -> tuple[np.ndarray, np.ndarray]:
        """Half-open ranges of the timed rows known at t, t included as MEDS wants it of a prediction time.

        subjects: int64 [B]. times: [B], see ``given_us``. Returns (start, stop), int64 [B]: exactly the rows with
        available_us <= t, in the order in which they became available. O(log rows) for the whole batch at once.
        Raises Refusal SUBJECT_UNKNOWN, TIME_TYPE, TIME_ZONE.
        """
        rows, times_us = self.rows(subjects), given_us(times)
        start = np.asarray(self.offsets)[rows]
        low, high = start.copy(), np.asarray(self.offsets)[rows + 1]
        while (open_ := low < high).any():
            middle = np.where(open_, (low + high) // 2, start)
            past = np.zeros(len(rows), bool)
            past[open_] = self.available_us[middle[open_]] <= times_us[open_]
            low = np.where(open_ & past, middle + 1, low)
            high = np.where(open_ & ~past, middle, high)
        return start, low

    def match(self, prefixes: Iterable[str]) -> np.ndarray:
        """bool [vocabulary]: codes that equal a prefix or continue it behind ``//``."""
        prefixes = tuple(prefixes)
        deeper = tuple(f"{prefix}//" for prefix in prefixes)
        return np.fromiter((code in prefixes or code.startswith(deeper) for code in self.vocabulary), bool)


def to_us(times: Any) -> np.ndarray:
    """Date-times (a pandas column, datetime64) as int64 microseconds since 1970. Raises Refusal TIME_ZONE."""
    raw = np.asarray(times)  # a pandas column with a zone comes as objects that carry it
    if raw.dtype == object and any(getattr(time, "tzinfo", None) is not None for time in raw.flat):
        raise Refusal(
            "TIME_ZONE", "the times carry a time zone", "Give local clock times without one; a move shifts every hour"
        )
    return raw.astype("datetime64[us]").astype(np.int64)


def given_us(times: Any) -> np.ndarray:
    """Times that somebody asks about, as int64 microseconds since 1970: whole numbers are that already, date-times of any unit
    (datetime64, a pandas column) are turned into it. Raises Refusal TIME_TYPE (anything else, a missing time), TIME_ZONE."""
    raw = np.asarray(times)
    if raw.dtype.kind in "iu" or not raw.size:
        return raw.astype(np.int64)
    if raw.dtype.kind != "M" and not all(isinstance(time, date | np.datetime64) for time in raw.flat):
        raise Refusal("TIME_TYPE", f"times of type {raw.dtype} say no time", TIME_HINT)
    if missing := int(np.not_equal(raw, raw).sum()):
        raise Refusal("TIME_TYPE", f"{missing} of {raw.size} times are missing", TIME_HINT)
    return to_us(raw)


def _reopen(folder: Path, fingerprint: str) -> EventStore:
    store = EventStore.open(folder)
    if store.fingerprint != fingerprint:
        raise Refusal("STORE_CHANGED", f"{folder} was built anew from other records", "Start the run again")
    return store


def _mark(folder: Path) -> tuple[int, ...]:
    """What tells one store in a folder from the next; empty without one."""
    try:
        stat = (folder / "store.json").stat()
    except (FileNotFoundError, NotADirectoryError):
        return ()
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns


def _check(arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Raise ValueError unless the arrays have their kinds and the lengths that the offsets give, and meta its entries."""
    kinds = {"vocabulary": list, "descriptions": dict, "splits": list, "images": list, "fingerprint": str}
    wrong = [name for name, kind in kinds.items() if not isinstance(meta.get(name), kind)]
    wrong += [name for name, array in arrays.items() if array.dtype != ARRAYS[name] or array.ndim != 1]
    if wrong:
        raise ValueError(f"no or another {', '.join(wrong)}")
    people = len(arrays["subjects"])
    lengths = {"offsets": {people + 1}, "static_offsets": {people + 1}, "split_of": {people}}
    lengths["image_rows"] = {len(meta["images"])}
    for offsets, names in (
        ("offsets", ("times_us", "codes", "values", "available_us", "hadm_id")),
        ("static_offsets", ("static_codes", "static_values")),
    ):
        ends = arrays[offsets]
        if not len(ends) or ends[0] != 0 or (np.diff(ends) < 0).any():
            raise ValueError(f"{offsets} do not ascend from 0")
        lengths |= {name: {int(ends[-1])} for name in names}
    for name in ("available_us", "hadm_id"):  # empty where the source has none
        lengths[name] = lengths[name] | {0}
    wrong = [name for name, allowed in lengths.items() if len(arrays[name]) not in allowed]
    if wrong:
        raise ValueError(f"another length of {', '.join(wrong)}")


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:  # an empty file cannot be mapped
        return np.load(path, allow_pickle=False)
