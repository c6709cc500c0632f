"""Decodes that share no code with the ingest: every slice of DICOM bytes at the place its own header states; volumes compared."""

import gzip
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import Dataset

from mmjepa.files import read_json

FLOOR_HU, CEILING_HU, WRAPPED_HU = -1024, 3071, 32767
CT_CLASSES = {f"1.2.840.10008.5.1.4.1.1.2{kind}" for kind in ("", ".1", ".2")}
Decoded = tuple[np.ndarray, np.ndarray]


def canonical(image: nib.Nifti1Image) -> Decoded:
    """HU as the contract stores them and the affine, axes closest to R, A, S."""
    closest = nib.as_closest_canonical(image)
    values = closest.get_fdata()
    values[values > WRAPPED_HU] = FLOOR_HU  # a negative padding value in unsigned voxels: the contract's rule 8
    return np.rint(values.clip(FLOOR_HU, CEILING_HU)).astype(np.int16), np.asarray(closest.affine)


def stored(out: Path) -> list[Decoded]:
    """The volumes in a cohort: HU and affine."""
    sidecars = sorted((out / "ct" / "volumes").glob("*.json"))
    return [(np.load(path.with_suffix(".npy")), np.array(read_json(path)["affine"])) for path in sidecars]


def same(one: Decoded, other: Decoded, tolerance_mm: float = 1e-3) -> bool:
    """Whether two volumes hold equal voxels at equal places."""
    return np.array_equal(one[0], other[0]) and np.allclose(one[1], other[1], atol=tolerance_mm, rtol=0)


@dataclass(frozen=True)
class Plane:
    """One slice as its own header and bytes tell it."""

    series: str
    acquisition: str
    cosines: np.ndarray  # along a row, along a column
    position_mm: np.ndarray
    spacing_mm: tuple[float, float]
    hu: np.ndarray  # rows, columns


def planes(path: Path) -> list[Plane]:
    """Every slice of a DICOM file that pydicom decodes; none where it fails, or where the contract wants the file skipped."""
    try:
        data = pydicom.dcmread(path, force=True)
        if not getattr(data.file_meta, "TransferSyntaxUID", None):
            data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        if not _is_ct(data):
            return []
        raw = data.pixel_array
        frames = raw if raw.ndim == 3 else raw[None]
        per_frame = data.get("PerFrameFunctionalGroupsSequence") or [Dataset()] * len(frames)
        shared = (data.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
        return [_plane(data, shared, own, frame) for own, frame in zip(per_frame, frames, strict=True)]
    except Exception:  # damaged: nothing may be accepted from it
        return []


def _is_ct(data: pydicom.FileDataset) -> bool:
    """Rules 2 and 3 of the contract; what they leave out, the manifest must count."""
    sop_class = _text(data, "SOPClassUID") or data.file_meta.get("MediaStorageSOPClassUID")
    scout = "LOCALIZER" in list(data.get("ImageType") or [])[2:3]
    return sop_class in CT_CLASSES and _text(data, "Modality") in ("CT", "") and not scout


def _plane(data: Dataset, shared: Dataset, own: Dataset, raw: np.ndarray) -> Plane:
    def get(name: str, group: str) -> Any:
        for place in (own, shared):
            if group in place:
                return place[group].value[0].get(name)
        return data.get(name)

    slope, intercept = (get(f"Rescale{part}", "PixelValueTransformationSequence") for part in ("Slope", "Intercept"))
    hu = raw.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    if data.get("PixelPaddingValue") is not None:
        ends = [data.PixelPaddingValue, data.get("PixelPaddingRangeLimit") or data.PixelPaddingValue]
        wrap = 1 << data.BitsAllocated
        low, high = sorted(int(end) % wrap for end in ends)
        stored_values = raw.astype(np.int64) % wrap
        hu[(stored_values >= low) & (stored_values <= high)] = FLOOR_HU
    rows, columns = get("PixelSpacing", "PixelMeasuresSequence")
    return Plane(
        series=str(data.get("SeriesInstanceUID")),
        acquisition=f"{_text(data, 'AcquisitionNumber')} {_text(data, 'TemporalPositionIdentifier')}",
        cosines=np.array(get("ImageOrientationPatient", "PlaneOrientationSequence"), dtype=float).reshape(2, 3),
        position_mm=np.array(get("ImagePositionPatient", "PlanePositionSequence"), dtype=float),
        spacing_mm=(float(rows), float(columns)),
        hu=hu,
    )


def _text(data: Dataset, name: str) -> str:
    """A tag that moves no voxel; one that cannot be parsed counts as absent."""
    try:
        return str(data.get(name) or "")
    except Exception:
        return ""


def decoded(source: Path) -> list[Decoded]:
    """Every volume that the bytes in ``source`` could rightly give."""
    found = []
    stacks: dict[tuple, list[Plane]] = defaultdict(list)
    for path in sorted(source.iterdir()):
        for plane in planes(path):
            key = (plane.series, tuple(plane.cosines.round(4).ravel() + 0.0), plane.spacing_mm, plane.hu.shape)
            stacks[key].append(plane)
            stacks[*key, plane.acquisition].append(plane)
        try:
            found.append(canonical(nib.Nifti1Image.from_bytes(_unzipped(path))))
        except Exception:  # DICOM, or damaged
            continue
    return [_stacked(stack) for stack in stacks.values() if len(stack) > 1] + found


def _unzipped(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


def _stacked(stack: list[Plane]) -> Decoded:
    normal = np.cross(*stack[0].cosines)
    stack = sorted(stack, key=lambda plane: float(plane.position_mm @ normal))
    affine, first = np.eye(4), stack[0]
    step = np.median(np.diff([plane.position_mm @ normal for plane in stack]))
    affine[:3, 0], affine[:3, 1] = first.cosines[0] * first.spacing_mm[1], first.cosines[1] * first.spacing_mm[0]
    affine[:3, 2], affine[:3, 3] = normal * step, first.position_mm
    voxels = np.stack([plane.hu.T for plane in stack], axis=2).astype(np.float64)
    try:
        return canonical(nib.Nifti1Image(voxels, np.diag([-1, -1, 1, 1]) @ affine))
    except Exception:  # an affine that spans no volume
        return voxels, affine
