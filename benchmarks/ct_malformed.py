"""Malformed and odd CT inputs against the ingest: every one refused or corrected as the contract says, none accepted in silence.

What must come out of each case stands in ``ct_malformed.csv``, written from the contract: ``load`` once for every volume, and
every code that the manifest must count (refusals, skipped files, flags), no more and no fewer. Where a volume is accepted, its
voxels and geometry must equal an independent decode: SimpleITK for DICOM (highdicom for multi-frame files), nibabel
for NIfTI; and every pixel of every DICOM slice must lie within half a voxel of where that slice's own header puts it.

The first twenty cases are edits of one chest series: a real one where the folder of optional data has it (``--data``), else a
synthetic one. Each case is ingested in a process of its own with limited memory and time. One row per case on standard output,
then one JSON object. Exit code 1 when a case differs.
"""

import argparse
import csv
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ct_cases
import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk
from ct_cases.decode import FLOOR_HU, Decoded, Plane, canonical, in_place, same, stored

from mmjepa.ct.ingest import ingest_images
from mmjepa.files import read_json
from mmjepa.identity import Crosswalk
from mmjepa.refusal import Refusal

EXPECTED = Path(__file__).with_suffix(".csv")
SALT = "a salt for malformed inputs"
LIMIT_S, LIMIT_BYTES = 120, 16 << 30


def expectations() -> dict[str, dict[str, str]]:
    """The committed table by case: what, expected."""
    with open(EXPECTED, newline="", encoding="utf-8") as handle:
        return {row["case"]: row for row in csv.DictReader(handle)}


def counted(manifest: dict[str, Any]) -> list[str]:
    """What a manifest says, in the words of the table. A flag for an unknown time is no matter of the contract."""
    flags = {flag for volume in manifest["volumes"] if volume["status"] != "refused" for flag in volume["flags"]}
    flags |= {flag for volume in manifest["volumes"] for flag in volume["flags"]} & {"CT_SPLIT_SERIES"}
    codes = {*manifest["refused"], *manifest["skipped"], *(flags - {"CT_NO_TIME"})}
    return ["load"] * manifest["accepted"] + sorted(codes)


def ingested(source: Path, out: Path, **options: Any) -> list[str]:
    """Ingest a folder; what the manifest and a refusal of the whole run say."""
    try:
        return counted(ingest_images(source, out, crosswalk=Crosswalk.none(SALT), **options))
    except Refusal as refusal:
        manifest = out / "ct" / "manifest.json"
        return sorted({refusal.code, *(counted(read_json(manifest)) if manifest.exists() else [])})


def decoded(source: Path) -> list[tuple[Decoded, list[Plane]]]:
    """The volumes that the folder should give, by SimpleITK and nibabel: HU and affine, axes closest to R, A, S; and the slices of
    classic images."""
    dicom: dict[str, list[Path]] = {}
    niftis = []
    for folder, _, names in os.walk(source):
        for name in sorted(names):
            if name.startswith("n"):
                niftis.append(Path(folder) / name)
            elif name.startswith(("a_", "b_")):
                dicom.setdefault(name[0], []).append(Path(folder) / name)
    found = [(canonical(_by_nibabel(path)), []) for path in niftis]
    for _, paths in sorted(dicom.items()):
        whole = _by_highdicom(paths[0])
        image, planes = (whole, []) if whole else _by_simpleitk(paths)
        found.append((canonical(image), planes))
    return found


def _by_nibabel(path: Path) -> nib.Nifti1Image:
    """A NIfTI file; HU by slope and intercept of its table where that has them."""
    image = nib.Nifti1Image.from_filename(path)
    with open(path.parent / "images.csv", newline="", encoding="utf-8") as handle:
        row = next(row for row in csv.DictReader(handle) if row["file"] == path.name)
    if "slope" not in row:
        return image
    return nib.Nifti1Image(image.get_fdata() * float(row["slope"]) + float(row["intercept"]), image.affine)


def _by_highdicom(path: Path) -> nib.Nifti1Image | None:
    """A multi-frame file, whose frames SimpleITK does not sort; None for a classic image."""
    if "NumberOfFrames" not in pydicom.dcmread(path, stop_before_pixels=True, force=True):
        return None
    volume = hd.imread(path).get_volume()
    voxels, axes = volume.array.transpose(2, 1, 0), volume.affine[:, [2, 1, 0, 3]]
    return nib.Nifti1Image(voxels, np.diag([-1, -1, 1, 1]) @ axes)


def _by_simpleitk(paths: Sequence[Path]) -> tuple[nib.Nifti1Image, list[Plane]]:
    """Every file read alone (rescale applied by GDCM), padding to air, stacked along the normal."""
    planes = [_slice(path) for path in paths]
    normal = np.cross(*planes[0].cosines)
    planes.sort(key=lambda plane: float(normal @ plane.position_mm))
    first, affine = planes[0], np.eye(4)
    step = np.median(np.diff([normal @ plane.position_mm for plane in planes])) if len(planes) > 1 else 1.0
    affine[:3, 0], affine[:3, 1] = first.cosines[0] * first.spacing_mm[1], first.cosines[1] * first.spacing_mm[0]
    affine[:3, 2], affine[:3, 3] = normal * step, first.position_mm
    voxels = np.stack([plane.hu.T for plane in planes], axis=2)
    return nib.Nifti1Image(voxels, np.diag([-1, -1, 1, 1]) @ affine), planes


def _slice(path: Path) -> Plane:
    reader = sitk.ImageFileReader()
    reader.SetFileName(os.fspath(path))
    reader.SetImageIO("GDCMImageIO")
    image = reader.Execute()
    hu = sitk.GetArrayFromImage(image)[0].astype(np.float64)
    keys = {key for key in ("0028|0120", "0028|0121") if reader.HasMetaDataKey(key)}
    if keys:
        slope, intercept = float(reader.GetMetaData("0028|1053")), float(reader.GetMetaData("0028|1052"))
        ends = [float(reader.GetMetaData(key)) * slope + intercept for key in sorted(keys)]
        hu[(hu >= min(ends)) & (hu <= max(ends))] = FLOOR_HU
    axes, (across, down, _) = np.array(image.GetDirection()).reshape(3, 3), image.GetSpacing()
    return Plane(axes[:, :2].T, np.array(image.GetOrigin()), (down, across), hu)


def run_case(name: str, folder: Path, real: Path | None) -> list[str]:
    """Build, ingest and compare one case in ``folder``; the words of its manifest, and what else is wrong."""
    source, out = folder / "source", folder / "out"
    source.mkdir(parents=True)
    slices = ct_cases.real_series(real) if name in ct_cases.TABLE else None
    ct_cases.CASES[name](source, slices or ct_cases.synthetic_series())
    got = ingested(source, out, **ct_cases.OPTIONS.get(name, {}))
    ours = stored(out)
    if len(ours) != got.count("load"):
        got.append(f"({len(ours)} volumes on disk)")
    if ours:
        theirs = decoded(source)
        right = [
            any(same(one, other) and (not planes or in_place(one, planes)) for other, planes in theirs) for one in ours
        ]
        if len(ours) != len(theirs) or not all(right):
            got.append("(differs from the independent decode)")
    return got


def _child(name: str, folder: Path, real: Path | None, send: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    sitk.ProcessObject.GlobalWarningDisplayOff()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        send.send(run_case(name, folder, real))
    except BaseException as error:  # whatever it is, the row must show it
        place = traceback.extract_tb(error.__traceback__)[-1]
        send.send([f"(crash: {type(error).__name__} in {Path(place.filename).name}:{place.lineno})"])


def judged(name: str, real: Path | None) -> list[str]:
    """``run_case`` in a process of its own; a crash or a hang is an answer too."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="ct_malformed_") as folder:
        child = context.Process(target=_child, args=(name, Path(folder), real, send))
        child.start()
        send.close()
        try:
            return receive.recv() if receive.poll(LIMIT_S) else [f"(no end within {LIMIT_S} s)"]
        except EOFError:
            return ["(the process died)"]
        finally:
            child.kill()
            child.join()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases and print the table; 0 when every case is as expected."""
    parser = argparse.ArgumentParser(description="Malformed CT inputs against the contract of the ingest.")
    default = Path(os.environ.get("MMJEPA_DATA", Path(__file__).parents[1] / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default, help="folder of optional real data")
    parser.add_argument("--only", nargs="*", help="names of cases; all when absent")
    options = parser.parse_args(arguments)
    table = expectations()
    right = 0
    names = options.only or list(table)
    for name in names:
        got, want = judged(name, options.data), table[name]["expected"].split()
        as_expected = sorted(got) == sorted(want)
        right += as_expected
        print(
            f"{'ok  ' if as_expected else 'DIFF'} {name:32s} want {' '.join(want):44s} got {' '.join(got)}", flush=True
        )
    print(json.dumps({"cases": len(names), "as_expected": right}))
    return 0 if right == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
