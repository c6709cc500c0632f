"""What a second ingest need not read again: ``ct/scan.parquet`` knows every file of the last one by a salted hash of its relative
path, a salted stamp of its size, times and inode, and the group that it is judged with.

A group is what decides volumes together: a series, or one NIfTI file. Its rows of the last manifest are repeated when its files are
the same, none came or went, and its volumes are whole. The table holds no identifier, path or date; it counts only beside the
manifest and index that were written with it, under the same settings, version and crosswalk. Its one limit: content that changes
between two looks while size, inode, modification and change time stay the same (within one tick of the disk's clock) goes unseen.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mmjepa.ct.store import transform_hash, voxel_file
from mmjepa.files import atomic_path, read_json, sha256
from mmjepa.identity import Crosswalk
from mmjepa.refusal import Refusal

_INDEX = ("subject_id", "time", "source_hash", "kernel", "thickness_mm", "n_slices")
_TRIED_AGAIN = {  # what the machine may be the reason of
    "CT_UNREADABLE", "CT_PIXEL_CORRUPT", "CT_DECODER_MISSING", "CT_OUT_OF_LIMITS", "CACHE_STALE", "NII_UNREADABLE",
}  # fmt: skip


class Entry(NamedTuple):
    """One file of a scan. group: what it is judged with, empty where it is judged alone. code: why it is skipped, if it is.
    patients: salted hashes of those whom it names, with blanks between them."""

    file: str
    stamp: str
    group: str
    code: str
    patients: str


@dataclass(frozen=True)
class Memory:
    """The last scan: its entries by file, and for each group the manifest's rows with their ``index``."""

    entries: Mapping[str, Entry] = field(default_factory=dict)
    rows: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)


def patients_of(entries: Iterable[Entry]) -> list[str]:
    """The salted hashes of all patients that the entries name."""
    return sorted({patient for entry in entries for patient in entry.patients.split()})


def stamp_of(path: Path, file: str, crosswalk: Crosswalk) -> str:
    """What changes when a file does; empty where it cannot be told."""
    try:
        facts = os.stat(path)
    except OSError:
        return ""
    return crosswalk.image_id(f"stamp:{file}:{facts.st_size}:{facts.st_mtime_ns}:{facts.st_ctime_ns}:{facts.st_ino}")


def key_of(crosswalk: Crosswalk, transform: dict[str, Any]) -> str:
    """Salted hash of what decides rows besides the files."""
    people = sorted(asdict(crosswalk)["_subjects"].items())
    return crosswalk.image_id("scan:" + json.dumps([transform, crosswalk.paired, people]))


def remember(folder: Path, key: str, entries: Sequence[Entry], groups: Mapping[str, str]) -> None:
    """Write the table, last of all outputs. groups: of each image_id."""
    kept = [entry._asdict() for entry in entries if entry.stamp]
    facts = {**_facts(folder, key), "groups": groups}
    schema = pa.schema([(name, pa.string()) for name in Entry._fields], metadata={"scan": json.dumps(facts)})
    with atomic_path(folder / "scan.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(kept, schema=schema), temporary)


def recall(folder: Path, key: str) -> Memory:
    """The last scan, an empty one where there is none that counts. Groups whose volumes are not whole are not in it."""
    try:
        table = pq.read_table(folder / "scan.parquet")
        facts = json.loads(table.schema.metadata[b"scan"])
        groups = facts.pop("groups")
        if facts != _facts(folder, key):
            return Memory()
        entries = [Entry(**row) for row in table.to_pylist()]
        index = {row["image_id"]: row for row in pq.read_table(folder / "index.parquet").to_pylist()}
        volumes = read_json(folder / "manifest.json")["volumes"]
        rows: dict[str, list[dict[str, Any]]] = {}
        again = set()
        for row in volumes:
            group, image_id = groups[row["image_id"]], row["image_id"]
            known = row if row["status"] == "refused" else _whole(row, index[image_id], folder / "volumes")
            if known is None or row.get("code") in _TRIED_AGAIN:
                again.add(group)
            else:
                rows.setdefault(group, []).append(known)
    except (OSError, pa.ArrowException, LookupError, TypeError, ValueError, Refusal):  # torn, or of another version
        return Memory()
    return Memory(
        {entry.file: entry for entry in entries if entry.group not in again},
        {group: known for group, known in rows.items() if group not in again},
    )


def _facts(folder: Path, key: str) -> dict[str, Any]:
    return {"key": key, "manifest": sha256(folder / "manifest.json"), "index": sha256(folder / "index.parquet")}


def _whole(row: dict[str, Any], index: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """The row of an accepted volume, to be repeated; None when its sidecar or voxels are not what was written."""
    try:
        sidecar = read_json(folder / f"{row['image_id']}.json")
        voxels = voxel_file(folder, row["image_id"], sidecar)
        same = sidecar["source_hash"] == index["source_hash"], voxels.stat().st_size == sidecar["bytes"]
        if not all(same) or sidecar["transform_hash"] != transform_hash(sidecar["settings"]):
            return None
    except (OSError, LookupError, TypeError, AttributeError, Refusal):  # the sidecar is no object, or not a whole one
        return None
    origin = [index[f"origin_{axis}"] for axis in "xyz"]
    return {**row, "status": "unchanged", "index": {**{name: index[name] for name in _INDEX}, "origin": origin}}
