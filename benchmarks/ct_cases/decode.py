"""Decodes that share no code with the ingest: every slice of DICOM bytes at the place its own header states; volumes compared."""

import gzip
from collections import defaultdict
from collections.abc import Callable, Sequence
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
_STATED = ("kernel", "thickness", "image_type")


def canonical(image: nib.Nifti1Image) -> Decoded:
    """HU as the contract stores them and the affine, axes closest to R, A, S."""
    closest = nib.as_closest_canonical(image)
    return as_stored(closest.get_fdata()), np.asarray(closest.affine)


def as_stored(values: np.ndarray) -> np.ndarray:
    """int16 HU by the contract's rule 8; above 32767 lies a negative padding value in unsigned voxels."""
    return np.rint(np.where(values > WRAPPED_HU, FLOOR_HU, values).clip(FLOOR_HU, CEILING_HU)).astype(np.int16)


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

    cosines: np.ndarray  # along a row, along a column
    position_mm: np.ndarray
    spacing_mm: tuple[float, float]  # between rows, between columns
    hu: np.ndarray  # rows, columns; float64
    series: str = ""
    acquisition: str = ""
    kernel: str = ""
    thickness: str = ""
    image_type: str = ""


def in_place(volume: Decoded, planes: Sequence[Plane]) -> bool:
    """Whether a volume holds every pixel of every plane, and no other, each within half a voxel of where the plane's own header
    puts it. Needs neither order nor steps nor an affine of its own."""
    hu, affine = volume
    to_voxel, filled = np.linalg.inv(affine), 0
    seen = np.zeros(hu.shape, dtype=bool)
    for plane in planes:
        rows, columns = np.indices(plane.hu.shape).reshape(2, -1)
        lps = plane.position_mm[:, None] + plane.cosines[0][:, None] * columns * plane.spacing_mm[1]
        lps = lps + plane.cosines[1][:, None] * rows * plane.spacing_mm[0]
        places = to_voxel[:3, :3] @ (lps * np.array([[-1], [-1], [1]])) + to_voxel[:3, 3:]
        nearest = np.rint(places).astype(int)
        inside = (nearest >= 0) & (nearest < np.array(hu.shape)[:, None])
        if np.abs(places - nearest).max() > 0.5 or not inside.all():
            return False
        if not np.array_equal(hu[tuple(nearest)], as_stored(plane.hu).ravel()):
            return False
        seen[tuple(nearest)] = True
        filled += plane.hu.size
    return bool(seen.all()) and filled == hu.size


def planes(path: Path) -> list[Plane]:
    """Every slice of a DICOM file that pydicom decodes; none where it fails, or where the contract wants the file skipped.

    What pydicom reads here though it does not fit its header (cut streams, surplus rows) is not judged: the ingest may refuse more.
    """
    try:
        data = pydicom.dcmread(path, force=True)
        if not getattr(data.file_meta, "TransferSyntaxUID", None):
            data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        if not _is_ct(data):
            return []
        if data.file_meta.TransferSyntaxUID in pydicom.uid.JPEG2000TransferSyntaxes:
            data.pixel_array_options(decoding_plugin="pylibjpeg")  # GDCM dies of some damaged streams
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
    scout = _text(data, "ImageType").replace("'", "").strip("[]").split(", ")[2:3] == ["LOCALIZER"]
    return sop_class in CT_CLASSES and _text(data, "Modality") in ("CT", "") and not scout


def _plane(data: Dataset, shared: Dataset, own: Dataset, raw: np.ndarray) -> Plane:
    def get(name: str, group: str) -> Any:
        for place in (own, shared):
            if group in place:
                return place[group].value[0].get(name)
        return data.get(name)

    slope, intercept = (get(f"Rescale{part}", "PixelValueTransformationSequence") for part in ("Slope", "Intercept"))
    hu = raw.astype(np.float64) * float(slope) + float(intercept)
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
        **_reconstruction(get),
    )


def _reconstruction(get: Callable[[str, str], Any]) -> dict[str, str]:
    """What a header states about how a slice was made; what cannot be parsed is not stated."""
    found = {}
    for name, tag, group in (
        ("kernel", "ConvolutionKernel", "CTReconstructionSequence"),
        ("thickness", "SliceThickness", "PixelMeasuresSequence"),
        ("image_type", "ImageType", ""),
    ):
        try:
            value = get(tag, group)
            if name == "thickness":
                found[name] = str(float(value)) if np.isfinite(float(value)) else ""
            else:
                parts = [value] if isinstance(value, str) else list(value or [])
                found[name] = " ".join(
                    str(part).strip().upper() for part in parts[: 3 if name == "image_type" else None]
                )
        except Exception:
            found[name] = ""
    return found


def _text(data: Dataset, name: str) -> str:
    """A tag that moves no voxel; one that cannot be parsed counts as absent."""
    try:
        return str(data.get(name) or "")
    except Exception:
        return ""


def decoded(source: Path) -> list[tuple[Decoded, list[Plane]]]:
    """Every volume that the bytes in ``source`` could rightly give, with its slices; a NIfTI file has none."""
    found: list[tuple[Decoded, list[Plane]]] = []
    every = []
    for path in sorted(source.iterdir()):
        every += planes(path)
        try:
            found.append((canonical(nib.Nifti1Image.from_bytes(_unzipped(path))), []))
        except Exception:  # DICOM, or damaged
            continue
    stacks = _stacks(every, _STATED) + _stacks(every, ())  # what is not stated joins the others, or stands alone
    for stack in list(stacks):
        by_acquisition = defaultdict(list)
        for plane in stack:
            by_acquisition[plane.acquisition].append(plane)
        stacks += list(by_acquisition.values())
    return [(_stacked(stack), stack) for stack in stacks if len(stack) > 1] + found


def _stacks(every: Sequence[Plane], optional: Sequence[str]) -> list[list[Plane]]:
    stacks: list[list[Plane]] = []
    for plane in every:
        for stack in stacks:
            if _belongs(plane, stack, optional):
                stack.append(plane)
                break
        else:
            stacks.append([plane])
    return stacks


def _belongs(plane: Plane, stack: list[Plane], optional: Sequence[str]) -> bool:
    """One series, geometry and reconstruction; of the latter, what is ``optional`` need not be stated."""
    first = stack[0]
    stated = [
        (getattr(plane, name), {getattr(each, name) for each in stack} - ({""} if name in optional else set()))
        for name in _STATED
    ]
    return (
        (plane.series, plane.hu.shape) == (first.series, first.hu.shape)
        and np.allclose(plane.cosines, first.cosines, rtol=0, atol=2e-4)
        and np.allclose(plane.spacing_mm, first.spacing_mm, rtol=2e-4, atol=0)
        and all(
            own in others or (name in optional and not (own and others))
            for name, (own, others) in zip(_STATED, stated, strict=True)
        )
    )


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
