"""A source folder into a cohort: records, images, labels, and the store built from them."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mmjepa.cohort import Cohort, read_labels, task_names
from mmjepa.ct.ingest import ingest_images
from mmjepa.ehr.meds_io import ingest_meds, open_root
from mmjepa.files import atomic_path, sha256
from mmjepa.identity import Crosswalk, salt_at
from mmjepa.refusal import Refusal

COHORT_PARTS = ("ehr", "ct", "labels", "store")
SOURCE_PARTS = ("images", "identity", "truth")


@dataclass(frozen=True)
class Source:
    """Where the parts lie. records: the folder to give to ``ingest_meds``; images: a tree of files; either may be None."""

    records: Path | None
    images: Path | None
    crosswalk: Path | None
    salt: Path | None


def ingest(
    source: Path | None,
    out: Path,
    *,
    ehr: Path | None = None,
    ct: Path | None = None,
    crosswalk: Path | None = None,
    salt: Path | None = None,
    workers: int = 1,
    **settings: Any,
) -> dict[str, Any]:
    """Make the cohort ``out``, or go on with it: what is there and unchanged is not read again.

    source: a folder with ``ehr/`` and/or ``images/`` (and ``labels/``, ``identity/``), a bare MEDS root, or a tree of images.
    ehr, ct, crosswalk, salt: the parts by name, before those of ``source``. workers: processes that read images.
    settings: of the images, see ``mmjepa.ct.volume.Settings`` (min_slices, rescale, tilt, ...).
    Without a crosswalk the images' subjects are numbered and cannot be paired with records; their salt is then made in
    ``<out>.salt.txt`` beside the cohort.

    Returns the counts of both parts, the number of subjects with both, and ``notes`` for people.
    Raises Refusal: SOURCE_MISSING, SOURCE_EMPTY, OUT_NOT_COHORT, OUT_IN_SOURCE, OUTPUT_EXISTS and those of the readers.
    """
    out = Path(out)
    found = _find(source, ehr, ct, crosswalk, salt)
    _check(out, source, workers)
    result: dict[str, Any] = {"cohort": str(out), "ehr": None, "ct": None, "subjects_with_both": 0}
    notes: list[str] = []
    if found.records is not None:
        result["ehr"] = _records(found.records, out)
    if found.images is not None:
        people = _identity(found, out, notes)
        manifest = ingest_images(found.images, out, crosswalk=people, workers=workers, **settings)
        result["ct"] = _counts(manifest)
    if (out / "ehr").is_dir():
        store = Cohort.open(out).events()
        result["store"] = {
            "subjects": len(store.subjects),
            "events": len(store.codes),
            "fingerprint": store.fingerprint,
        }
        if (out / "ct" / "index.parquet").is_file():
            imaged = pd.read_parquet(out / "ct" / "index.parquet", columns=["subject_id"])["subject_id"]
            result["subjects_with_both"] = int(imaged.drop_duplicates().isin(store.subjects).sum())
    return {**result, "notes": notes}


def ingest_ct(
    source: Path,
    out: Path,
    *,
    crosswalk: Path | None = None,
    salt: Path | None = None,
    workers: int = 1,
    **settings: Any,
) -> dict[str, Any]:
    """The images below ``source`` alone, as ``ingest`` takes them in: the same cohort, arguments and refusals.

    Returns the counts, ``volumes`` (of each its geometry, HU range and codes, or why it was refused) and ``notes``.
    """
    out = Path(out)
    found = _find(source, None, None if (source / "images").is_dir() else source, crosswalk, salt)
    _check(out, source, workers)
    notes: list[str] = []
    manifest = ingest_images(
        found.images or source, out, crosswalk=_identity(found, out, notes), workers=workers, **settings
    )
    table = out / "ct" / "manifest.csv"
    return {
        "cohort": str(out),
        **_counts(manifest),
        "volumes": manifest["volumes"],
        "table": str(table),
        "notes": notes,
    }


def _counts(manifest: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in manifest.items() if name not in ("volumes", "settings", "skipped_files")}


def _find(source: Path | None, ehr: Path | None, ct: Path | None, crosswalk: Path | None, salt: Path | None) -> Source:
    for path in (source, ehr, ct):
        if path is not None and not path.is_dir():
            raise Refusal(
                "SOURCE_MISSING", f"{path} is not a folder", "Name the folder that holds the records or images"
            )
    if source is not None:
        is_meds = (source / "data").is_dir() and (source / "metadata").is_dir()
        whole = any((source / part).is_dir() for part in ("ehr", "images"))
        ehr = ehr or (source if is_meds or (source / "ehr").is_dir() else None)
        ct = ct or (source / "images" if (source / "images").is_dir() else None if is_meds or whole else source)
        identity = source / "identity"
        crosswalk = crosswalk or _if_file(identity / "crosswalk.csv")
        salt = salt or _if_file(identity / "salt.txt")
    if crosswalk is not None:
        salt = salt or crosswalk.parent / "salt.txt"
    if ehr is None and ct is None:
        raise Refusal("SOURCE_EMPTY", "nothing to ingest", "Name a source folder, or --ehr and --ct")
    return Source(ehr, ct, crosswalk, salt)


def _if_file(path: Path) -> Path | None:
    return path if path.is_file() else None


def _check(out: Path, source: Path | None, workers: int) -> None:
    if source is not None and out.resolve().is_relative_to(source.resolve()):
        raise Refusal("OUT_IN_SOURCE", f"{out} lies inside {source}", "Write the cohort to a folder of its own")
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if (out.exists() and not out.is_dir()) or (there and (not there & set(COHORT_PARTS) or there & set(SOURCE_PARTS))):
        raise Refusal("OUT_NOT_COHORT", f"{out} exists and is not a cohort", "Name a new folder with --out")
    if workers < 1:
        raise Refusal("WORKERS", f"workers is {workers}, want 1 or more")


def _identity(found: Source, out: Path, notes: list[str]) -> Crosswalk:
    if found.crosswalk is not None and found.salt is not None:
        return Crosswalk.read(found.crosswalk, found.salt)
    salt = found.salt or out.with_name(f"{out.name}.salt.txt")
    notes.append(f"no crosswalk: the images' subjects are numbered and cannot be paired with records; salt in {salt}")
    return Crosswalk.none(salt_at(salt, cohort=out))


def _records(source: Path, out: Path) -> dict[str, Any]:
    """Take the records in, unless they are there: then they must be the same, byte for byte."""
    if not (out / "ehr").is_dir():
        return ingest_meds(source, out)
    root = open_root(source / "ehr" if (source / "ehr").is_dir() else source)
    if not _same([path.relative_to(root.path) for path in root.files()], root.path, out / "ehr"):
        raise Refusal("OUTPUT_EXISTS", f"{out} holds other records than {source}", "Name another cohort with --out")
    labels = source / "labels"
    tasks = task_names(labels)
    if tasks and not (out / "labels").is_dir():  # an earlier ingest was stopped between the two
        counts = {name: len(read_labels(labels, name)) for name in tasks}
        with atomic_path(out / "labels") as temporary:
            shutil.copytree(labels, temporary)
        return {"unchanged": True, "labels": counts}
    files = [path.relative_to(labels) for name in tasks for path in sorted((labels / name).rglob("*.parquet"))]
    if not _same(files, labels, out / "labels"):
        raise Refusal("OUTPUT_EXISTS", f"{out} holds other labels than {source}", "Name another cohort with --out")
    return {"unchanged": True}


def _same(files: list[Path], source: Path, target: Path) -> bool:
    """Whether every file is in the target too, linked or with equal bytes."""
    for file in files:
        one, other = source / file, target / file
        if not other.is_file() or one.stat().st_size != other.stat().st_size:
            return False
        if not os.path.samefile(one, other) and sha256(one) != sha256(other):
            return False
    return True
