"""The event store: all events of a MEDS root as flat arrays with one offset a subject, memory-mapped when on disk."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmjepa.ehr.meds_io import MedsRoot, Shard, open_root, read_shards
from mmjepa.files import atomic_path, read_json, sha256, write_json
from mmjepa.refusal import Refusal

VERSION = 2
_ARRAYS: dict[str, type] = {
    "subjects": np.int64,
    "offsets": np.int64,
    "times_us": np.int64,
    "available_us": np.int64,
    "codes": np.int32,
    "values": np.float32,
    "static_offsets": np.int64,
    "static_codes": np.int32,
    "static_values": np.float32,
    "hadm_id": np.int64,
    "image_rows": np.int64,
    "split_of": np.int32,
}


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
        """Build the store of a MEDS root in ``folder``, shard by shard, whole or not at all; an older store there is replaced.

        Raises Refusal: the MEDS_* codes of ``meds_io``.
        """
        meds, folder = open_root(root), Path(folder)
        source = source_stamp(meds) | {"sha256": source_hash(meds)}
        built = folder.with_name(f".{folder.name}.{os.getpid()}.built")
        with atomic_path(built) as temporary:
            temporary.mkdir()
            _, meta = _fill(meds, lambda name, rows: _map(temporary / f"{name}.npy", rows, _ARRAYS[name]))
            write_json(temporary / "store.json", meta | {"source": source})
        _settle(built, folder, meds)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path | str) -> "EventStore":
        """Open a built store; its arrays are memory maps. Raises Refusal STORE_MISSING, STORE_BROKEN."""
        folder = Path(folder)
        if not (folder / "store.json").is_file():
            raise Refusal("STORE_MISSING", f"{folder} holds no event store", "Build it from its MEDS root")
        meta = read_json(folder / "store.json")
        if meta.get("version") != VERSION:
            raise Refusal("STORE_BROKEN", f"{folder} is of another version", "Delete it; it is built again")
        try:
            arrays = {name: _load(folder / f"{name}.npy") for name in _ARRAYS}
        except (OSError, ValueError, EOFError) as error:
            raise Refusal("STORE_BROKEN", f"{folder} is damaged ({error})", "Delete it; it is built again") from None
        return cls._of(arrays, meta, folder)

    @classmethod
    def in_memory(cls, root: Path | str) -> "EventStore":
        """The store of a MEDS root in memory, for small roots and read-only places."""
        arrays, meta = _fill(open_root(root), lambda name, rows: np.empty(rows, _ARRAYS[name]))
        return cls._of(arrays, meta, None)

    @classmethod
    def _of(cls, arrays: dict[str, np.ndarray], meta: dict[str, Any], folder: Path | None) -> "EventStore":
        split_of = arrays["split_of"]
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
        """Another process opens the maps by path instead of receiving the arrays."""
        if self.folder is not None:
            return EventStore.open, (self.folder,)
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

    def as_of(self, subjects: np.ndarray, times_us: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Half-open ranges of the timed rows known at t, t included as MEDS wants it of a prediction time.

        subjects, times_us: int64 [B]. Returns (start, stop), int64 [B]: exactly the rows with available_us <= t, in the
        order in which they became available. O(log rows) for the whole batch at once.
        """
        rows, times_us = self.rows(subjects), np.asarray(times_us, np.int64)
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
    """Date-times (a pandas column, datetime64) as int64 microseconds since 1970."""
    return np.asarray(times, "datetime64[us]").astype(np.int64)


def is_current(folder: Path | str, root: Path | str) -> bool:
    """Whether ``folder`` holds a store of exactly this root: names, sizes and change times agree, or else the bytes do."""
    try:
        meta = json.loads((Path(folder) / "store.json").read_text())
        recorded = meta["source"]
        if meta["version"] != VERSION:
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    meds = open_root(root)
    stamp = source_stamp(meds)
    if stamp["names"] != recorded["names"]:
        return False
    return stamp["stamp"] == recorded["stamp"] or source_hash(meds) == recorded["sha256"]


def source_stamp(root: MedsRoot) -> dict[str, str]:
    """Cheap marks of the root's files: hash of names and sizes, hash of change times."""
    files = [(path.relative_to(root.path).as_posix(), path.stat()) for path in root.files()]
    names = json.dumps([(name, stat.st_size) for name, stat in files])
    return {"names": _digest(names), "stamp": _digest(json.dumps([stat.st_mtime_ns for _, stat in files]))}


def source_hash(root: MedsRoot) -> str:
    """Hash of the bytes of the root's files."""
    return _digest("\n".join(sha256(path) for path in root.files()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _fill(root: MedsRoot, make: Callable[[str, int], np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Two passes over the shards, so that memory holds one shard: count the rows of each subject, then put them in place.

    make(name, rows) gives the array to fill. Returns the arrays and the part of the JSON that describes them.
    """
    counts = [_count(shard) for shard in read_shards(root)]
    subjects, timed, static, images, admissions = (np.concatenate(column) for column in zip(*counts, strict=True))
    order = np.argsort(subjects)
    offsets = [np.concatenate([[0], np.cumsum(rows[order])]) for rows in (timed, static)]
    ends = (offsets[0][-1], offsets[1][-1])
    sizes = {"subjects": len(order), "offsets": len(order) + 1, "static_offsets": len(order) + 1}
    sizes |= {"static_codes": ends[1], "static_values": ends[1], "image_rows": images.sum(), "split_of": len(order)}
    if not admissions.any():
        sizes["hadm_id"] = 0
    arrays = {name: make(name, int(sizes.get(name, ends[0]))) for name in _ARRAYS}
    arrays["subjects"][:], arrays["offsets"][:], arrays["static_offsets"][:] = subjects[order], *offsets
    image_ids: dict[int, str] = {}
    for shard in read_shards(root):
        image_ids |= _put(arrays, shard)
    arrays["image_rows"][:] = sorted(image_ids)
    arrays["split_of"][:] = -1
    for i, ids in enumerate(root.splits.values()):
        arrays["split_of"][np.isin(arrays["subjects"], ids)] = i
    meta = {
        "version": VERSION,
        "vocabulary": list(root.codes),
        "descriptions": root.descriptions,
        "splits": list(root.splits),
        "images": [image_ids[row] for row in sorted(image_ids)],
    }
    return arrays, meta | {"fingerprint": _fingerprint(arrays, meta)}


def _count(shard: Shard) -> tuple[np.ndarray, ...]:
    """Subjects of a shard, their timed and static rows, and (one number each) its timed rows with an image and whether
    it has a column of admissions."""
    static = np.add.reduceat(shard.static.astype(np.int64), shard.run_starts) if len(shard.codes) else shard.run_lengths
    images = sum(not shard.static[row] for row in shard.images)
    more = np.array([images]), np.array([shard.hadm_id is not None])
    return shard.run_subjects, shard.run_lengths - static, static, *more


def _put(arrays: dict[str, np.ndarray], shard: Shard) -> dict[int, str]:
    """Write a shard's rows to their places; returns store row -> image_id."""
    subject_rows = np.searchsorted(arrays["subjects"], np.repeat(shard.run_subjects, shard.run_lengths))
    sources = {"offsets": _by_availability(shard), "static_offsets": np.flatnonzero(shard.static)}
    targets = {}
    for kind, source in sources.items():
        rows = subject_rows[source]
        first = np.flatnonzero(np.diff(rows, prepend=-1))
        rank = np.arange(len(rows)) - np.repeat(first, np.diff(np.append(first, len(rows))))
        targets[kind] = arrays[kind][rows] + rank
    timed, static = sources["offsets"], sources["static_offsets"]
    for name in ("times_us", "available_us", "codes", "values"):
        arrays[name][targets["offsets"]] = getattr(shard, name)[timed]
    if len(arrays["hadm_id"]):
        arrays["hadm_id"][targets["offsets"]] = -1 if shard.hadm_id is None else shard.hadm_id[timed]
    for name in ("codes", "values"):
        arrays[f"static_{name}"][targets["static_offsets"]] = getattr(shard, name)[static]
    place = np.full(len(shard.codes), -1)
    place[timed] = targets["offsets"]
    return {int(place[row]): image for row, image in shard.images.items() if place[row] >= 0}


def _by_availability(shard: Shard) -> np.ndarray:
    """The timed rows of a shard, each subject's in the order in which they became available; ties stay as they lie."""
    timed = np.flatnonzero(~shard.static)
    run = np.repeat(np.arange(len(shard.run_lengths)), shard.run_lengths)[timed]
    return timed[np.lexsort((shard.available_us[timed], run))]


def _fingerprint(arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> str:
    digest = hashlib.blake2b(json.dumps(meta, sort_keys=True).encode(), digest_size=16)
    for name in _ARRAYS:
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).view(np.uint8).data)
    return digest.hexdigest()


def _map(path: Path, rows: int, kind: type) -> np.ndarray:
    if rows == 0:  # an empty file cannot be mapped
        np.save(path, np.empty(0, kind))
        return np.empty(0, kind)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(kind), shape=(rows,))
    if hasattr(os, "posix_fallocate"):  # a full disk must be an error here, not a crash on a later write
        with open(path, "r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)
    return array


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        return np.load(path, allow_pickle=False)


def _settle(built: Path, folder: Path, root: MedsRoot) -> None:
    """Put a whole new store in place of an old one. Of several processes that build at once the first one's is kept."""
    try:
        if not is_current(folder, root.path):
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(built, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not is_current(folder, root.path):
            raise
    finally:
        shutil.rmtree(built, ignore_errors=True)
