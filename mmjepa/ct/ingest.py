"""A folder of DICOM and NIfTI files -> int16 HU volumes, their index and a manifest that accounts for every file.

One rule: a series is loaded exactly, or refused with a code, or counted as skipped; nothing is guessed or repaired in silence.
"""

import json
import os
import zlib
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed

from mmjepa import __version__, progress
from mmjepa.ct import nifti, resume, series
from mmjepa.ct.manifest import manifest_of, salt_check, write_index, write_manifest
from mmjepa.ct.scan import scan
from mmjepa.ct.store import FORMATS, transform_hash, voxel_file, write_voxels
from mmjepa.ct.turns import alone, writing
from mmjepa.ct.volume import Candidate, Settings, Volume, spacing_mm
from mmjepa.files import read_json, write_json
from mmjepa.identity import Crosswalk
from mmjepa.refusal import Refusal

_MOST_PROCESSES_A_CORE = 4
_SIDECAR = {"source_hash", "transform_hash", "format", "bytes", "crc32"}


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
    tilt: str = "refuse",
    max_voxels: int | None = None,
    form: str = "npy",
) -> dict[str, Any]:
    """Read every image below ``source`` into the cohort ``out``; return the manifest (also ``out/ct/manifest.json``,
    and as a table of what was refused, skipped or corrected ``out/ct/manifest.csv``).

    Writes ``ct/volumes/<image_id>.npy`` (or ``.b2nd``; int16 HU [X, Y, Z], RAS+) with a sidecar ``.json``, and ``ct/index.parquet``. A second
    run opens no file again whose size, times and inode are the same, nor decodes a volume whose files and settings are: it counts
    as unchanged (see ``mmjepa.ct.resume``); where it does open a volume's files again it reads the voxels too and compares their
    checksum (crc32, of the voxel file) with the sidecar's, so a run without ``ct/scan.parquet`` verifies everything. A damaged sidecar,
    voxel file or manifest is written again. The result does not depend on ``workers``. The other arguments: see ``mmjepa.ct.volume.Settings``.

    A volume of an earlier run that the source no longer holds leaves the index and is counted as ``removed``; its files stay, and
    count again when it comes back.

    Raises Refusal for what concerns the whole run: SOURCE_MISSING, SOURCE_UNREADABLE, SOURCE_OTHER (none of the volumes there comes from
    this source), SALT_CHANGED, OUT_IN_SOURCE, IDENTITY_IN_COHORT, CT_SETTINGS, CT_EMPTY, CACHE_STALE (volumes made with other settings),
    INGEST_RUNNING, IMAGES_CSV_*, IMAGE_ID_TWICE, SUBJECT_ID_TWICE, DISK_FULL, EXTRA_MISSING. What concerns one volume is a row of the manifest.
    """
    source, out = Path(source), Path(out)
    settings = Settings(min_slices, chest_p5_hu, rescale, nifti_hu, tilt, max_voxels, form)
    crosswalk.refuse_inside(out)
    _check_folders(source, out)
    transform = {**asdict(settings), "version": __version__}
    with alone(out / "ct"):
        _check_before(out / "ct" / "manifest.json", transform, crosswalk)
        return _ingest(source, out / "ct", settings, transform, crosswalk, workers)


def _ingest(
    source: Path, ct: Path, settings: Settings, transform: dict[str, Any], crosswalk: Crosswalk, workers: int
) -> dict[str, Any]:
    key = resume.key_of(crosswalk, transform)
    scanned = scan(source, crosswalk, settings, resume.recall(ct, key))
    removed = _removed(ct, [row["image_id"] for row in scanned.rows] + [one.image_id for one in scanned.found])
    rows = scanned.rows + _ingest_all(scanned.found, ct / "volumes", settings, transform, workers)
    rows.sort(key=lambda row: row["image_id"])
    manifest = manifest_of(rows, scanned.skips, scanned.files, removed, transform, crosswalk)
    if not rows:
        if not removed:
            write_manifest(manifest, ct)
        seen = ", ".join(f"{n} {code}" for code, n in manifest["skipped"].items())
        raise Refusal(
            "CT_EMPTY",
            f"no CT image among {scanned.files} files in {source}" + (f" ({seen})" if seen else ""),
            "Name the folder that holds DICOM or NIfTI files of CT",
        )
    write_index(rows, ct / "index.parquet")
    write_manifest(manifest, ct)
    resume.remember(ct, key, scanned.entries, scanned.groups)
    return manifest


def _check_folders(source: Path, out: Path) -> None:
    if not source.is_dir():
        raise Refusal("SOURCE_MISSING", f"{source} is not a folder", "Name the folder that holds the images")
    if out.resolve().is_relative_to(source.resolve()):
        raise Refusal("OUT_IN_SOURCE", f"{out} lies inside {source}", "Write the cohort to a folder of its own")


def _check_before(manifest: Path, transform: dict[str, Any], crosswalk: Crosswalk) -> None:
    before = _mapping(manifest)
    if before.get("volumes") and before.get("salt_check", salt_check(crosswalk)) != salt_check(crosswalk):
        raise Refusal(
            "SALT_CHANGED",
            f"the ids in {manifest.parent} were made with another salt",
            "Give the salt of the first run with --salt, or name another out",
        )
    if before.get("accepted") and before.get("settings") != json.loads(json.dumps(transform)):
        raise Refusal(
            "CACHE_STALE",
            f"{manifest.parent} was made with other settings or another version",
            "Name another out, or delete that folder and ingest again",
        )


def _mapping(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is none, or where the file is damaged: it is written again."""
    try:
        value = read_json(path)
    except Refusal:
        return {}
    return value if isinstance(value, dict) else {}


def _removed(ct: Path, image_ids: Sequence[str]) -> list[str]:
    """Volumes on the disk that this source has nothing of."""
    there = {path.stem for path in (ct / "volumes").glob("*.json")}
    if image_ids and there and there.isdisjoint(image_ids):
        raise Refusal(
            "SOURCE_OTHER",
            f"none of the {len(there)} volumes in {ct} comes from this source",
            "Name another out; or put all images below one folder and ingest that one. Was the folder or a file's place renamed?",
        )
    return sorted(there.difference(image_ids))


def _ingest_all(
    found: Sequence[Candidate], folder: Path, settings: Settings, transform: dict[str, Any], workers: int
) -> list[dict[str, Any]]:
    common = folder, settings, transform, os.getpid()
    workers = min(workers, len(found), _MOST_PROCESSES_A_CORE * (os.cpu_count() or 1))
    if workers < 2:
        results: Generator[dict[str, Any], None, None] = (ingest_one(one, *common) for one in found)
    else:
        tasks = (delayed(ingest_one)(one, *common) for one in found)
        results = Parallel(n_jobs=workers, return_as="generator")(tasks)
    with closing(results):  # an interrupt ends the workers
        return list(progress.track(results, "volumes", total=len(found)))


def ingest_one(
    found: Candidate, folder: Path, settings: Settings, transform: dict[str, Any], parent: int
) -> dict[str, Any]:
    """Decode one candidate and write it, or say why not. The row holds the manifest's fields and, when accepted, the index's.

    parent: the process whose run this is.
    """
    row: dict[str, Any] = {"image_id": found.image_id, "source_kind": found.kind, "flags": list(found.flags)}
    try:
        if found.refusal:
            raise found.refusal
        sidecar = _unchanged(found, folder, transform)
        status = "unchanged" if sidecar else "accepted"
        if not sidecar:
            volume = _reader(found).read_volume(found, settings)
            with writing(folder, parent):
                sidecar = _write_volume(found, volume, folder, transform)
    except MemoryError:
        refusal = Refusal("CT_OUT_OF_LIMITS", "the volume does not fit the memory")
        return _refused(row, refusal)
    except Refusal as refusal:
        if refusal.code in ("DISK_FULL", "EXTRA_MISSING"):
            raise
        return _refused(row, refusal)
    index = {
        "subject_id": found.subject_id,
        "time": found.time,
        "origin": [line[3] for line in sidecar["affine"][:3]],
        "source_hash": sidecar["source_hash"],
        "kernel": found.kernel,
        "thickness_mm": found.thickness_mm,
        "n_slices": len(found.parts) if found.kind == "dicom" else sidecar["shape"][2],
    }
    shown = {name: sidecar[name] for name in ("shape", "spacing_mm", "hu_range")}
    return {**row, "status": status, **shown, "index": index}


def _refused(row: dict[str, Any], why: Refusal) -> dict[str, Any]:
    return {**row, "status": "refused", "code": why.code, "message": why.message, "hint": why.hint}


def _reader(found: Candidate) -> Any:
    return series if found.kind == "dicom" else nifti


def _unchanged(found: Candidate, folder: Path, transform: dict[str, Any]) -> dict[str, Any] | None:
    """The sidecar of a volume that is there already, None when there is none or one of the two files is damaged.

    Its source is read again here, and so are its voxels. Raises CACHE_STALE when the volume is of other files.
    """
    sidecar = _mapping(folder / f"{found.image_id}.json")
    if not _is_sound(sidecar):
        return None
    source = series.source_hash(found.parts) if found.kind == "dicom" else nifti.source_hash(found.parts[0])
    if sidecar["source_hash"] != source or sidecar["transform_hash"] != transform_hash(transform):
        raise Refusal(
            "CACHE_STALE",
            "a volume made from other files or settings is there already",
            "Name another out, or delete the volume's .npy and .json and ingest again",
        )
    voxels = voxel_file(folder, found.image_id, sidecar)
    whole = voxels.exists() and voxels.stat().st_size == sidecar["bytes"] and _crc32(voxels) == sidecar["crc32"]
    return sidecar if whole else None


def _is_sound(sidecar: dict[str, Any]) -> bool:
    try:
        affine = np.array(sidecar["affine"], dtype=float)
        numbers = [*sidecar["shape"], *sidecar["spacing_mm"], *sidecar["hu_range"]]
        return (
            affine.shape == (4, 4) and len(numbers) == 8 and sidecar.keys() >= _SIDECAR and sidecar["format"] in FORMATS
        )
    except (LookupError, TypeError, ValueError):
        return False


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as handle:
        while piece := handle.read(1 << 20):
            value = zlib.crc32(piece, value)
    return value


def _write_volume(found: Candidate, volume: Volume, folder: Path, transform: dict[str, Any]) -> dict[str, Any]:
    """Voxels first, sidecar last: a sidecar says that the voxels are whole."""
    written = write_voxels(folder, found.image_id, volume.hu, transform["form"])
    sidecar = {
        "shape": list(volume.hu.shape),
        "spacing_mm": list(spacing_mm(volume.affine)),
        "affine": volume.affine.tolist(),
        "hu_range": list(volume.hu_range),
        "scanner": {"maker": found.maker, "kvp": found.kvp, "kernel": found.kernel, "thickness_mm": found.thickness_mm},
        "source_hash": volume.source_hash,
        **written,
        "crc32": _crc32(voxel_file(folder, found.image_id, written)),
        "padding_voxels": volume.padding_voxels,
        "settings": transform,
        "transform_hash": transform_hash(transform),
    }
    write_json(folder / f"{found.image_id}.json", sidecar)
    return sidecar
