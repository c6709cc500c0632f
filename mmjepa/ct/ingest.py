"""A folder of DICOM and NIfTI files -> int16 HU volumes, their index and a manifest that accounts for every file.

One rule: a series is loaded exactly, or refused with a code, or counted as skipped; nothing is guessed or repaired in silence.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from joblib import Parallel, delayed

from mmjepa import __version__, progress
from mmjepa.ct import dicom, nifti, series
from mmjepa.ct.dicom import Slice
from mmjepa.ct.volume import Candidate, Settings, Volume, relative, spacing_mm
from mmjepa.files import atomic_path, read_json, write_json
from mmjepa.identity import Crosswalk
from mmjepa.refusal import Refusal

INDEX = pa.schema(
    [("image_id", pa.string()), ("subject_id", pa.int64()), ("time", pa.timestamp("us"))]
    + [(f"spacing_{axis}", pa.float64()) for axis in "xyz"]
    + [(f"shape_{axis}", pa.int64()) for axis in "xyz"]
    + [(f"origin_{axis}", pa.float64()) for axis in "xyz"]
    + [("source_hash", pa.string()), ("source_kind", pa.string()), ("kernel", pa.string())]
    + [("thickness_mm", pa.float64()), ("n_slices", pa.int64()), ("flags", pa.string())]
)
_HEAD_BYTES = 4096


def ingest_images(
    source: Path | str,
    out: Path | str,
    *,
    crosswalk: Crosswalk,
    workers: int = 1,
    min_slices: int = 4,
    chest_p5_hu: float | None = -700.0,
    rescale: tuple[float, float] | None = None,
    nifti_hu: str = "auto",
) -> dict[str, Any]:
    """Read every image below ``source`` into the cohort ``out``; return the manifest (also ``out/ct/manifest.json``).

    Writes ``ct/volumes/<image_id>.npy`` (int16 HU [X, Y, Z], RAS+) with a sidecar ``.json``, and ``ct/index.parquet``. A second
    run decodes nothing again: a volume whose files and settings are the same counts as unchanged. The result does not depend on
    ``workers``. ``min_slices``, ``chest_p5_hu``, ``rescale``, ``nifti_hu``: see ``mmjepa.ct.volume.Settings``.

    Raises Refusal for what concerns the whole run: SOURCE_MISSING, OUT_IN_SOURCE, IDENTITY_IN_COHORT, CT_SETTINGS, CT_EMPTY,
    CACHE_STALE (volumes made with other settings), IMAGES_CSV_*, DISK_FULL. What concerns one volume is a row of the manifest.
    """
    source, out = Path(source), Path(out)
    settings = Settings(min_slices, chest_p5_hu, rescale, nifti_hu)
    crosswalk.refuse_inside(out)
    _check_folders(source, out)
    transform = {**asdict(settings), "version": __version__}
    _check_transform(out / "ct" / "manifest.json", transform)

    found, crosswalk, skipped, files = scan(source, crosswalk, settings)
    rows = _ingest_all(found, out / "ct" / "volumes", settings, transform, workers)
    manifest = _manifest(rows, skipped, files, transform, crosswalk.paired)
    if not found:
        write_json(out / "ct" / "manifest.json", manifest)
        seen = ", ".join(f"{n} {code}" for code, n in manifest["skipped"].items())
        raise Refusal("CT_EMPTY", f"no CT image among {files} files in {source}" + (f" ({seen})" if seen else ""))
    _write_index(rows, out / "ct" / "index.parquet")
    write_json(out / "ct" / "manifest.json", manifest)
    return manifest


def _check_folders(source: Path, out: Path) -> None:
    if not source.is_dir():
        raise Refusal("SOURCE_MISSING", f"{source} is not a folder", "Name the folder that holds the images")
    if out.resolve().is_relative_to(source.resolve()):
        raise Refusal("OUT_IN_SOURCE", f"{out} lies inside {source}", "Write the cohort to a folder of its own")


def _check_transform(manifest: Path, transform: dict[str, Any]) -> None:
    before = read_json(manifest) if manifest.exists() else {}
    if before.get("accepted") and before.get("settings") != json.loads(json.dumps(transform)):
        raise Refusal(
            "CACHE_STALE",
            f"{manifest.parent} was made with other settings or another version",
            "Name another out, or delete that folder and ingest again",
        )


def scan(
    source: Path, crosswalk: Crosswalk, settings: Settings
) -> tuple[list[Candidate], Crosswalk, Counter[str], int]:
    """Find what could be a volume, by headers alone: candidates in the order of image_id, the crosswalk with every patient
    numbered (where it numbers), how many files were skipped by code, and how many files there are."""
    skipped: Counter[str] = Counter()
    slices: list[Slice] = []
    niftis: list[Path] = []
    tables: list[Path] = []
    unreadable: list[tuple[str, Refusal]] = []
    paths = _walk(source)
    for number, path in enumerate(progress.track(paths, "reading headers"), start=1):
        try:
            kind = _kind(path, number)
            header = dicom.read_header(path, number) if kind == "dicom" else "CT_NOT_DICOM"
        except Refusal as refusal:
            unreadable.append((relative(path, source), refusal))
            continue
        if kind == "table":
            tables.append(path)
        elif kind == "nifti":
            niftis.append(path)
        elif isinstance(header, Slice):
            slices.append(header)
        else:
            skipped[header] += 1
    if len(tables) > 1:
        raise Refusal(
            "IMAGES_CSV_SEVERAL", f"{len(tables)} files {nifti.TABLE} in {source}", "Keep one, above all NIfTI files"
        )
    table = tables[0] if tables else None
    crosswalk = crosswalk.numbered(
        {part.patient_id for part in slices} - {""} | (nifti.patients(table) if table else set())
    )
    single = series.without_copies(slices)
    if len(single) < len(slices):
        skipped["CT_DUPLICATE_FILE"] = len(slices) - len(single)
    found = series.candidates(single, crosswalk, settings) + nifti.candidates(niftis, source, table, crosswalk)
    found += [Candidate(crosswalk.image_id(f"file:{name}"), "dicom", refusal=why) for name, why in unreadable]
    return _in_order(found), crosswalk, skipped, len(paths)


def _walk(source: Path) -> list[Path]:
    """Every file below ``source`` in a fixed order. A folder that cannot be listed is refused, or its images would vanish."""

    def refuse(error: OSError) -> None:
        raise Refusal("SOURCE_UNREADABLE", f"a folder in {source} cannot be listed ({error.strerror})")

    return sorted(Path(folder) / name for folder, _, names in os.walk(source, onerror=refuse) for name in names)


def _kind(path: Path, number: int) -> str:
    if path.name == nifti.TABLE:
        return "table"
    try:
        with open(path, "rb") as handle:
            head = handle.read(_HEAD_BYTES)
    except OSError as error:
        raise Refusal("CT_UNREADABLE", f"file {number} cannot be read ({error.strerror})") from None
    if nifti.looks_like_nifti(path, head):
        return "nifti"
    return "dicom" if dicom.looks_like_dicom(head) else "other"


def _in_order(found: Iterable[Candidate]) -> list[Candidate]:
    ordered = sorted(found, key=lambda candidate: candidate.image_id)
    for one, next_one in pairwise(ordered):
        if one.image_id == next_one.image_id:
            raise Refusal("IMAGE_ID_TWICE", f"two volumes get the image_id {one.image_id}", "Use another salt")
    return ordered


def _ingest_all(
    found: Sequence[Candidate], folder: Path, settings: Settings, transform: dict[str, Any], workers: int
) -> list[dict[str, Any]]:
    if workers == 1 or len(found) < 2:
        results: Iterable[dict[str, Any]] = (ingest_one(one, folder, settings, transform) for one in found)
    else:
        tasks = (delayed(ingest_one)(one, folder, settings, transform) for one in found)
        results = Parallel(n_jobs=workers, return_as="generator")(tasks)
    return list(progress.track(results, "volumes", total=len(found)))


def ingest_one(found: Candidate, folder: Path, settings: Settings, transform: dict[str, Any]) -> dict[str, Any]:
    """Decode one candidate and write it, or say why not. The row holds the manifest's fields and, when accepted, the index's."""
    row: dict[str, Any] = {"image_id": found.image_id, "source_kind": found.kind, "flags": list(found.flags)}
    try:
        if found.refusal:
            raise found.refusal
        sidecar = _unchanged(found, folder, transform)
        status = "unchanged" if sidecar else "accepted"
        sidecar = sidecar or _write_volume(found, _reader(found).read_volume(found, settings), folder, transform)
    except Refusal as refusal:
        if refusal.code == "DISK_FULL":
            raise
        return {**row, "status": "refused", "code": refusal.code, "message": refusal.message, "hint": refusal.hint}
    index = {
        "subject_id": found.subject_id,
        "time": found.time,
        "origin": [line[3] for line in sidecar["affine"][:3]],
        "source_hash": sidecar["source_hash"],
        "kernel": found.kernel,
        "thickness_mm": found.thickness_mm,
        "n_slices": len(found.parts) if found.kind == "dicom" else sidecar["shape"][2],
    }
    return {**row, "status": status, "shape": sidecar["shape"], "spacing_mm": sidecar["spacing_mm"], "index": index}


def _reader(found: Candidate) -> Any:
    return series if found.kind == "dicom" else nifti


def _unchanged(found: Candidate, folder: Path, transform: dict[str, Any]) -> dict[str, Any] | None:
    """The sidecar of a volume that is there already, None when there is none. Raises CACHE_STALE when it is of other files."""
    path = folder / f"{found.image_id}.json"
    if not path.exists():
        return None
    sidecar = read_json(path)
    source = series.source_hash(found.parts) if found.kind == "dicom" else nifti.source_hash(found.parts[0])
    if sidecar["source_hash"] != source or sidecar["transform_hash"] != _hash(transform):
        raise Refusal(
            "CACHE_STALE",
            "a volume made from other files or settings is there already",
            "Name another out, or delete the volume's .npy and .json and ingest again",
        )
    voxels = folder / f"{found.image_id}.npy"
    return sidecar if voxels.exists() and voxels.stat().st_size == sidecar["bytes"] else None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write_volume(found: Candidate, volume: Volume, folder: Path, transform: dict[str, Any]) -> dict[str, Any]:
    """Voxels first, sidecar last: a sidecar says that the voxels are whole."""
    with atomic_path(folder / f"{found.image_id}.npy") as temporary, open(temporary, "wb") as handle:
        write_npy(handle, volume.hu)
        size = handle.tell()
    sidecar = {
        "shape": list(volume.hu.shape),
        "spacing_mm": list(spacing_mm(volume.affine)),
        "affine": volume.affine.tolist(),
        "source_hash": volume.source_hash,
        "bytes": size,
        "settings": transform,
        "transform_hash": _hash(transform),
    }
    write_json(folder / f"{found.image_id}.json", sidecar)
    return sidecar


def write_npy(handle: BinaryIO, array: np.ndarray) -> None:
    """``np.save`` to a file whose errors keep their number: numpy's own loses "no space left"."""
    array = np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(handle, np.lib.format.header_data_from_array_1_0(array))
    handle.write(array.data)


def _manifest(
    rows: Sequence[dict[str, Any]], skipped: Counter[str], files: int, transform: dict[str, Any], paired: bool
) -> dict[str, Any]:
    states = Counter(row["status"] for row in rows)
    return {
        "settings": json.loads(json.dumps(transform)),
        "paired": paired,
        "files": files,
        "accepted": states["accepted"] + states["unchanged"],
        "unchanged": states["unchanged"],
        "refused": dict(sorted(Counter(row["code"] for row in rows if row["status"] == "refused").items())),
        "skipped": dict(sorted(skipped.items())),
        "volumes": [{name: value for name, value in row.items() if name != "index"} for row in rows],
    }


def _write_index(rows: Sequence[dict[str, Any]], path: Path) -> None:
    table = []
    for row in rows:
        if row["status"] == "refused":
            continue
        line = {
            "image_id": row["image_id"],
            "source_kind": row["source_kind"],
            "flags": ",".join(row["flags"]),
            **row["index"],
        }
        for name, values in (("spacing", row["spacing_mm"]), ("shape", row["shape"]), ("origin", line.pop("origin"))):
            line |= {f"{name}_{axis}": value for axis, value in zip("xyz", values, strict=True)}
        table.append(line)
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(table, schema=INDEX), temporary)
