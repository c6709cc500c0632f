"""Stored volumes -> batches of windowed crops, one sample in memory at a time besides the batch itself.

For work on images alone. A sample is decided by (seed, epoch, image), never by the batch or the process it is in.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmjepa.ct.crop import Box, Crop, Size, Triple, centre_around, crop_around, random_centre
from mmjepa.ct.resample import resampled_crop, steps
from mmjepa.ct.store import VolumeStore
from mmjepa.ct.transform import Transform, check_transform, transformed
from mmjepa.ct.window import Window, ranges_hu, windowed
from mmjepa.keyed import generator
from mmjepa.refusal import Refusal

Item = tuple[str, int]  # an image, and which of its mentions this is


@dataclass(frozen=True)
class VolumeBatch:
    """voxels: float32 [B, C, X, Y, Z] in 0..1, a channel a window (what a transform made of them, where there is one).
    images: their ids. size: of the crops. inside: the part of each crop that its volume fills, before any transform."""

    voxels: Tensor
    images: tuple[str, ...]
    size: Size
    inside: tuple[tuple[slice, slice, slice], ...]

    @cached_property
    def valid(self) -> Tensor:
        """bool [B, 1, X, Y, Z]: the crops' voxels that are volume and not padding; made when first asked for.

        A transform changes the voxels alone: after one that flips, turns or resizes, ``valid`` still lies as the crop did.
        """
        mask = torch.zeros((len(self.images), 1, *self.size), dtype=torch.bool)
        for row, region in zip(mask, self.inside, strict=True):
            row[0][region] = True
        return mask


class VolumeBatches:
    """Batches of one crop for every mention of an image, in an order of each epoch's own::

        store = VolumeStore("cohort")
        batches = VolumeBatches(store, list(store.index["image_id"]), size=96, batch=4, seed=0, windows=("lung", "soft"))
        for batch in batches.epoch(0):
            batch.voxels  # float32 [4, 2, 96, 96, 96]

    An image that is listed four times gives four crops of its own an epoch. Crops lie anywhere in their volume, uniformly; or, where
    an image has boxes or a centre, there. Around the lesions that readers drew: ``boxes={i: store.boxes(i) for i in images}``;
    ``unboxed`` says how many images have none and are cropped anywhere. The same crop in every epoch, such as the middle:
    ``centres={i: store.centre(i, None) for i in images}``. An epoch is a dataset of whole batches: see ``Epoch`` for workers.
    """

    def __init__(
        self,
        store: VolumeStore,
        images: Sequence[str],
        *,
        size: Size | int,
        batch: int,
        seed: int,
        windows: Window | Sequence[Window] = "wide",
        spacing_mm: Triple | float | None = None,
        boxes: Mapping[str, Sequence[Box]] | None = None,
        centres: Mapping[str, Triple] | None = None,
        transform: Transform | None = None,
    ) -> None:
        """size: voxels of a crop; one number makes a cube. windows: ``mmjepa.ct.window``.
        spacing_mm: of the crop's voxels, resampled from the volume (as ``mmjepa.ct.resample.crop_mm``); None: the volume's own.
        boxes: of an image; it is then cropped around one of them, drawn evenly.
        centres: voxel index of an image's crop (``VolumeStore.voxel`` finds that of a point in mm); it goes before boxes.
        transform: of float32 [C, X, Y, Z], such as a MONAI transform of arrays (``mmjepa.ct.transform``); ``valid`` is not transformed.

        Raises Refusal IMAGE_UNKNOWN, BATCH_EMPTY, WINDOW_*, SPACING_INVALID, CROP_OUTSIDE, CENTRE_INVALID, BOX_OUTSIDE, BOX_INVALID,
        TRANSFORM_INVALID.
        """
        x, y, z = (size,) * 3 if isinstance(size, int) else size
        if len(images) == 0 or batch < 1 or min(x, y, z) < 1:
            raise Refusal("BATCH_EMPTY", f"{len(images)} images in batches of {batch} crops of {x} x {y} x {z} voxels")
        seen: Counter[str] = Counter()
        self.items: list[Item] = []
        for image in images:
            self.items.append((image, seen[image]))
            seen[image] += 1
        self.store, self.size, self.batch, self.seed = store, (x, y, z), batch, seed
        self.windows, self.transform = ranges_hu(windows), transform
        self.boxes, self.centres = boxes or {}, centres or {}
        self._steps: dict[str, Triple] = {}  # how many voxels of a volume one of a crop is long
        wanted_mm = (spacing_mm,) * 3 if isinstance(spacing_mm, (int, float)) else spacing_mm
        for image in seen:
            own_mm = store.spacing_mm(image)
            if wanted_mm is not None and wanted_mm != own_mm:
                self._steps[image] = steps(own_mm, wanted_mm)
        for image in self.boxes:
            _check_boxes(image, self.boxes[image], store.shape(image))
        for image, centre in self.centres.items():
            _check_centre(image, centre, store)
        check_transform(transform)
        self.unboxed = sum(not self.boxes.get(image) for image in seen)

    def __len__(self) -> int:
        """Batches of an epoch; the last may be smaller."""
        return -(-len(self.items) // self.batch)

    def epoch(self, number: int) -> "Epoch":
        """The batches of one epoch, made when they are asked for."""
        return Epoch(self, number)

    def sample(self, image: str, epoch: int, mention: int = 0) -> tuple[Tensor, Crop]:
        """float32 [C, X, Y, Z] of one image in one epoch, and the crop that it was made of."""
        desk, voxels = _Desk(self), torch.empty((len(self.windows), *self.size))
        crop = self._read((image, mention), epoch, desk, voxels)
        return (voxels if self.transform is None else self._transformed(voxels, crop, (image, mention), epoch)), crop

    def _read(self, item: Item, epoch: int, desk: "_Desk", out: Tensor) -> Crop:
        volume, step, size = self.store.hu(item[0]), self._steps.get(item[0]), self.size
        if step is None:
            crop = crop_around(volume, self._centre(item, epoch, volume.shape, size), size, desk.hu)
        else:
            crop = resampled_crop(volume, self._centre_mm(item, epoch, volume.shape, step), size, step)
        windowed(crop.hu, self.windows, out.numpy(), desk.spare)
        return crop

    def _centre(self, item: Item, epoch: int, shape: Sequence[int], size: Size) -> Triple:
        image, (x, y, z) = item[0], shape
        if image in self.centres:
            return self.centres[image]
        rng, boxes = generator(self.seed, "crop", epoch, *_key(item)), self.boxes.get(image)
        if not boxes:
            return random_centre((x, y, z), size, rng)
        box = boxes[int(rng.integers(len(boxes)))]
        return centre_around(box.low, box.high, (x, y, z), size, rng)

    def _centre_mm(self, item: Item, epoch: int, shape: Sequence[int], step: Triple) -> Triple:
        """As ``_centre``, for crops that are no whole number of voxels long: at most half a voxel beside it, to stay inside."""
        lengths = [n * width for n, width in zip(self.size, step, strict=True)]
        x, y, z = (max(1, int(length)) for length in lengths)
        centre = self._centre(item, epoch, shape, (x, y, z))
        if item[0] in self.centres:
            return centre
        x, y, z = (
            (n - 1) / 2 if length > n else min(max(place, (length - 1) / 2), n - (length + 1) / 2)
            for place, n, length in zip(centre, shape, lengths, strict=True)
        )
        return x, y, z

    def _transformed(self, voxels: Tensor, crop: Crop, item: Item, epoch: int) -> Tensor:
        assert self.transform
        affine = crop.affine(self.store.affine(item[0]))
        return transformed(self.transform, voxels, affine, self.seed, "transform", epoch, *_key(item))

    def _batch(self, items: Sequence[Item], epoch: int, desk: "_Desk") -> VolumeBatch:
        voxels, inside = _empty(len(items), len(self.windows), *self.size), []
        for row, item in enumerate(items):
            if self.transform is None:
                inside.append(self._read(item, epoch, desk, voxels[row]).inside)
                continue
            crop = self._read(item, epoch, desk, desk.sample)
            inside.append(crop.inside)
            sample = self._transformed(desk.sample, crop, item, epoch)
            if row == 0 and sample.shape != voxels.shape[1:]:
                voxels = _empty(len(items), *sample.shape)
            if sample.ndim != 4 or sample.shape != voxels.shape[1:]:
                made = f"{tuple(sample.shape)} after {tuple(voxels.shape[1:])}"
                raise Refusal(
                    "TRANSFORM_SHAPE",
                    f"the transform made {made}",
                    "Want one shape [C, X, Y, Z]; spacing_mm sets voxel sizes",
                )
            voxels[row] = sample
        return VolumeBatch(voxels, tuple(image for image, _ in items), self.size, tuple(inside))


class Epoch(Dataset[VolumeBatch]):
    """The batches of one epoch, by number or one after the other. Every batch stays the caller's.

    With processes that read ahead, which pays where a transform or ``spacing_mm`` takes longer than reading::

        for batch in torch.utils.data.DataLoader(batches.epoch(0), batch_size=None, num_workers=2):
            batch.voxels

    ``batch_size=None`` because an item is a batch already. The batches are the same bits as without workers.
    """

    def __init__(self, batches: VolumeBatches, number: int) -> None:
        self._batches, self.number = batches, number
        self._order = generator(batches.seed, "order", number).permutation(len(batches.items))
        self._desk: _Desk | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> VolumeBatch:
        """One batch. Raises the refusals of the store, TRANSFORM_FAILED, TRANSFORM_OUTPUT and TRANSFORM_SHAPE."""
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        self._desk = self._desk or _Desk(self._batches)
        first, made = index * self._batches.batch, self._batches
        items = [made.items[n] for n in self._order[first : first + made.batch]]
        return made._batch(items, self.number, self._desk)

    def __iter__(self) -> Iterator[VolumeBatch]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_desk": None}


class _Desk:
    """What every sample of an epoch uses again: fresh memory costs more than the work that is done in it."""

    def __init__(self, made: VolumeBatches) -> None:
        self.hu, self.spare = np.empty((2, *made.size), dtype=np.int16)
        if made.transform:
            self.sample = torch.empty((len(made.windows), *made.size))


def _key(item: Item) -> tuple[str, ...]:
    """What names an item in keyed draws."""
    image, mention = item
    return (image, str(mention)) if mention else (image,)


def _check_boxes(image: str, boxes: Sequence[Box], shape: Size) -> None:
    if isinstance(boxes, Box) or not all(isinstance(box, Box) for box in boxes):
        raise Refusal(
            "BOX_INVALID", f"the boxes of image {image} are no list of Box", "mmjepa.ct.crop.Box(label, low, high)"
        )
    for box in boxes:
        for low, high, n in zip(box.low, box.high, shape, strict=True):
            if not 0 <= low < high <= n:
                raise Refusal("BOX_OUTSIDE", f"a box lies beyond image {image} of shape {shape}, or is empty")


def _check_centre(image: str, centre: Triple, store: VolumeStore) -> None:
    try:
        x, y, z = map(float, centre)
    except (TypeError, ValueError):
        hint = "Want a voxel index of three numbers, as VolumeStore.voxel gives"
        raise Refusal("CENTRE_INVALID", f"the centre of image {image} is {centre!r}", hint) from None
    store.centre(image, (x, y, z))


def _empty(*shape: int) -> Tensor:
    """float32, from numpy: it asks for huge pages, and a fault of a small page costs as much as filling it."""
    return torch.from_numpy(np.empty(shape, dtype=np.float32))
