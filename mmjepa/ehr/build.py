"""Building the event store from MEDS shards: out of core, at flat memory, going on where a killed build stopped.

Two passes over the files: where each subject lies (two columns), then pieces of whole subjects, each written to its place.
A build works in a hidden folder beside the store. It holds ``plan.json`` (what is built from what), ``index_<shard>.npz``
(the first pass), ``piece_<shard>_<number>.json`` (a piece that is in place; its images), and the arrays. The folder takes
the store's name when it is whole. The lock lies beside both: it must not move with the folder.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from mmjepa.ehr.meds_io import MedsRoot, open_root
from mmjepa.ehr.shards import PIECE_ROWS, Piece, ShardIndex, check_indices, index_shard, read_pieces
from mmjepa.ehr.sinks import ARRAYS, FolderSink, MemorySink, Sink
from mmjepa.files import atomic_path, read_json, sha256, write_json
from mmjepa.refusal import Refusal

VERSION = 2
_CHUNK = 1 << 20  # entries hashed at once
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def build_in_memory(root: MedsRoot) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a root, and what ``store.json`` says of them."""
    sink = MemorySink()
    indices = [index_shard(path) for path in root.shards]
    check_indices(root, indices)
    layout = Layout(indices, sink)
    images: dict[int, str] = {}
    for index in indices:
        for piece in read_pieces(root, index):
            images |= layout.place(piece)
    return sink.arrays, layout.finish(root, images)


def build_in_folder(root: MedsRoot, folder: Path) -> None:
    """Build the store of a root in ``folder``, unless it is there; an older one is replaced, and nothing else is.

    One process builds, others wait for it. A build that was killed goes on behind its last whole piece; one that failed
    leaves nothing. Raises Refusal: OUTPUT_EXISTS, OUT_IN_SOURCE, DISK_FULL and those of the shards.
    """
    _check_place(root.path, folder)
    folder = folder.resolve()  # a link to a store on another disk stays one
    with _locked(folder) as working:
        if is_current(folder, root.path):
            shutil.rmtree(working, ignore_errors=True)
            return
        source = _plan(working, root)
        try:
            with atomic_path(working / "store.json") as last:
                meta = _fill_folder(working, root)
                last.write_text(json.dumps(meta | {"source": source}))
        except Exception:
            shutil.rmtree(working, ignore_errors=True)
            raise
        kept = {"store.json", *(f"{name}.npy" for name in ARRAYS)}
        for file in working.iterdir():
            if file.name not in kept:
                file.unlink()
        _swap(working, folder)


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
    stamp = _stamp(meds)
    if stamp["names"] != recorded["names"]:
        return False
    return stamp["stamp"] == recorded["stamp"] or _source_hash(meds) == recorded["sha256"]


class Layout:
    """Where the rows of every subject go. The subject tables are written when it is made."""

    def __init__(self, indices: list[ShardIndex], sink: Sink) -> None:
        self.sink = sink
        subjects = np.concatenate([index.subjects for index in indices])
        static = np.concatenate([index.static for index in indices])
        rows = np.concatenate([np.diff(index.ends) for index in indices])
        order = np.argsort(subjects)
        self.subjects = subjects[order]
        self.offsets = np.concatenate([[0], np.cumsum((rows - static)[order])])
        self.static_offsets = np.concatenate([[0], np.cumsum(static[order])])
        columns = {name for index in indices for name in index.columns}
        self.extras = {"available_us": "available_time" in columns, "hadm_id": "hadm_id" in columns}
        timed, timeless = int(self.offsets[-1]), int(self.static_offsets[-1])
        self.sizes = dict.fromkeys(("times_us", "codes", "values"), timed)
        self.sizes |= {name: timed if given else 0 for name, given in self.extras.items()}
        self.sizes |= dict.fromkeys(("static_codes", "static_values"), timeless)
        for name, size in self.sizes.items():
            sink.create(name, size)
        for name in ("subjects", "offsets", "static_offsets"):
            self._whole(name, getattr(self, name))

    def place(self, piece: Piece) -> dict[int, str]:
        """Write a piece's rows to their places, each subject's by availability; returns store row -> image_id."""
        runs = np.searchsorted(self.subjects, piece.subjects)
        timed, static = _by_availability(piece), np.flatnonzero(piece.static)
        extras = [name for name, given in self.extras.items() if given]
        for name in ("times_us", "codes", "values", *extras):
            column = getattr(piece, name)
            column = np.full(len(piece.codes), -1) if column is None else column  # a shard without the others' column
            self._scatter(name, column[timed], self.offsets, runs)
        for name in ("codes", "values"):
            self._scatter(f"static_{name}", getattr(piece, name)[static], self.static_offsets, runs)
        if not piece.images:
            return {}
        lengths = (self.offsets[1:] - self.offsets[:-1])[runs]
        before = np.cumsum(lengths) - lengths
        place = np.full(len(piece.codes), -1)
        place[timed] = np.arange(len(timed)) + np.repeat(self.offsets[runs] - before, lengths)
        return {int(place[row]): image for row, image in piece.images.items() if place[row] >= 0}

    def finish(self, root: MedsRoot, images: dict[int, str]) -> dict[str, Any]:
        """Write what needs all rows; returns what ``store.json`` says."""
        rows = sorted(images)
        split_of = np.full(len(self.subjects), -1, np.int32)
        for i, ids in enumerate(root.splits.values()):
            split_of[np.isin(self.subjects, ids)] = i
        self._whole("image_rows", np.array(rows, np.int64))
        self._whole("split_of", split_of)
        meta = {
            "version": VERSION,
            "vocabulary": list(root.codes),
            "descriptions": root.descriptions,
            "splits": list(root.splits),
            "images": [images[row] for row in rows],
        }
        return meta | {"fingerprint": self._fingerprint(meta)}

    def _whole(self, name: str, values: np.ndarray) -> None:
        self.sizes[name] = len(values)
        self.sink.create(name, len(values))
        self.sink.write(name, 0, values)

    def _scatter(self, name: str, values: np.ndarray, offsets: np.ndarray, runs: np.ndarray) -> None:
        """Write the rows of some subjects, which lie behind one another; neighbours of the store in one go."""
        starts, stops = offsets[runs], offsets[runs + 1]
        first = np.flatnonzero(np.append(True, starts[1:] != stops[:-1]))
        edges = np.append(np.cumsum(stops - starts) - (stops - starts), len(values))[[*first, len(runs)]]
        for at, low, high in zip(starts[first].tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            self.sink.write(name, at, values[low:high])

    def _fingerprint(self, meta: dict[str, Any]) -> str:
        digest = hashlib.blake2b(json.dumps(meta, sort_keys=True).encode(), digest_size=16)
        for name in ARRAYS:
            digest.update(name.encode())
            for start in range(0, self.sizes[name], _CHUNK):
                digest.update(self.sink.read(name, start, min(start + _CHUNK, self.sizes[name])).view(np.uint8).data)
        return digest.hexdigest()


def _by_availability(piece: Piece) -> np.ndarray:
    """The timed rows of a piece, each subject's in the order in which they became available; ties stay as they lie."""
    timed = np.flatnonzero(~piece.static)
    if piece.available_us is piece.times_us:
        return timed
    if not len(timed):
        return timed
    available, run = piece.available_us[timed], np.repeat(np.arange(len(piece.subjects)), np.diff(piece.ends))[timed]
    first = np.flatnonzero(np.diff(run, prepend=-1))
    earliest, latest = np.minimum.reduceat(available, first), np.maximum.reduceat(available, first)
    reach = int((latest.view(np.uint64) - earliest.view(np.uint64)).max()) + 1  # exact, where int64 would overflow
    if reach * len(piece.subjects) >= 2**63:  # centuries of time in many subjects: one number cannot hold both
        return timed[np.lexsort((available, run))]
    since = available - np.repeat(earliest, np.diff(np.append(first, len(run))))
    return timed[np.argsort(run * reach + since, kind="stable")]  # almost in order, which this kind is quick with


def _fill_folder(folder: Path, root: MedsRoot) -> dict[str, Any]:
    """Both passes, without what an earlier build finished."""
    indices = [_indexed(folder / f"index_{number}.npz", path) for number, path in enumerate(root.shards)]
    check_indices(root, indices)
    sink = FolderSink(folder)
    with contextlib.closing(sink):
        layout = Layout(indices, sink)
        images: dict[int, str] = {}
        for shard, index in enumerate(indices):
            marks = [folder / f"piece_{shard}_{number}.json" for number in range(len(index.pieces()) - 1)]
            done = next((number for number, mark in enumerate(marks) if not mark.exists()), len(marks))
            for mark in marks[:done]:
                images |= {int(row): image for row, image in read_json(mark).items()}
            for mark, piece in zip(
                marks[done:], read_pieces(root, index, done) if done < len(marks) else (), strict=True
            ):
                placed = layout.place(piece)
                write_json(mark, placed)
                images |= placed
        return layout.finish(root, images)


def _indexed(file: Path, shard: Path) -> ShardIndex:
    """The index of a shard, from ``file`` where an earlier build wrote it."""
    if not file.exists():
        index = index_shard(shard)
        with atomic_path(file) as temporary, open(temporary, "wb") as handle:
            np.savez(handle, subjects=index.subjects, ends=index.ends, static=index.static, columns=index.columns)
        return index
    with np.load(file) as kept:
        return ShardIndex(shard, kept["subjects"], kept["ends"], kept["static"], tuple(kept["columns"].tolist()))


def _check_place(root: Path, folder: Path) -> None:
    """Refuse a folder that holds something other than a store, and one that lies in the source or holds it."""
    place, source = folder.resolve(), root.resolve()
    if place.is_relative_to(source) or source.is_relative_to(place):
        raise Refusal("OUT_IN_SOURCE", f"{folder} and {root} overlap", "Build the store in a folder of its own")
    if folder.exists() and not (folder / "store.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refusal(
            "OUTPUT_EXISTS", f"{folder} exists and is no event store", "Name another folder, or delete this one"
        )


def _swap(working: Path, folder: Path) -> None:
    """Give the working folder the store's name; what had it is moved aside first and then deleted, which may take long."""
    old = working.with_suffix(".old")
    while True:
        shutil.rmtree(old, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder, old)
        try:
            os.replace(working, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            continue  # without locks, another process put its store there meanwhile
        shutil.rmtree(old, ignore_errors=True)
        return


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """The working folder of a store, held by this process alone.

    A file system that knows no locks gives a folder of the process's own, which no later build goes on with.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    working, path = folder.with_name(f".{folder.name}.building"), folder.with_name(f".{folder.name}.lock")
    with contextlib.ExitStack() as closing:
        try:
            closing.enter_context(_hold(path))
        except OSError:
            working = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.building")
        try:
            working.mkdir(exist_ok=True)
            yield working
        finally:  # the last thing done while it is held: who waits for it will see that it is gone
            path.unlink(missing_ok=True)


def _hold(path: Path) -> IO[str]:
    """Wait for the lock and hold it. A file that was removed while waiting is no lock any more: the next one is taken."""
    while True:
        with contextlib.ExitStack() as closing:
            lock = closing.enter_context(open(path, "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                    closing.pop_all()
                    return lock


def _plan(working: Path, root: MedsRoot) -> dict[str, Any]:
    """What the store is built from. Whatever the folder holds of another root, version or boot of the machine is removed:
    what a machine had not yet written to its disk is lost when it goes down."""
    boot = _BOOT.read_text().strip() if _BOOT.is_file() else secrets.token_hex()
    plan = {"version": VERSION, "piece_rows": PIECE_ROWS, "boot": boot, **_stamp(root)}
    kept = read_json(working / "plan.json") if (working / "plan.json").is_file() else {}
    if {name: kept.get(name) for name in plan} != plan:
        for file in working.iterdir():
            file.unlink()
        kept = plan | {"sha256": _source_hash(root)}
        write_json(working / "plan.json", kept)
    return {name: kept[name] for name in ("names", "stamp", "sha256")}


def _stamp(root: MedsRoot) -> dict[str, str]:
    """Cheap marks of the root's files: hash of names and sizes, hash of change times."""
    files = [(path.relative_to(root.path).as_posix(), path.stat()) for path in root.files()]
    names = json.dumps([(name, stat.st_size) for name, stat in files])
    return {"names": _digest(names), "stamp": _digest(json.dumps([stat.st_mtime_ns for _, stat in files]))}


def _source_hash(root: MedsRoot) -> str:
    """Hash of the bytes of the root's files."""
    return _digest("\n".join(sha256(path) for path in root.files()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
