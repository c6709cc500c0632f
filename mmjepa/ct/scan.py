"""What a folder holds, by headers alone: candidates for volumes, files that are skipped, and what is known from the last time."""

import os
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from mmjepa import progress
from mmjepa.ct import dicom, enhanced, nifti, series
from mmjepa.ct.dicom import ENHANCED, HEAD_BYTES, Left, Slice
from mmjepa.ct.manifest import Skip
from mmjepa.ct.resume import Entry, Memory, patients_of, stamp_of
from mmjepa.ct.volume import Candidate, Settings, relative
from mmjepa.identity import Crosswalk, check_subjects
from mmjepa.refusal import Refusal

_TABLE, _NIFTI, _DAMAGED = "table", "nifti:", "damaged"
_BESIDE = "CT_UNREADABLE_BESIDE"
_ENDINGS = {".dcm", ".dicom", ".ima"}


class Scan(NamedTuple):
    """found: candidates in the order of image_id. rows: of the manifest, repeated from the last run. files: how many there are.
    entries, groups: what ``resume.remember`` writes."""

    found: list[Candidate]
    rows: list[dict[str, Any]]
    skips: list[Skip]
    files: int
    entries: list[Entry]
    groups: dict[str, str]


@dataclass
class _Read:
    """What was read of files, by path."""

    parts: dict[Path, list[Slice]] = field(default_factory=dict)
    left: dict[Path, Left] = field(default_factory=dict)
    niftis: set[Path] = field(default_factory=set)
    tables: set[Path] = field(default_factory=set)
    unreadable: dict[Path, Refusal] = field(default_factory=dict)
    damaged: set[Path] = field(default_factory=set)  # of those left: what may have been a slice


def scan(source: Path, crosswalk: Crosswalk, settings: Settings, memory: Memory | None = None) -> Scan:
    """Find what could be a volume. What ``memory`` knows is read again only where it is judged with files that changed, came
    or went."""
    memory = memory or Memory()
    paths, closed = walk(source)
    files = {path: crosswalk.image_id(f"file:{relative(path, source)}") for path in paths}
    stamps = {path: stamp_of(path, file, crosswalk) for path, file in files.items()}
    read, kept, groups = _read_what_changed(files, stamps, memory, crosswalk)

    tables = [path for path in paths if path in read.tables or (path in kept and kept[path].group == _TABLE)]
    if len(tables) > 1:
        raise Refusal(
            "IMAGES_CSV_SEVERAL", f"{len(tables)} files {nifti.TABLE} in {source}", "Keep one, above all NIfTI files"
        )
    table = tables[0] if tables else None
    niftis = [path for path in paths if path in read.niftis or (path in kept and kept[path].group.startswith(_NIFTI))]
    slices = [part for path in paths for part in read.parts.get(path, ())]
    judge_niftis = _TABLE in groups or any(group.startswith(_NIFTI) for group in groups)
    in_table = nifti.patients(table) if table and judge_niftis else set()
    crosswalk = crosswalk.numbered({part.patient_id for part in slices} - {""} | in_table)
    single = series.without_copies(slices)
    read.left |= {path: Left("CT_DUPLICATE_FILE") for path in read.parts.keys() - {part.path for part in single}}
    found = series.candidates(single, crosswalk, settings, list(read.left.values()))
    if judge_niftis:
        groups.add(_TABLE)  # a row of it may name a file that came or went
        for one in nifti.candidates(niftis, source, table, crosswalk, settings):
            path = one.parts[0].path if one.parts else None
            if path not in kept:
                found.append(replace(one, group=_NIFTI + files[path] if path else _TABLE))
    found += [Candidate(files[path], "dicom", refusal=why, group=files[path]) for path, why in read.unreadable.items()]
    found += [_closed_folder(crosswalk.image_id(f"file:{relative(path, source)}"), why) for path, why in closed.items()]

    entries = [kept.get(path) or _entry(path, stamps[path], files, read, crosswalk, in_table) for path in paths]
    if not crosswalk.paired:
        check_subjects(patients_of(entries))
    rows = [dict(row) for group, known in memory.rows.items() if group not in groups for row in known]
    skips = [Skip(n, entry.file, entry.code) for n, entry in enumerate(entries, start=1) if entry.code]
    group_of = {one.image_id: one.group for one in found} | {
        row["image_id"]: group for group, known in memory.rows.items() if group not in groups for row in known
    }
    _flag_beside(paths, entries, read, found, rows, group_of)
    found.sort(key=lambda candidate: candidate.image_id)
    _check_ids([one.image_id for one in found] + [row["image_id"] for row in rows])
    return Scan(found, rows, skips, len(paths), entries, group_of)


def _read_what_changed(
    files: Mapping[Path, str], stamps: Mapping[Path, str], memory: Memory, crosswalk: Crosswalk
) -> tuple[_Read, dict[Path, Entry], set[str]]:
    """What was read, the entries of the files that were not, and the groups that are judged anew."""
    numbers = {path: number for number, path in enumerate(files, start=1)}
    known = {path: memory.entries[file] for path, file in files.items() if file in memory.entries}
    kept = {path: entry for path, entry in known.items() if entry.stamp == stamps[path]}
    changed = [path for path in files if path not in kept]
    groups = {memory.entries[file].group for file in memory.entries.keys() - set(files.values())}
    groups |= {known[path].group for path in changed if path in known}
    read = _Read()
    while True:
        with dicom.quiet():  # once: it costs as much as a header
            for path in progress.track(changed, "reading headers"):
                _read_one(path, numbers[path], read)
        groups |= {_group(path, files, read, crosswalk) for path in changed}
        joined = {path for path, entry in kept.items() if _is_judged_with(entry.group, groups)}
        if not joined:
            return read, kept, groups - {""}
        changed = [path for path in files if path in joined]
        kept = {path: entry for path, entry in kept.items() if path not in joined}


def _is_judged_with(group: str, groups: set[str]) -> bool:
    if group == _TABLE:
        return False  # other files change nothing in it
    return bool(group) and (group in groups or (_TABLE in groups and group.startswith(_NIFTI)))


def _read_one(path: Path, number: int, read: _Read) -> None:
    try:
        kind, head = _kind(path, number)
        if kind == "table":
            read.tables.add(path)
        elif kind == "nifti":
            read.niftis.add(path)
        else:
            parts = _headers(path, number, head) if kind == "dicom" else Left("CT_NOT_DICOM")
            if isinstance(parts, Left):
                read.left[path] = parts
                unmarked = kind == "dicom" and head[128:132] != b"DICM"
                if parts.code == "CT_NOT_DICOM" and (kind == "damaged" or unmarked):
                    read.damaged.add(path)
            else:
                read.parts[path] = parts
    except Refusal as refusal:
        read.unreadable[path] = refusal


def _group(path: Path, files: Mapping[Path, str], read: _Read, crosswalk: Crosswalk) -> str:
    """What a file that was read is judged with."""
    if path in read.parts:
        return crosswalk.image_id(read.parts[path][0].series_uid)
    if path in read.damaged:
        return _DAMAGED
    if path in read.left:
        uid = read.left[path].series_uid
        return crosswalk.image_id(uid) if uid else ""
    if path in read.unreadable:
        return files[path]
    return _TABLE if path in read.tables else _NIFTI + files[path]


def _entry(
    path: Path, stamp: str, files: Mapping[Path, str], read: _Read, crosswalk: Crosswalk, in_table: set[str]
) -> Entry:
    people = {part.patient_id for part in read.parts.get(path, ())} - {""} | (
        in_table if path in read.tables else set()
    )
    patients = " ".join(sorted(_patient(patient, crosswalk) for patient in people))
    code = read.left[path].code if path in read.left else ""
    return Entry(files[path], stamp, _group(path, files, read, crosswalk), code, patients)


def _patient(patient: str, crosswalk: Crosswalk) -> str:
    return crosswalk.image_id(f"patient:{patient}")


def _flag_beside(
    paths: Sequence[Path],
    entries: Sequence[Entry],
    read: _Read,
    found: list[Candidate],
    rows: Sequence[dict[str, Any]],
    group_of: Mapping[str, str],
) -> None:
    """Flag every volume of DICOM files in whose folder lies a file that may have been its slice and cannot be read."""
    lost = {
        path for path, entry in zip(paths, entries, strict=True) if entry.group == _DAMAGED
    } | read.unreadable.keys()
    folders = {path.parent for path in lost}
    near = {
        entry.group
        for path, entry in zip(paths, entries, strict=True)
        if path.parent in folders
        and path not in lost
        and not entry.code
        and not entry.group.startswith((_NIFTI, _TABLE))
    }
    for k, one in enumerate(found):
        if one.group in near:
            found[k] = replace(one, flags=(*one.flags, _BESIDE))
    for row in rows:
        flags = [flag for flag in row["flags"] if flag != _BESIDE]
        row["flags"] = flags + [_BESIDE] * (group_of[row["image_id"]] in near)


def _headers(path: Path, number: int, head: bytes) -> list[Slice] | Left:
    """The slices of one file, or why it is skipped."""
    header = dicom.read_header(path, number, head)
    if isinstance(header, Left):
        return header
    return enhanced.frames(header) if header.sop_class in ENHANCED else [header]


def _closed_folder(folder: str, reason: str) -> Candidate:
    why = Refusal("CT_UNREADABLE", f"a folder cannot be listed ({reason})", "Allow yourself to read it, and run again")
    return Candidate(folder, "dicom", refusal=why, group=folder)


def walk(source: Path) -> tuple[list[Path], dict[Path, str]]:
    """Every file below ``source`` in a fixed order, through links to folders too, each folder once; and the folders that cannot be
    listed, with the reason. Raises Refusal SOURCE_UNREADABLE where that is the source itself."""
    closed: dict[Path, str] = {}

    def note(error: OSError) -> None:
        reason = error.strerror or type(error).__name__
        if Path(error.filename) == source:
            raise Refusal("SOURCE_UNREADABLE", f"{source} cannot be listed ({reason})", "Allow yourself to read it")
        closed[Path(error.filename)] = reason

    paths = []
    seen = set()
    for folder, below, names in os.walk(source, onerror=note, followlinks=True):
        facts = os.stat(folder)
        if (facts.st_dev, facts.st_ino) in seen:
            below.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        below.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        paths += [Path(folder) / name for name in names]
    return sorted(paths), closed


def _kind(path: Path, number: int) -> tuple[str, bytes]:
    """What a file is, and its first bytes."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever
            return "other", b""
        if path.name == nifti.TABLE:
            return "table", b""
        with open(path, "rb", buffering=0) as handle:
            head = handle.read(HEAD_BYTES)
    except OSError as error:
        raise Refusal("CT_UNREADABLE", f"file {number} cannot be read ({error.strerror})") from None
    if nifti.looks_like_nifti(path, head):
        return "nifti", head
    if dicom.looks_like_dicom(head):
        return "dicom", head
    return ("damaged" if not head[:128].strip(b"\0") or path.suffix.lower() in _ENDINGS else "other"), head


def _check_ids(ids: Sequence[str]) -> None:
    twice = [image_id for image_id, count in Counter(ids).items() if count > 1]
    if twice:
        raise Refusal("IMAGE_ID_TWICE", f"two volumes get the image_id {twice[0]}", "Use another salt")
