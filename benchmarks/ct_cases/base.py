"""What the cases start from: a clean series, and ways to change and save it."""

import tempfile
from collections.abc import Callable
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID

from mmjepa.keyed import generator
from synthetic.images import Scan, uid, write_dicom

ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
SIZE, DEPTH = (40, 36), 8
Slices = list[Any]
Build = Callable[[Path, Slices], object]
CASES: dict[str, Build] = {}
OPTIONS: dict[str, dict[str, Any]] = {}  # of the ingest, for cases that need any


def case(build: Build) -> Build:
    """Register a function that fills a folder from a clean series; its files ``a*``, ``b*`` are what the volumes must hold."""
    CASES[build.__name__] = build
    return build


def synthetic_series(key: str = "a", patient: str = "P1", depth: int = DEPTH) -> Slices:
    """A clean chest series of noise in [-1000, 400] HU, 0.8 mm between rows, 0.6 between columns, 1 between slices, from the feet up."""
    voxels = generator(0, f"malformed/{key}").integers(-1000, 400, (*SIZE, depth)).astype(np.int16)
    protocol = {"contrast": False, "thickness_mm": 2.0, "kernel": "B40f", "voxel_mm": 0.8}
    place = (-20.5, 31.0, -100.0)
    scan = Scan("s", uid("malformed", key), patient, "F", datetime(2020, 3, 1, 10, 15), place, voxels, protocol)
    with tempfile.TemporaryDirectory() as folder:
        write_dicom(scan, Path(folder))
        slices = [pydicom.dcmread(path) for path in sorted((Path(folder) / "s").iterdir())]
    for part in slices:
        part.PixelSpacing = [0.8, 0.6]
    return slices


def real_series(data: Path | None) -> Slices | None:
    """The real chest series of the optional data folder."""
    folder = data / "chest_ct" / "A0002_B40f" if data else None
    return [pydicom.dcmread(path) for path in sorted(folder.glob("*.dcm"))] if folder and folder.is_dir() else None


def save(folder: Path, slices: Slices, volume: str = "a") -> list[Path]:
    """Write slices as ``<volume>_000.dcm`` and on."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{volume}_{k:03d}.dcm" for k in range(len(slices))]
    for path, part in zip(paths, slices, strict=True):
        part.save_as(path, enforce_file_format=True)
    return paths


def tagged(*which: int, **tags: Any) -> Build:
    """A case that sets tags (None deletes) in some slices, all when none is named."""

    def build(folder: Path, slices: Slices) -> object:
        for part in [slices[k] for k in which] or slices:
            for name, value in tags.items():
                if value is not None:
                    setattr(part, name, value)
                elif name in part:
                    delattr(part, name)
        return save(folder, slices)

    return build


def stored(part: Dataset, raw: np.ndarray) -> None:
    """Put other stored values into a slice."""
    part.Rows, part.Columns = raw.shape
    part.PixelData = raw.astype("<i2" if part.PixelRepresentation else "<u2").tobytes()


def bytes_of(part: Dataset) -> bytes:
    """A data set as the bytes of a file."""
    buffer = BytesIO()
    part.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def without_meta(part: Dataset) -> Dataset:
    """The data set alone, without preamble and file meta."""
    bare = Dataset()
    bare.update({element.tag: element for element in part})
    return bare


def enhanced(slices: Slices, stacks: int = 1, rescale: bool = True) -> Dataset:
    """One multi-frame file of classic slices; geometry and rescale in the functional groups. Frames are not in order."""

    def group(name: str, **tags: Any) -> dict[str, Items]:
        item = Dataset()
        for tag, value in tags.items():
            setattr(item, tag, value)
        return {name: Items([item])}

    def groups(*named: dict[str, Items]) -> Dataset:
        item = Dataset()
        for each in named:
            for name, value in each.items():
                setattr(item, name, value)
        return item

    first = slices[0]
    whole = pydicom.dcmread(BytesIO(bytes_of(first)))
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = UID(ENHANCED_CT)
    in_groups = ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SliceLocation"]
    for name in (*in_groups, "RescaleSlope", "RescaleIntercept", "RescaleType"):
        if name in whole:
            delattr(whole, name)
    order = [*range(1, len(slices), 2), *range(0, len(slices), 2)]
    whole.NumberOfFrames, whole.PixelData = len(slices), b"".join(slices[k].PixelData for k in order)
    shared = [group("PixelMeasuresSequence", PixelSpacing=first.PixelSpacing, SliceThickness=first.SliceThickness)]
    shared.append(group("PlaneOrientationSequence", ImageOrientationPatient=first.ImageOrientationPatient))
    if rescale:
        hu = {"RescaleSlope": 1, "RescaleIntercept": first.RescaleIntercept, "RescaleType": "HU"}
        shared.append(group("PixelValueTransformationSequence", **hu))
    whole.SharedFunctionalGroupsSequence = Items([groups(*shared)])
    whole.PerFrameFunctionalGroupsSequence = Items(
        groups(
            group("PlanePositionSequence", ImagePositionPatient=slices[k].ImagePositionPatient),
            group(
                "FrameContentSequence",
                StackID=str(1 + k * stacks // len(slices)),
                InStackPositionNumber=k + 1,
                DimensionIndexValues=[1, k + 1],
            ),
        )
        for k in order
    )
    return whole
