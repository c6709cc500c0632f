"""Stored volumes -> batches of windowed crops, one sample in memory at a time besides the batch itself.

For work on images alone. A sample is decided by (seed, epoch, image), never by the batch it is in.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mmjepa.ct.boxes import Box
from mmjepa.ct.crop import Crop, Size, Triple, centre_around, crop_around, random_centre
from mmjepa.ct.store import VolumeStore
from mmjepa.ct.window import windowed
from mmjepa.keyed import generator, key_words
from mmjepa.refusal import Refusal

Transform = Callable[[Tensor], Tensor | np.ndarray]


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
        """bool [B, 1, X, Y, Z]: the crops' voxels that are volume and not padding, before any transform; made when first asked for."""
        mask = torch.zeros((len(self.images), 1, *self.size), dtype=torch.bool)
        for row, region in zip(mask, self.inside, strict=True):
            row[0][region] = True
        return mask


class VolumeBatches:
    """Batches of one crop of every image, in an order of each epoch's own. It may be pickled into workers.

    Crops lie anywhere in their volume, uniformly; or, where an image has boxes or a centre, there. Around lesions that readers drew::

        store = VolumeStore("cohort")
        boxes, _ = read_boxes("annotations", "dicom", store, crosswalk)  # mmjepa.ct.boxes; crosswalk: the one of ingest
        for batch in VolumeBatches(store, list(boxes), size=(96, 96, 96), batch=4, seed=0, boxes=boxes).epoch(0):
            batch.voxels, batch.valid

    The same crop in every epoch, such as the middle: ``centres={image: store.centre(image, None) for image in images}``.
    """

    def __init__(
        self,
        store: VolumeStore,
        images: Sequence[str],
        *,
        size: Size,
        batch: int,
        seed: int,
        windows: Sequence[str] = ("wide",),
        boxes: Mapping[str, Sequence[Box]] | None = None,
        centres: Mapping[str, Triple] | None = None,
        transform: Transform | None = None,
    ) -> None:
        """boxes: of an image; it is then cropped around one of them, drawn evenly.
        centres: voxel index of an image's crop (``VolumeStore.voxel`` finds that of a point in mm); it goes before boxes.
        transform: of float32 [C, X, Y, Z], such as a MONAI transform; one that has ``set_random_state`` is seeded for each sample.
        The tensor that it is given is overwritten by the next sample.

        Raises Refusal IMAGE_UNKNOWN, WINDOW_UNKNOWN, BATCH_EMPTY, CROP_OUTSIDE, BOX_OUTSIDE.
        """
        if not images or batch < 1 or min(size) < 1:
            raise Refusal("BATCH_EMPTY", f"{len(images)} images in batches of {batch} crops of {tuple(size)} voxels")
        self.store, self.images, self.size, self.batch, self.seed = store, list(images), size, batch, seed
        self.windows, self.boxes, self.centres, self.transform = tuple(windows), boxes or {}, centres or {}, transform
        for image in images:
            store.centre(image, self.centres.get(image))
            shape = store.shape(image)
            for box in self.boxes.get(image, ()):
                if min(box.low) < 0 or any(b > n for b, n in zip(box.high, shape, strict=True)):
                    raise Refusal("BOX_OUTSIDE", f"a box lies beyond image {image} of shape {shape}")
        windowed(np.zeros((1, 1, 1), dtype=np.int16), windows)

    def __len__(self) -> int:
        """Batches of an epoch; the last may be smaller."""
        return -(-len(self.images) // self.batch)

    def epoch(self, number: int) -> Iterator[VolumeBatch]:
        """The batches of one epoch. Raises the refusals of the store, and TRANSFORM_SHAPE when samples come out unequal."""
        order, desk = generator(self.seed, "order", number).permutation(len(self.images)), _Desk(self)
        for first in range(0, len(order), self.batch):
            yield self._batch([self.images[n] for n in order[first : first + self.batch]], number, desk)

    def sample(self, image: str, epoch: int) -> tuple[Tensor, Crop]:
        """float32 [C, X, Y, Z] of one image in one epoch, and the crop that it was made of."""
        desk, voxels = _Desk(self), torch.empty((len(self.windows), *self.size))
        crop = self._read(image, epoch, desk, voxels)
        return (self._transformed(voxels, image, epoch, desk) if self.transform else voxels), crop

    def _read(self, image: str, epoch: int, desk: "_Desk", out: Tensor) -> Crop:
        volume = self.store.hu(image)
        crop = crop_around(volume, self._centre(image, epoch, volume.shape), self.size, desk.hu)
        windowed(crop.hu, self.windows, out.numpy(), desk.spare)
        return crop

    def _centre(self, image: str, epoch: int, shape: Sequence[int]) -> Triple:
        if image in self.centres:
            return self.centres[image]
        rng, (x, y, z) = generator(self.seed, "crop", epoch, image), shape
        boxes = self.boxes.get(image)
        if not boxes:
            return random_centre((x, y, z), self.size, rng)
        box = boxes[int(rng.integers(len(boxes)))]
        return centre_around(box.low, box.high, (x, y, z), self.size, rng)

    def _transformed(self, voxels: Tensor, image: str, epoch: int, desk: "_Desk") -> Tensor:
        assert self.transform
        reseed = getattr(self.transform, "set_random_state", None)
        if reseed:
            desk.random.seed(key_words(self.seed, "transform", epoch, image)[0])
            reseed(state=desk.random)
        made = torch.as_tensor(self.transform(voxels))
        plain = made.as_tensor() if hasattr(made, "as_tensor") else made  # MONAI's own tensors slow every later step
        return plain.float()

    def _batch(self, images: Sequence[str], epoch: int, desk: "_Desk") -> VolumeBatch:
        voxels, inside = _empty(len(images), len(self.windows), *self.size), []
        for row, image in enumerate(images):
            if self.transform is None:
                inside.append(self._read(image, epoch, desk, voxels[row]).inside)
                continue
            inside.append(self._read(image, epoch, desk, desk.sample).inside)
            sample = self._transformed(desk.sample, image, epoch, desk)
            if row == 0 and sample.shape != voxels.shape[1:]:
                voxels = _empty(len(images), *sample.shape)
            if sample.ndim != 4 or sample.shape != voxels.shape[1:]:
                made = f"{tuple(sample.shape)} after {tuple(voxels.shape[1:])}"
                raise Refusal("TRANSFORM_SHAPE", f"the transform made {made}", "Want one shape [C, X, Y, Z]")
            voxels[row] = sample
        return VolumeBatch(voxels, tuple(images), self.size, tuple(inside))


class _Desk:
    """What every sample of an epoch uses again: fresh memory costs more than the work that is done in it."""

    def __init__(self, made: VolumeBatches) -> None:
        _keep_freed_memory()
        self.hu, self.spare = np.empty((2, *made.size), dtype=np.int16)
        self.random = np.random.RandomState(0)  # MONAI's kind; a new one costs fifty times what seeding does
        if made.transform:
            self.sample = torch.empty((len(made.windows), *made.size))


def _keep_freed_memory() -> None:
    """Have glibc keep the blocks that transforms and batches free (up to 62 MB), for it to hand them out again with their pages.

    Once a large block was freed it takes blocks up to that size from the heap (mallopt(3), M_MMAP_THRESHOLD; at most 32 MB). The
    block is never touched, so it costs no memory; other allocators are left as they are.
    """
    np.empty(31 << 20, dtype=np.uint8)


def _empty(*shape: int) -> Tensor:
    """float32, from numpy: it asks for huge pages, and a fault of a small page costs as much as filling it."""
    return torch.from_numpy(np.empty(shape, dtype=np.float32))
