"""What an ingest tells: ``manifest.json`` accounts for every file, ``manifest.csv`` is its table for people, the index is for code."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mmjepa.files import atomic_path, write_json
from mmjepa.identity import Crosswalk

INDEX = pa.schema(
    [("image_id", pa.string()), ("subject_id", pa.int64()), ("time", pa.timestamp("us"))]
    + [(f"spacing_{axis}", pa.float64()) for axis in "xyz"]
    + [(f"shape_{axis}", pa.int64()) for axis in "xyz"]
    + [(f"origin_{axis}", pa.float64()) for axis in "xyz"]
    + [("source_hash", pa.string()), ("source_kind", pa.string()), ("kernel", pa.string())]
    + [("thickness_mm", pa.float64()), ("n_slices", pa.int64()), ("flags", pa.string())]
)
UNPAIRED = (
    "no crosswalk: subject ids are hashes of the patients, dates are moved 1 to 10 years back, patient by patient, and images cannot "
    "be paired with records"
)
COLUMNS = ("item", "id", "file_number", "state", "code", "found", "what_to_do")
_MEANINGS = {
    "CT_NOT_DICOM": "not a DICOM image",
    "CT_NOT_CT": "modality is not CT",
    "CT_SOP_CLASS": "SOP class is not a CT image",
    "CT_LOCALIZER": "localizer (scout)",
    "CT_DUPLICATE_FILE": "copy of another file",
    "CT_SPLIT_SERIES": "the series holds several stacks, each judged alone",
    "CT_SKIPPED_IN_SERIES": "a skipped file of the same series and orientation may have been a slice of this volume",
    "CT_UNREADABLE_BESIDE": "an empty or unreadable file in the same folder may have been a slice of this volume",
    "CT_BODY_PART": "BodyPartExamined is not the chest: HU were not judged as those of a chest",
    "CT_PADDING_PLAUSIBLE": "the declared padding value is one of tissue: such voxels became air",
    "CT_DERIVED": "derived or secondary image: a reformat",
    "CT_NO_TIME": "no acquisition time",
    "CT_GANTRY_TILT": "tilted gantry: straightened by resampling within the slices",
    "CT_NO_RESCALE": "no rescale tags: the given slope and intercept were used",
}


class Skip(NamedTuple):
    """A file that is no slice: its place in the sorted walk (from 1), the salted hash of its relative path, why."""

    number: int
    file_id: str
    code: str


def salt_check(crosswalk: Crosswalk) -> str:
    """What tells another salt from this one, and gives neither away."""
    return crosswalk.image_id("salt check")


def manifest_of(
    rows: Sequence[dict[str, Any]],
    skips: Sequence[Skip],
    files: int,
    removed: Sequence[str],
    transform: dict[str, Any],
    crosswalk: Crosswalk,
) -> dict[str, Any]:
    """Counts by code, one entry for each volume, one for each file that was skipped. removed: ids of volumes that an earlier run
    found and this one did not."""
    states = Counter(row["status"] for row in rows)
    return {
        "settings": json.loads(json.dumps(transform)),
        "paired": crosswalk.paired,
        "notes": [] if crosswalk.paired else [UNPAIRED],
        "salt_check": salt_check(crosswalk),
        "files": files,
        "accepted": states["accepted"] + states["unchanged"],
        "unchanged": states["unchanged"],
        "refused": dict(sorted(Counter(row["code"] for row in rows if row["status"] == "refused").items())),
        "skipped": dict(sorted(Counter(skip.code for skip in skips).items())),
        "removed": len(removed),
        "volumes": [{name: value for name, value in row.items() if name != "index"} for row in rows],
        "skipped_files": [skip._asdict() for skip in skips],
        "removed_volumes": list(removed),
    }


def write_manifest(manifest: dict[str, Any], folder: Path) -> None:
    """``manifest.json`` and ``manifest.csv``: one line for each volume and code, and for each skipped file."""
    with (
        atomic_path(folder / "manifest.csv") as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as handle,
    ):
        table = csv.writer(handle, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(_lines(manifest))
    write_json(folder / "manifest.json", manifest)


def _lines(manifest: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    for row in manifest["volumes"]:
        name = ("volume", row["image_id"], "")
        if row["status"] == "refused":
            yield (*name, "refused", row["code"], row["message"], row["hint"])
        else:
            size, spacing = (" x ".join(f"{n:.4g}" for n in row[key]) for key in ("shape", "spacing_mm"))
            yield (
                *name,
                "accepted",
                "",
                f"{size} voxels of {spacing} mm, {row['hu_range'][0]}..{row['hu_range'][1]} HU",
                "",
            )
        for flag in row["flags"]:
            corrected = row["status"] != "refused" and flag in ("CT_GANTRY_TILT", "CT_NO_RESCALE", "CT_SPLIT_SERIES")
            yield (*name, "corrected" if corrected else "noted", flag, _MEANINGS[flag], "")
    for skip in manifest["skipped_files"]:
        yield "file", skip["file_id"], skip["number"], "skipped", skip["code"], _MEANINGS[skip["code"]], ""
    for image_id in manifest["removed_volumes"]:
        yield (
            "volume",
            image_id,
            "",
            "removed",
            "",
            "no longer in the source",
            "Its files stay in ct/volumes: delete them there",
        )


def write_index(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The accepted volumes as ``index.parquet``."""
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
