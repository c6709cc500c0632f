"""The volumes of a cohort: index, voxels on disk (memory-mapped or compressed), crops."""

import hashlib
import json
import os
from collections import OrderedDict
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from mmjepa.ct.crop import AIR_HU, Box, Crop, Size, Triple, Voxels, crop_around
from mmjepa.files import atomic_path, read_json
from mmjepa.refusal import Refusal

__all__ = ["AIR_HU", "FORMATS", "VolumeStore", "transform_hash", "voxel_file", "write_voxels"]

Format = Literal["npy", "blosc2"]
FORMATS = {"npy": ".npy", "blosc2": ".b2nd"}
BOX_EDGES = [f"{end}_{axis}" for end in ("low", "high") for axis in "xyz"]  # columns of boxes.parquet
_CHUNK = 64
_OPEN = 32  # volumes kept open by a store: each a file handle and a range of addresses, no memory


def write_voxels(folder: Path, image_id: str, hu: np.ndarray, form: Format = "npy") -> dict[str, Any]:
    """Write int16 HU [X, Y, Z] whole or not at all; return the sidecar's ``format`` and ``bytes``.

    npy: memory-mapped when read, the fastest. blosc2: zstd level 1 in chunks of 64^3, about a third of the size.
    Raises Refusal EXTRA_MISSING (blosc2 is not installed), DISK_FULL.
    """
    hu = np.ascontiguousarray(hu, dtype=np.int16)
    path = folder / (image_id + FORMATS[form])
    with atomic_path(path) as temporary:
        if form == "blosc2":
            temporary.write_bytes(_compressed(hu))
        else:
            with open(temporary, "wb") as handle:  # np.save loses the number of "no space left"
                np.lib.format.write_array_header_1_0(handle, np.lib.format.header_data_from_array_1_0(hu))
                handle.write(hu.data)
    return {"format": form, "bytes": path.stat().st_size}


def _compressed(hu: np.ndarray) -> bytes:
    blosc2 = _blosc2()
    settings = {"codec": blosc2.Codec.ZSTD, "clevel": 1, "nthreads": 1}
    chunks = tuple(min(_CHUNK, n) for n in hu.shape)
    return blosc2.asarray(hu, chunks=chunks, cparams=settings).to_cframe()


def _blosc2() -> Any:
    try:
        return import_module("blosc2")
    except ImportError:
        raise Refusal("EXTRA_MISSING", "blosc2 is not installed", "Install the extra mmjepa[blosc2]") from None


def voxel_file(folder: Path, image_id: str, sidecar: dict[str, Any]) -> Path:
    """Where the voxels of a volume lie, by its sidecar."""
    return folder / (image_id + FORMATS[sidecar.get("format", "npy")])


def transform_hash(settings: dict[str, Any]) -> str:
    """Hash of the settings and version that made a volume."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


class _Open(NamedTuple):
    """What is kept of a volume that was opened: its sidecar and voxel file, and how they were found."""

    files: tuple[str, str]
    stamps: tuple[Any, Any]
    voxels: Voxels
    sidecar: dict[str, Any]


class VolumeStore:
    """Read access to ``<cohort>/ct``. It may be pickled into workers: what it holds open stays behind.

    Raises Refusal INDEX_MISSING, INDEX_BROKEN; per image IMAGE_UNKNOWN, CACHE_TORN (the voxel file is not what the sidecar says),
    CACHE_STALE (the sidecar is of another source than the index, or of other settings than the manifest), EXTRA_MISSING.
    """

    def __init__(self, cohort: Path | str) -> None:
        self.folder = Path(cohort) / "ct"
        path = self.folder / "index.parquet"
        if not path.is_file():
            raise Refusal("INDEX_MISSING", f"{path} does not exist", "Ingest the images first")
        try:
            self.index = pd.read_parquet(path)
            self._row_of = {image_id: n for n, image_id in enumerate(self.index["image_id"])}
            self._source_hashes = list(self.index["source_hash"])
        except (OSError, ValueError, KeyError):
            raise Refusal("INDEX_BROKEN", f"{path} is not an image index", "Ingest the images again") from None
        self._open: OrderedDict[str, _Open] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    @cached_property
    def fingerprint(self) -> str:
        """Hash over the images and the files that each came from; the same cohort content gives the same text."""
        pairs = sorted(zip(self.index["image_id"], self.index["source_hash"], strict=True))
        return hashlib.sha256("\n".join(f"{image} {source}" for image, source in pairs).encode()).hexdigest()

    def hu(self, image_id: str) -> Voxels:
        """int16 HU [X, Y, Z] in RAS+, read-only and read from the disk where they are sliced; ``numpy.asarray`` reads them all."""
        return self._opened(image_id).voxels

    def shape(self, image_id: str) -> Size:
        """Voxels along R, A, S."""
        x, y, z = (int(self._row(image_id)[f"shape_{axis}"]) for axis in "xyz")
        return x, y, z

    def spacing_mm(self, image_id: str) -> Triple:
        """Voxel edge lengths along R, A, S."""
        x, y, z = (float(self._row(image_id)[f"spacing_{axis}"]) for axis in "xyz")
        return x, y, z

    def affine(self, image_id: str) -> np.ndarray:
        """4 x 4, voxel index -> RAS mm, float64."""
        return np.array(self._opened(image_id).sidecar["affine"], dtype=np.float64)

    def voxel(self, image_id: str, point_ras_mm: Triple) -> Triple:
        """The (continuous) voxel index of a point in RAS mm."""
        x, y, z = np.linalg.solve(self.affine(image_id), [*point_ras_mm, 1.0])[:3]
        return float(x), float(y), float(z)

    def centre(self, image_id: str, centre: Triple | None) -> Triple:
        """``centre`` as a voxel index, the middle of the volume when None. Raises CROP_OUTSIDE when it lies outside."""
        return _inside(image_id, centre, self.shape(image_id))

    def crop(self, image_id: str, size: Size, centre: Triple | None = None) -> Crop:
        """``size`` voxels around ``centre`` (voxel index, None = middle; for a point in mm see ``voxel``), padded with air.

        Raises CROP_OUTSIDE when the centre lies outside the volume.
        """
        voxels = self.hu(image_id)
        return crop_around(voxels, _inside(image_id, centre, voxels.shape), size)

    def crop_hu(self, image_id: str, size: Size, centre: Triple | None = None) -> np.ndarray:
        """The voxels of ``crop``: int16 HU [X, Y, Z]."""
        return self.crop(image_id, size, centre).hu

    def boxes(self, image_id: str) -> list[Box]:
        """The boxes that readers drew in a volume (``mmjepa.ct.boxes.write_boxes``); none where nobody drew any.

        Raises IMAGE_UNKNOWN, BOXES_BROKEN.
        """
        self._known(image_id)
        return list(self._boxes.get(image_id, ()))

    @cached_property
    def _boxes(self) -> dict[str, list[Box]]:
        path, boxes = self.folder / "boxes.parquet", {}
        if path.is_file():
            try:
                for row in pd.read_parquet(path)[["image_id", "label", *BOX_EDGES]].itertuples(index=False):
                    a, b, c, x, y, z = map(int, row[2:])
                    boxes.setdefault(row[0], []).append(Box(row[1], (a, b, c), (x, y, z)))
            except (OSError, ValueError, KeyError):
                raise Refusal("BOXES_BROKEN", f"{path} is no table of boxes", "Ingest the boxes again") from None
        return boxes

    def _known(self, image_id: str) -> int:
        if image_id not in self._row_of:
            raise Refusal("IMAGE_UNKNOWN", f"image {image_id} is not in {self.folder / 'index.parquet'}")
        return self._row_of[image_id]

    def _row(self, image_id: str) -> pd.Series:
        return self.index.iloc[self._known(image_id)]

    def _opened(self, image_id: str) -> _Open:
        """Voxels and sidecar; those opened last are kept, and opened anew when a file was touched."""
        known = self._open.get(image_id)
        if known and known.stamps == tuple(map(_stamp, known.files)):
            self._open.move_to_end(image_id)
            return known
        self._open.pop(image_id, None)
        folder, sidecar = self.folder / "volumes", self._sidecar(image_id)
        files = str(folder / f"{image_id}.json"), str(voxel_file(folder, image_id, sidecar))
        stamps = _stamp(files[0]), _stamp(files[1])
        self._open[image_id] = opened = _Open(files, stamps, _read_voxels(Path(files[1]), sidecar), sidecar)
        if len(self._open) > _OPEN:
            self._open.popitem(last=False)
        return opened

    def _sidecar(self, image_id: str) -> dict[str, Any]:
        row = self._known(image_id)
        path = self.folder / "volumes" / f"{image_id}.json"
        sidecar = read_json(path)
        if sidecar.get("source_hash") != self._source_hashes[row]:
            raise _stale(path, "is of another source than the index says")
        if self._made_with is not None and sidecar.get("transform_hash") != self._made_with:
            raise _stale(path, "was made with other settings than the manifest says")
        return sidecar

    @cached_property
    def _made_with(self) -> str | None:
        path = self.folder / "manifest.json"
        return transform_hash(read_json(path)["settings"]) if path.is_file() else None


def _inside(image_id: str, centre: Triple | None, shape: tuple[int, ...]) -> Triple:
    if centre is None:
        x, y, z = ((n - 1) / 2 for n in shape)
        return x, y, z
    if not all(-0.5 <= place <= n - 0.5 for place, n in zip(centre, shape, strict=True)):
        raise Refusal("CROP_OUTSIDE", f"centre of a crop lies outside image {image_id} of shape {tuple(shape)}")
    return centre


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_ino, state.st_size, state.st_mtime_ns


def _read_voxels(path: Path, sidecar: dict[str, Any]) -> Voxels:
    if not path.is_file() or path.stat().st_size != sidecar["bytes"]:
        raise _torn(path)
    try:
        if path.suffix == FORMATS["blosc2"]:
            voxels: Any = _blosc2().open(str(path), mode="r", dparams={"nthreads": 1})
        else:
            voxels = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, RuntimeError, EOFError):
        raise _torn(path) from None
    if list(voxels.shape) != sidecar["shape"] or voxels.dtype != np.int16:
        raise _torn(path)
    return voxels


def _torn(path: Path) -> Refusal:
    return Refusal("CACHE_TORN", f"{path} is not what its sidecar says", "Delete the two files and ingest again")


def _stale(path: Path, why: str) -> Refusal:
    return Refusal("CACHE_STALE", f"{path} {why}", "Ingest the images again")
