"""The volumes of a cohort: index, memory-mapped HU, crops."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mmjepa.files import read_json
from mmjepa.refusal import Refusal

AIR_HU = -1000


class VolumeStore:
    """Read access to ``<cohort>/ct``. It holds no open file, so it may be pickled into workers.

    Raises Refusal INDEX_MISSING, INDEX_BROKEN; per image IMAGE_UNKNOWN and CACHE_TORN (the voxel file is not what the sidecar says).
    """

    def __init__(self, cohort: Path | str) -> None:
        self.folder = Path(cohort) / "ct"
        path = self.folder / "index.parquet"
        if not path.is_file():
            raise Refusal("INDEX_MISSING", f"{path} does not exist", "Ingest the images first")
        try:
            self.index = pd.read_parquet(path)
            self._row_of = {image_id: n for n, image_id in enumerate(self.index["image_id"])}
        except (OSError, ValueError, KeyError):
            raise Refusal("INDEX_BROKEN", f"{path} is not an image index", "Ingest the images again") from None

    @cached_property
    def fingerprint(self) -> str:
        """Hash over the images and the files that each came from; the same cohort content gives the same text."""
        pairs = sorted(zip(self.index["image_id"], self.index["source_hash"], strict=True))
        return hashlib.sha256("\n".join(f"{image} {source}" for image, source in pairs).encode()).hexdigest()

    def hu(self, image_id: str) -> np.memmap:
        """int16 HU [X, Y, Z] in RAS+, read-only; voxels are read from the disk when they are touched."""
        sidecar = self._sidecar(image_id)
        path = self.folder / "volumes" / f"{image_id}.npy"
        if not path.is_file() or path.stat().st_size != sidecar["bytes"]:
            raise _torn(path)
        try:
            volume = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError:
            raise _torn(path) from None
        if list(volume.shape) != sidecar["shape"] or volume.dtype != np.int16:
            raise _torn(path)
        return volume

    def shape(self, image_id: str) -> tuple[int, int, int]:
        """Voxels along R, A, S."""
        x, y, z = (int(self._row(image_id)[f"shape_{axis}"]) for axis in "xyz")
        return x, y, z

    def spacing_mm(self, image_id: str) -> tuple[float, float, float]:
        """Voxel edge lengths along R, A, S."""
        x, y, z = (float(self._row(image_id)[f"spacing_{axis}"]) for axis in "xyz")
        return x, y, z

    def affine(self, image_id: str) -> np.ndarray:
        """4 x 4, voxel index -> RAS mm, float64."""
        return np.array(self._sidecar(image_id)["affine"], dtype=np.float64)

    def voxel(self, image_id: str, point_ras_mm: tuple[float, float, float]) -> tuple[float, float, float]:
        """The (continuous) voxel index of a point in RAS mm."""
        x, y, z = np.linalg.solve(self.affine(image_id), [*point_ras_mm, 1.0])[:3]
        return float(x), float(y), float(z)

    def centre(self, image_id: str, centre: tuple[float, float, float] | None) -> tuple[float, float, float]:
        """``centre`` as a voxel index, the middle of the volume when None. Raises CROP_OUTSIDE when it lies outside."""
        shape = self.shape(image_id)
        if centre is None:
            x, y, z = ((n - 1) / 2 for n in shape)
            return x, y, z
        if not all(-0.5 <= place <= n - 0.5 for place, n in zip(centre, shape, strict=True)):
            raise Refusal("CROP_OUTSIDE", f"centre of a crop lies outside image {image_id} of shape {shape}")
        return centre

    def crop_hu(
        self, image_id: str, size: tuple[int, int, int], centre: tuple[float, float, float] | None = None
    ) -> np.ndarray:
        """int16 HU of ``size`` voxels around ``centre`` (voxel index, None = middle); air (-1000) where the volume ends."""
        volume = self.hu(image_id)
        crop = np.full(size, AIR_HU, dtype=np.int16)
        inside, target = [], []
        for place, n, length in zip(self.centre(image_id, centre), volume.shape, size, strict=True):
            start = int(np.floor(place - (length - 1) / 2 + 0.5))
            low, high = max(start, 0), min(start + length, n)
            inside.append(slice(low, high))
            target.append(slice(low - start, high - start))
        crop[tuple(target)] = volume[tuple(inside)]
        return crop

    def _row(self, image_id: str) -> pd.Series:
        if image_id not in self._row_of:
            raise Refusal("IMAGE_UNKNOWN", f"image {image_id} is not in {self.folder / 'index.parquet'}")
        return self.index.iloc[self._row_of[image_id]]

    def _sidecar(self, image_id: str) -> dict[str, Any]:
        self._row(image_id)
        return read_json(self.folder / "volumes" / f"{image_id}.json")


def _torn(path: Path) -> Refusal:
    return Refusal("CACHE_TORN", f"{path} is not what its sidecar says", "Delete the two files and ingest again")
