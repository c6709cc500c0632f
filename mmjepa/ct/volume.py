"""What DICOM and NIfTI share: a candidate volume, the settings, HU, canonical axes and the checks on voxels."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from mmjepa.refusal import Refusal

HU_FLOOR, HU_CEILING = -1024, 3071  # air under every padding value in use; the ceiling of 12 bits (metal)
SPACING_MM = (0.01, 100.0)  # what a voxel's edge may be; beyond it the header is wrong
_INT16_CEILING = 32767
_MAX_SHEAR = 0.05


@dataclass(frozen=True)
class Settings:
    """What decides the voxels and whether they are accepted.

    min_slices: fewest slices of a volume.
    chest_p5_hu: where the files say that the chest is seen, the 5th percentile must lie below this; None turns it off.
    rescale: (slope, intercept) for DICOM slices without rescale tags; None refuses them.
    nifti_hu: ``auto`` takes NIfTI voxels as HU where they look like HU, ``as-is`` whatever they look like; ``csv`` makes HU of them by
    slope and intercept in images.csv, where the result looks like HU.
    tilt: ``refuse`` or ``resample`` a volume whose slices shift sideways (a tilted gantry).
    max_voxels: most voxels of a volume; None sets no limit but the memory.
    form: how voxels are stored: ``npy`` (memory-mapped, the fastest) or ``blosc2`` (compressed, about a third of the size).
    """

    min_slices: int = 4
    chest_p5_hu: float | None = -700.0
    rescale: tuple[float, float] | None = None
    nifti_hu: str = "auto"
    tilt: str = "refuse"
    max_voxels: int | None = None
    form: str = "npy"

    def __post_init__(self) -> None:
        if self.nifti_hu not in ("auto", "as-is", "csv"):
            raise Refusal("CT_SETTINGS", f"nifti_hu is {self.nifti_hu!r}", "Want auto, as-is or csv")
        if self.rescale is not None and not (self.rescale[0] > 0 and all(map(math.isfinite, self.rescale))):
            raise Refusal("CT_SETTINGS", f"rescale is {self.rescale}", "Want two finite numbers, the slope above 0")
        if self.form not in ("npy", "blosc2"):
            raise Refusal("CT_SETTINGS", f"form is {self.form!r}", "Want npy or blosc2")
        if self.tilt not in ("refuse", "resample"):
            raise Refusal("CT_SETTINGS", f"tilt is {self.tilt!r}", "Want refuse or resample")
        if self.max_voxels is not None and self.max_voxels < 1:
            raise Refusal("CT_SETTINGS", f"max_voxels is {self.max_voxels}", "Want a positive number")
        if self.min_slices < 2:
            raise Refusal("CT_SETTINGS", f"min_slices is {self.min_slices}", "Want 2 or more: one slice has no spacing")

    def check_size(self, shape: Sequence[int]) -> None:
        """Refuse (CT_OUT_OF_LIMITS) a volume of more voxels than ``max_voxels``."""
        voxels = math.prod(shape)
        if self.max_voxels is not None and voxels > self.max_voxels:
            raise Refusal("CT_OUT_OF_LIMITS", f"voxels {voxels}, limit {self.max_voxels}", "Set max_voxels")


@dataclass(frozen=True)
class Candidate:
    """One volume to be, as the headers tell it; ``refusal`` when they already forbid it. ``time`` is the cohort's (shifted)."""

    image_id: str
    kind: str  # dicom, nifti
    parts: tuple[Any, ...] = ()  # dicom: Slice, sorted along the stack when not refused; nifti: one File
    subject_id: int = -1
    time: datetime | None = None
    kernel: str = ""
    thickness_mm: float | None = None
    chest: bool = False
    kvp: float | None = None
    maker: str = ""
    flags: tuple[str, ...] = ()
    refusal: Refusal | None = None
    group: str = ""  # what it is judged with: a hash of its series, or of its file


@dataclass
class Volume:
    """int16 HU [X, Y, Z] in RAS+ order, its 4 x 4 affine (voxel -> RAS mm), lowest and highest HU, the hash of the files it came
    from, and how many stored voxels were padding."""

    hu: np.ndarray
    affine: np.ndarray
    hu_range: tuple[int, int]
    source_hash: str
    padding_voxels: int = 0


def spacing_mm(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel edge lengths of an affine."""
    x, y, z = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    return float(x), float(y), float(z)


def canonical(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Permute and flip the axes so that they run closest to R, A, S; voxels are moved, never resampled."""
    orientation = nib.orientations.io_orientation(affine)
    moved = nib.orientations.apply_orientation(array, orientation)
    return moved, affine @ nib.orientations.inv_ornt_aff(orientation, array.shape)


def shear_degrees(affine: np.ndarray, axes: int = 3) -> float:
    """The largest departure of two of the first ``axes`` axes from a right angle, 0 where it is within 5 % of a step (rounding)."""
    unit = affine[:3, :axes] / np.sqrt((affine[:3, :axes] ** 2).sum(axis=0))
    worst = float(np.abs(unit.T @ unit - np.eye(axes)).max())
    return float(np.degrees(np.arcsin(min(worst, 1.0)))) if worst > _MAX_SHEAR else 0.0


def to_hu(values: np.ndarray, padding: np.ndarray | None = None) -> np.ndarray:
    """HU as floats (changed in place) -> int16 HU: padding becomes -1024, the rest is clipped to [-1024, 3071] and rounded.

    Raises Refusal CT_HU_IMPLAUSIBLE above 32767 HU (an unsigned padding value that no tag declares) and for NaN.
    """
    if padding is not None:
        values[padding] = HU_FLOOR
    highest = values.max()
    if not highest <= _INT16_CEILING:  # so written that NaN is refused
        raise Refusal(
            "CT_HU_IMPLAUSIBLE",
            f"highest value {highest:.0f} HU",
            "Is there a padding value that the header does not declare?",
        )
    np.clip(values, HU_FLOOR, HU_CEILING, out=values)
    return np.rint(values, out=values).astype(np.int16)


def shifted_hu(raw: np.ndarray, shift: float, padding: np.ndarray | None) -> np.ndarray | None:
    """``to_hu`` of 16-bit stored values plus a whole number, bit for bit but without leaving 16 bits; None where it takes more."""
    if raw.dtype not in (np.int16, np.uint16) or shift != int(shift):
        return None
    limits, shift = np.iinfo(raw.dtype), int(shift)
    low, high = max(HU_FLOOR - shift, limits.min), min(HU_CEILING - shift, limits.max)
    if low > high or int(raw.max()) + shift > _INT16_CEILING:  # the latter may be padding, or refused
        return None
    hu = np.clip(raw, low, high).view(np.uint16)
    hu += np.uint16(shift % (1 << 16))  # wraps round to what fits 16 bits again
    if padding is not None:
        hu[padding] = np.int16(HU_FLOOR).view(np.uint16)
    return hu.view(np.int16)


def check_hu(hu: np.ndarray, p5_below: float | None) -> tuple[int, int]:
    """Lowest and highest HU. Refuses a constant volume (CT_CONSTANT) and, given a threshold, one without enough air
    (CT_HU_IMPLAUSIBLE)."""
    lowest, highest = int(hu.min()), int(hu.max())
    if lowest == highest:
        raise Refusal("CT_CONSTANT", f"all voxels equal {lowest}")
    if p5_below is not None and np.count_nonzero(hu < p5_below) <= 0.05 * hu.size:
        raise Refusal(
            "CT_HU_IMPLAUSIBLE",
            f"5th percentile {np.percentile(hu, 5):.0f} HU, want < {p5_below:.0f}",
            "Set chest_p5_hu to another threshold, or to none, if these are HU of a chest",
        )
    return lowest, highest


def relative(path: Path, root: Path) -> str:
    """``path`` below ``root`` with forward slashes on every system; bytes of a name that are no UTF-8 are spelled out."""
    return os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")
