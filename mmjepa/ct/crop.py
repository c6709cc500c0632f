"""Crops of a volume: where they lie, and their voxels, with air where the volume ends.

Places are voxel indices (float, RAS+ axes): voxel i covers [i - 0.5, i + 0.5].
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

AIR_HU = -1000

Triple = tuple[float, float, float]
Size = tuple[int, int, int]


class Voxels(Protocol):
    """int16 HU [X, Y, Z] that are read when they are sliced: a memory map, or a compressed file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, region: Any, /) -> Any: ...


@dataclass(frozen=True)
class Box:
    """Voxels low .. high (exclusive) of a volume in RAS+ order."""

    label: str
    low: Size
    high: Size


@dataclass(frozen=True)
class Crop:
    """hu: int16 [X, Y, Z], air (-1000) outside the volume. start: place in the volume (voxel index) of the crop's first voxel, may be
    negative; whole but for resampled crops. inside: the part of the crop that the volume fills. step: voxels of the volume from
    one voxel of the crop to the next, 1 but for resampled crops."""

    hu: np.ndarray
    start: Triple
    inside: tuple[slice, slice, slice]
    step: Triple = (1, 1, 1)

    def affine(self, volume: np.ndarray) -> np.ndarray:
        """4 x 4, voxel of the crop -> RAS mm, from that of the volume."""
        own = volume.copy()
        own[:3, :3] *= self.step
        own[:3, 3] += volume[:3, :3] @ self.start
        return own

    @property
    def valid(self) -> np.ndarray:
        """bool [X, Y, Z]: which voxels are the volume's, and not padding."""
        mask = np.zeros(self.hu.shape, dtype=bool)
        mask[self.inside] = True
        return mask


def crop_around(voxels: Voxels, centre: Triple, size: Size, out: np.ndarray | None = None) -> Crop:
    """The ``size`` voxels around ``centre``, written to ``out`` (int16) when given. Only what the crop needs is read."""
    starts, inside, region = [], [], []
    for place, n, length in zip(centre, voxels.shape, size, strict=True):
        start = int(np.floor(place - (length - 1) / 2 + 0.5))
        low, high = min(max(start, 0), n), max(min(start + length, n), 0)
        starts.append(start)
        region.append(slice(low, max(low, high)))
        inside.append(slice(low - start, max(low, high) - start))
    part = voxels[tuple(region)]
    hu = np.empty(size, dtype=np.int16) if out is None else out  # a slice of a memory map would keep the map open
    x, y, z = starts
    a, b, c = inside
    if part.shape != tuple(size):
        hu.fill(AIR_HU)
    hu[a, b, c] = part
    return Crop(hu, (x, y, z), (a, b, c))


def random_centre(shape: Size, size: Size, rng: np.random.Generator) -> Triple:
    """A centre whose crop is uniform among those that lie wholly inside; the middle on an axis shorter than the crop."""
    x, y, z = (
        (n - 1) / 2 if n <= length else int(rng.integers(n - length + 1)) + (length - 1) / 2
        for n, length in zip(shape, size, strict=True)
    )
    return x, y, z


def centre_around(low: Size, high: Size, shape: Size, size: Size, rng: np.random.Generator | None = None) -> Triple:
    """The centre of a crop around the box of voxels ``low`` .. ``high`` (exclusive): its middle, or random (given ``rng``).

    Random means uniform among the crops inside the volume that hold the whole box (on an axis where the box is longer: that lie
    within it); the middle of the volume on an axis where it is shorter than the crop.
    """
    if rng is None:
        x, y, z = ((a + b - 1) / 2 for a, b in zip(low, high, strict=True))
        return x, y, z
    x, y, z = (
        (n - 1) / 2 if n <= length else _start_around(a, b, n, length, rng) + (length - 1) / 2
        for a, b, n, length in zip(low, high, shape, size, strict=True)
    )
    return x, y, z


def _start_around(low: int, high: int, n: int, length: int, rng: np.random.Generator) -> int:
    first, last = sorted((high - length, low))
    return int(rng.integers(max(first, 0), min(last, n - length) + 1))
