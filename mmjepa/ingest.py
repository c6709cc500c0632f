"""A source folder into a cohort: records, images, labels, and the store built from them."""

import resource
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mmjepa.cohort import Cohort
from mmjepa.ct.boxes import write_boxes
from mmjepa.ct.explain import files_of
from mmjepa.ct.ingest import ingest_images
from mmjepa.ct.manifest import UNPAIRED
from mmjepa.ehr.meds_io import SOURCE_FILE, MedsRoot, ingest_meds, open_root
from mmjepa.files import read_json, sha256
from mmjepa.identity import Crosswalk, read_salt, salt_at
from mmjepa.labels import check_labels, place_labels, same_labels
from mmjepa.pairing import pair
from mmjepa.refusal import Refusal

COHORT_PARTS = ("ehr", "ct", "labels", "store")
SOURCE_PARTS = ("images", "identity", "truth")
KNOWN_FOLDERS = {*SOURCE_PARTS, "ehr", "labels", "boxes", "few_shot"}


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

    source: a folder with ``ehr/`` and/or ``images/`` (and ``labels/``, ``identity/``, ``boxes/``: ``mmjepa.ct.boxes``), a bare MEDS root, or a tree of images.
    ehr, ct, crosswalk, salt: the parts by name, before those of ``source``. workers: processes that read images.
    settings: of the images, see ``mmjepa.ct.volume.Settings`` (min_slices, rescale, tilt, ...).
    Without a crosswalk the images' subjects are hashes of the patients, cannot be paired with records, and their dates are moved
    1 to 10 years back; their salt is then made in ``<out>.salt.txt`` beside the cohort.

    Returns the counts of both parts (of the images with the reasons of refusals and the path of the table), ``unpaired`` (why images
    go with no record: reason -> count), ``pairing`` (the report of ``mmjepa.pairing.pair``), the number of subjects with both as ``mmjepa.pairing.pair`` finds them, ``notes`` for people.
    Raises Refusal: SOURCE_MISSING, SOURCE_EMPTY, SOURCE_PARTS, OUT_NOT_COHORT, OUT_IN_SOURCE, OUTPUT_EXISTS and those of the readers.
    """
    out = Path(out)
    notes: list[str] = []
    found = _find(source, ehr, ct, crosswalk, salt, notes)
    _check(out, (source, ehr, ct), workers)
    result: dict[str, Any] = {"cohort": str(out), "ehr": None, "ct": None, "subjects_with_both": 0}
    if found.records is not None:
        result["ehr"] = _records(found.records, out, notes)
    if found.images is not None:
        result["ct"] = _counts(_images(found.images, found, out, notes, workers=workers, **settings), out)
    if (out / "ehr").is_dir():
        cohort = Cohort.open(out)
        store = cohort.events()
        result["store"] = {
            "subjects": len(store.subjects),
            "events": len(store.codes),
            "fingerprint": store.fingerprint,
        }
        if cohort.images_paired:
            pairs, report = pair(pd.read_parquet(out / "ct" / "index.parquet"), store)
            result["subjects_with_both"] = int(pairs["subject_id"].nunique())
            result["pairing"] = report
            result["unpaired"] = {reason: n for reason, n in report["unmatched"].items() if n}
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
    notes: list[str] = []
    found = _find(source, None, None if (source / "images").is_dir() else source, crosswalk, salt, notes)
    _check(out, (source,), workers)
    manifest = _images(found.images or source, found, out, notes, workers=workers, **settings)
    return {"cohort": str(out), **_counts(manifest, out), "volumes": manifest["volumes"], "notes": notes}


def ingest_ehr(source: Path, out: Path) -> dict[str, Any]:
    """The records of ``source`` alone (a MEDS root, or a folder with ``ehr/``), as ``ingest`` takes them in, and the store of them.

    Returns the counts of rows, subjects, codes, splits and labels, the store's fingerprint, what it cost: ``seconds`` of wall
    time, ``peak_memory_mib`` of this process, pages of mapped files included, and ``notes`` for people. Raises the refusals of
    ``ingest``.
    """
    begin, out = time.perf_counter(), Path(out)
    notes: list[str] = []
    _check(out, (source,), 1)
    counts = _records(source, out, notes)
    store = Cohort.open(out).events()
    return {
        "cohort": str(out),
        **counts,
        "rows": len(store.codes) + len(store.static_codes),
        "subjects": len(store.subjects),
        "codes": len(store.vocabulary),
        "fingerprint": store.fingerprint,
        "seconds": round(time.perf_counter() - begin, 2),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "notes": notes,
    }


def explain(
    source: Path | None,
    out: Path,
    item: str,
    *,
    ct: Path | None = None,
    crosswalk: Path | None = None,
    salt: Path | None = None,
) -> dict[str, Any]:
    """Which files the id of a volume or file in the manifest of ``out`` stands for: paths below the images' folder.

    The arguments are those of the ingest that wrote it. Nothing is written: the answer identifies, and is for the owner of the salt.
    Raises Refusal SALT_MISSING, EXPLAIN_NO_SCAN, EXPLAIN_UNKNOWN.
    """
    if source is not None and ct is None and not (source / "images").is_dir():
        ct = source
    found = _find(source, None, ct, crosswalk, salt, [])
    assert found.images is not None
    people = Crosswalk.none(read_salt(found.salt or _salt_beside(out)))  # the salt alone makes ids
    return {"id": item, "files": files_of(item, found.images, out / "ct", people)}


def _images(
    images: Path, found: Source, out: Path, notes: list[str], *, workers: int, **settings: Any
) -> dict[str, Any]:
    """The manifest, with a count of the boxes that lie beside the images. A run that is refused as a whole before any volume was
    written leaves nothing behind."""
    made = [path for path in (out, out / "ct", _salt_beside(out), found.salt) if path and not path.exists()]
    try:
        people = _identity(found, out, notes)
        manifest = ingest_images(images, out, crosswalk=people, workers=workers, **settings)
    except Refusal as refusal:
        if refusal.code != "INGEST_RUNNING" and not any((out / "ct" / "volumes").glob("*")):
            for path in made:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        raise
    boxes = images.with_name("boxes")
    if images.name == "images" and manifest["accepted"] and any(boxes.rglob("*.xml")):
        manifest["boxes"] = write_boxes(boxes, images, out, people)
    return manifest


def _counts(manifest: dict[str, Any], out: Path) -> dict[str, Any]:
    """What is said of the images; of refusals each code with how often, an example and what to do."""
    left_out = ("volumes", "settings", "skipped_files", "salt_check", "removed_volumes", "notes")
    refused = [row for row in manifest["volumes"] if row["status"] == "refused"]
    counts = Counter((row["code"], row["hint"]) for row in refused)
    example = {(row["code"], row["hint"]): row["message"] for row in reversed(refused)}
    return {
        **{name: value for name, value in manifest.items() if name not in left_out},
        "reasons": [
            {"code": code, "volumes": n, "example": example[code, hint], "what_to_do": hint}
            for (code, hint), n in sorted(counts.items())
        ],
        "table": str(out / "ct" / "manifest.csv"),
    }


def _find(
    source: Path | None,
    ehr: Path | None,
    ct: Path | None,
    crosswalk: Path | None,
    salt: Path | None,
    notes: list[str],
) -> Source:
    for path in (source, ehr, ct):
        if path is not None and not path.is_dir():
            raise Refusal(
                "SOURCE_MISSING", f"{path} is not a folder", "Name the folder that holds the records or images"
            )
    if source is not None:
        is_meds = (source / "data").is_dir() and (source / "metadata").is_dir()
        whole = any((source / part).is_dir() for part in ("ehr", "images"))
        if whole and ct is None:
            _check_parts(source, notes)
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


def _check_parts(source: Path, notes: list[str]) -> None:
    """What lies beside the parts is not read: a folder is refused, it may hold images; files are counted."""
    others = [path for path in source.iterdir() if not path.name.startswith(".") and path.name not in KNOWN_FOLDERS]
    folders = sum(path.is_dir() for path in others)
    if folders:
        raise Refusal(
            "SOURCE_PARTS",
            f"{source} holds {folders} folders beside its parts ({', '.join(sorted(KNOWN_FOLDERS))}) that would not be read",
            "Put images below images/, or name the one folder to read with --ct (`ingest ct`: as SOURCE)",
        )
    if others:
        notes.append(f"{len(others)} files in {source} beside its parts are not read")


def _if_file(path: Path) -> Path | None:
    return path if path.is_file() else None


def _check(out: Path, sources: tuple[Path | None, ...], workers: int) -> None:
    try:
        place = out.resolve()
        leads_nowhere = out.is_symlink() and not out.exists()
    except (OSError, RuntimeError):  # links in a circle
        place, leads_nowhere = out, True
    if leads_nowhere:
        raise Refusal("OUT_NOT_COHORT", f"{out} is a link that leads nowhere", "Name a new folder with --out")
    for source in sources:
        if source is not None and place.is_relative_to(source.resolve()):
            raise Refusal("OUT_IN_SOURCE", f"{out} lies inside {source}", "Write the cohort to a folder of its own")
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if (out.exists() and not out.is_dir()) or (there and (not there & set(COHORT_PARTS) or there & set(SOURCE_PARTS))):
        raise Refusal("OUT_NOT_COHORT", f"{out} exists and is not a cohort", "Name a new folder with --out")
    if workers < 1:
        raise Refusal("WORKERS", f"workers is {workers}, want 1 or more")


def _identity(found: Source, out: Path, notes: list[str]) -> Crosswalk:
    if found.crosswalk is not None and found.salt is not None:
        return Crosswalk.read(found.crosswalk, found.salt)
    salt = found.salt or _salt_beside(out)
    if not salt.exists() and (out / "ct" / "manifest.json").exists():
        raise Refusal(
            "SALT_MISSING",
            f"{salt}, which the ids of the images in {out} were made with, does not exist",
            "Put it back or name it with --salt; if it is lost, name another cohort with --out",
        )
    notes.append(f"{UNPAIRED}; salt in {salt}")
    return Crosswalk.none(salt_at(salt, cohort=out))


def _salt_beside(out: Path) -> Path:
    return out.with_name(f"{out.name}.salt.txt")


def _records(source: Path, out: Path, notes: list[str]) -> dict[str, Any]:
    """Take the records in, unless they are there: then they must be the same, byte for byte."""
    if not (out / "ehr").is_dir():
        counts = ingest_meds(source, out)
        notes += counts.pop("notes")
        return counts
    root = open_root(source / "ehr" if (source / "ehr").is_dir() else source)
    notes += root.notes
    if not _same(root, out / "ehr"):
        raise Refusal("OUTPUT_EXISTS", f"{out} holds other records than {source}", "Name another cohort with --out")
    labels = source / "labels"
    tasks = check_labels(labels)
    if tasks and not (out / "labels").is_dir():  # an earlier ingest was stopped between the two
        return {"unchanged": True, **place_labels(tasks, labels, out / "labels")}
    if not same_labels(labels, out / "labels"):
        raise Refusal("OUTPUT_EXISTS", f"{out} holds other labels than {source}", "Name another cohort with --out")
    return {"unchanged": True}


def _same(root: MedsRoot, target: Path) -> bool:
    """Whether the target holds the files of a source and no others: by the marks it kept of them, or else by their bytes."""
    marks, own = root.marks(), open_root(target).marks()
    if {name: mark[0] for name, mark in marks.items()} != {name: mark[0] for name, mark in own.items()}:
        return False
    kept = read_json(target / SOURCE_FILE) if (target / SOURCE_FILE).is_file() else {}
    return all(
        mark == kept.get(name) or sha256(root.path / name) == sha256(target / name) for name, mark in marks.items()
    )
