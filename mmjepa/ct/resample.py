"""Other voxel sizes, at batch time: linear interpolation, smoothed where it takes voxels away. And slices of a tilted gantry.

Each axis is one small matrix: a triangle as wide as the coarser of the two grids (the anti-aliased linear filter of image
libraries). Fine grids are so averaged before they are thinned out; where voxels grow it is plain linear interpolation.
"""

import numpy as np
from scipy import ndimage

from mmjepa.ct.crop import AIR_HU, Crop, Size, Triple, Voxels
from mmjepa.ct.store import VolumeStore
from mmjepa.ct.volume import HU_FLOOR
from mmjepa.refusal import Refusal


def resample_hu(volume: np.ndarray, spacing_mm: Triple, to_mm: Triple) -> tuple[np.ndarray, Triple]:
    """int16 HU [X, Y, Z] -> int16 HU at about ``to_mm``, and the spacing it truly has.

    The field of view is kept and the number of voxels is whole, so the spacing is extent / voxels. Voxel 0 of the result is
    centred half a new voxel inside the old edge: its old index is (new / old - 1) / 2. Beyond the edge the edge is repeated.
    """
    sizes = [
        max(1, round(n * old / new)) for n, old, new in zip(volume.shape, spacing_mm, _positive(to_mm), strict=True)
    ]
    values = volume.astype(np.float32)
    for axis, size in enumerate(sizes):
        step = volume.shape[axis] / size
        places = (np.arange(size) + 0.5) * step - 0.5
        weights = triangle_weights(places, volume.shape[axis], step)
        values = _along(values, weights, axis)
    x, y, z = (n * old / size for n, old, size in zip(volume.shape, spacing_mm, sizes, strict=True))
    return _int16(values), (x, y, z)


def crop_mm(
    store: VolumeStore,
    image_id: str,
    size_vox: Size,
    spacing_mm: Triple,
    centre: Triple | None = None,
) -> np.ndarray:
    """int16 HU of ``size_vox`` voxels of exactly ``spacing_mm``, around ``centre`` (voxel index of the stored volume; None = middle).

    Only the part of the volume that the crop needs is read. Beyond the volume there is air (-1000 HU).
    Raises Refusal SPACING_INVALID, CROP_OUTSIDE and those of the store.
    """
    step = steps(store.spacing_mm(image_id), spacing_mm)
    return resampled_crop(store.hu(image_id), store.centre(image_id, centre), size_vox, step).hu


def steps(own_mm: Triple, spacing_mm: Triple) -> Triple:
    """How many voxels of ``own_mm`` one of ``spacing_mm`` is long, along each axis. Raises Refusal SPACING_INVALID."""
    x, y, z = (new / own for own, new in zip(own_mm, _positive(spacing_mm), strict=True))
    return x, y, z


def resampled_crop(volume: Voxels, centre: Triple, size: Size, step: Triple) -> Crop:
    """``size`` voxels of an int16 volume around ``centre`` (voxel index), ``step`` of its voxels apart; air beyond it."""
    matrices, region, inside, starts = [], [], [], []
    for n, place, length, width in zip(volume.shape, centre, size, step, strict=True):
        starts.append(place - (length - 1) / 2 * width)
        weights = triangle_weights(place + (np.arange(length) - (length - 1) / 2) * width, n, width)
        inside.append(_span(weights.any(axis=1)))
        used = _span(weights.any(axis=0))
        region.append(used if used.stop else slice(0, 1))
        matrices.append(weights[:, region[-1]])
    values = volume[tuple(region)].astype(np.float32) - AIR_HU
    for axis, weights in enumerate(matrices):
        values = _along(values, weights, axis)
    (x, y, z), (a, b, c) = starts, inside
    return Crop(_int16(values + AIR_HU), (x, y, z), (a, b, c), step)


def _span(used: np.ndarray | np.bool) -> slice:
    """From the first to the last that is true; empty where none is."""
    places = np.flatnonzero(used)
    return slice(int(places[0]), int(places[-1]) + 1) if places.size else slice(0, 0)


def deshear_hu(stack: np.ndarray, shifts: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """int16 HU [slices, rows, columns], each slice moved by its ``shifts`` [slices, 2] (rows, columns; in pixels), and the (row,
    column) of the old grid at which the new one begins.

    Linear interpolation within the slice, none across. The grid grows so that nothing is cut off; what no slice covers is -1024.
    """
    low, high = np.floor(shifts.min(axis=0)).astype(int), np.ceil(shifts.max(axis=0)).astype(int)
    rows, columns = np.array(stack.shape[1:]) + high - low
    straight = np.empty((len(stack), rows, columns), dtype=np.int16)
    for k, (values, shift) in enumerate(zip(stack, shifts - low, strict=True)):
        grown = np.full((rows, columns), HU_FLOOR, dtype=np.float32)
        grown[: values.shape[0], : values.shape[1]] = values
        straight[k] = np.rint(ndimage.shift(grown, shift, order=1, mode="grid-constant", cval=HU_FLOOR))
    return straight, (int(low[0]), int(low[1]))


def straighten_hu(hu: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int16 HU [X, Y, Z] whose third axis leans (the slices of a tilted gantry), and its affine, on an upright grid.

    Each XY slice is moved within its plane and stays where it is in space (see ``deshear_hu``).
    Raises Refusal CT_GANTRY_TILT where slices shift by more than their own width, which no gantry does.
    """
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    normal /= np.linalg.norm(normal)
    upright = normal * (normal @ affine[:3, 2])
    shift = np.linalg.lstsq(affine[:3, :2], affine[:3, 2] - upright, rcond=None)[0]
    slices = np.arange(hu.shape[2])
    if (np.abs(shift) * slices[-1] > hu.shape[:2]).any():
        raise Refusal("CT_GANTRY_TILT", "slices shift sideways by more than their own width: not a tilted gantry")
    straight, low = deshear_hu(hu.transpose(2, 0, 1), slices[:, None] * shift)
    grown = affine.copy()
    grown[:3, 2] = upright
    grown[:3, 3] += affine[:3, :2] @ low
    return straight.transpose(1, 2, 0), grown


def triangle_weights(places: np.ndarray, n: int, step: float) -> np.ndarray:
    """float64 [places, n]: weights of the n voxels for each place (voxel index). Rows sum to 1, or to 0 beyond the volume.

    step: distance of the places in voxels; the triangle's half width is max(1, step). What the triangle would take from beyond
    the edge it takes from the edge voxel. The volume ends half a voxel beyond the centres of its outermost voxels.
    """
    width = max(1.0, step)
    reach = int(np.ceil(width)) + 1
    padded = np.arange(-reach, n + reach)
    clamped = np.clip(places, -0.5, n - 0.5)
    weights = np.clip(1 - np.abs(clamped[:, None] - padded) / width, 0, None)
    weights /= weights.sum(axis=1, keepdims=True)
    inner = weights[:, reach : reach + n]
    inner[:, 0] += weights[:, :reach].sum(axis=1)
    inner[:, -1] += weights[:, reach + n :].sum(axis=1)
    inner[clamped != places] = 0
    return inner


def _along(values: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    """Apply ``weights`` [out, in] along one axis."""
    return np.moveaxis(np.tensordot(weights.astype(np.float32), values, axes=(1, axis)), 0, axis)


def _int16(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.rint(values).astype(np.int16))


def _positive(spacing_mm: Triple) -> Triple:
    if len(spacing_mm) != 3 or not all(np.isfinite(s) and s > 0 for s in spacing_mm):
        raise Refusal("SPACING_INVALID", f"spacing {spacing_mm} mm", "Want three positive numbers")
    return spacing_mm
