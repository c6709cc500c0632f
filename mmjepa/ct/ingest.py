"""A folder of DICOM and NIfTI files -> int16 HU volumes, their index and a manifest that accounts for every file.

One rule: a series is loaded exactly, or refused with a code, or counted as skipped; nothing is guessed or repaired in silence.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed

from mmjepa import __version__, progress
from mmjepa.ct import nifti, resume, series
from mmjepa.ct.manifest import manifest_of, write_index, write_manifest
from mmjepa.ct.scan import scan
from mmjepa.ct.store import transform_hash, voxel_file, write_voxels
from mmjepa.ct.volume import Candidate, Settings, Volume, spacing_mm
from mmjepa.files import read_json, write_json
from mmjepa.identity import Crosswalk
from mmjepa.refusal import Refusal


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
    as unchanged (see ``mmjepa.ct.resume``). The result does not depend on
    ``workers``. The other arguments: see ``mmjepa.ct.volume.Settings``.

    Raises Refusal for what concerns the whole run: SOURCE_MISSING, OUT_IN_SOURCE, IDENTITY_IN_COHORT, CT_SETTINGS, CT_EMPTY,
    CACHE_STALE (volumes made with other settings), IMAGES_CSV_*, DISK_FULL, EXTRA_MISSING. What concerns one volume is a row of the manifest.
    """
    source, out = Path(source), Path(out)
    settings = Settings(min_slices, chest_p5_hu, rescale, nifti_hu, tilt, max_voxels, form)
    crosswalk.refuse_inside(out)
    _check_folders(source, out)
    transform = {**asdict(settings), "version": __version__}
    _check_transform(out / "ct" / "manifest.json", transform)

    key = resume.key_of(crosswalk, transform)
    scanned = scan(source, crosswalk, settings, resume.recall(out / "ct", key))
    rows = scanned.rows + _ingest_all(scanned.found, out / "ct" / "volumes", settings, transform, workers)
    rows.sort(key=lambda row: row["image_id"])
    manifest = manifest_of(rows, scanned.skips, scanned.files, transform, crosswalk.paired)
    if not rows:
        write_manifest(manifest, out / "ct")
        seen = ", ".join(f"{n} {code}" for code, n in manifest["skipped"].items())
        raise Refusal(
            "CT_EMPTY", f"no CT image among {scanned.files} files in {source}" + (f" ({seen})" if seen else "")
        )
    write_index(rows, out / "ct" / "index.parquet")
    write_manifest(manifest, out / "ct")
    resume.remember(out / "ct", key, scanned.entries, scanned.groups)
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
    """The sidecar of a volume that is there already, None when there is none. Raises CACHE_STALE when it is of other files."""
    path = folder / f"{found.image_id}.json"
    if not path.exists():
        return None
    sidecar = read_json(path)
    source = series.source_hash(found.parts) if found.kind == "dicom" else nifti.source_hash(found.parts[0])
    if sidecar["source_hash"] != source or sidecar["transform_hash"] != transform_hash(transform):
        raise Refusal(
            "CACHE_STALE",
            "a volume made from other files or settings is there already",
            "Name another out, or delete the volume's .npy and .json and ingest again",
        )
    voxels = voxel_file(folder, found.image_id, sidecar)
    return sidecar if voxels.exists() and voxels.stat().st_size == sidecar["bytes"] else None


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
        "settings": transform,
        "transform_hash": transform_hash(transform),
    }
    write_json(folder / f"{found.image_id}.json", sidecar)
    return sidecar
