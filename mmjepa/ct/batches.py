"""Stored volumes -> batches of windowed crops, one sample in memory at a time besides the batch itself.

For work on images alone. A sample is decided by (seed, epoch, image), never by the batch it is in.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmjepa.ct.boxes import Box
from mmjepa.ct.crop import Crop, Size, Triple, centre_around, random_centre
from mmjepa.ct.store import VolumeStore
from mmjepa.ct.window import windowed
from mmjepa.keyed import generator, key_words
from mmjepa.refusal import Refusal

Transform = Callable[[Tensor], Tensor | np.ndarray]


@dataclass(frozen=True)
class VolumeBatch:
    """voxels: float32 [B, C, X, Y, Z] in 0..1, a channel a window (what a transform made of them, where there is one).
    valid: bool [B, 1, X, Y, Z], the crop's voxels that are volume and not padding, before any transform. images: their ids."""

    voxels: Tensor
    valid: Tensor
    images: tuple[str, ...]


class VolumeBatches:
    """Batches of one random crop of every image, in an order of each epoch's own. It may be pickled into workers."""

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
        transform: Transform | None = None,
    ) -> None:
        """boxes: of an image; it is then cropped around one of them, drawn evenly; images without any are cropped anywhere.
        transform: of float32 [C, X, Y, Z], such as a MONAI transform; one that has ``set_random_state`` is seeded for each sample.

        Raises Refusal IMAGE_UNKNOWN, WINDOW_UNKNOWN, BATCH_EMPTY.
        """
        if not images or batch < 1 or min(size) < 1:
            raise Refusal("BATCH_EMPTY", f"{len(images)} images in batches of {batch} crops of {tuple(size)} voxels")
        for image in images:
            store.shape(image)
        windowed(np.zeros((1, 1, 1), dtype=np.int16), windows)
        self.store, self.images, self.size, self.batch, self.seed = store, list(images), size, batch, seed
        self.windows, self.boxes, self.transform = tuple(windows), boxes or {}, transform

    def __len__(self) -> int:
        """Batches of an epoch; the last may be smaller."""
        return -(-len(self.images) // self.batch)

    def epoch(self, number: int) -> Iterator[VolumeBatch]:
        """The batches of one epoch. Raises the refusals of the store, and TRANSFORM_SHAPE when samples come out unequal."""
        order = generator(self.seed, "order", number).permutation(len(self.images))
        for first in range(0, len(order), self.batch):
            yield self._batch([self.images[n] for n in order[first : first + self.batch]], number)

    def sample(self, image: str, epoch: int) -> tuple[Tensor, Crop]:
        """float32 [C, X, Y, Z] of one image in one epoch, and the crop that it was made of."""
        crop = self.store.crop(image, self.size, self._centre(image, epoch))
        voxels = torch.from_numpy(windowed(crop.hu, self.windows))
        return self._transformed(voxels, image, epoch), crop

    def _centre(self, image: str, epoch: int) -> Triple:
        rng = generator(self.seed, "crop", epoch, image)
        boxes = self.boxes.get(image)
        x, y, z = self.store.hu(image).shape
        if not boxes:
            return random_centre((x, y, z), self.size, rng)
        box = boxes[int(rng.integers(len(boxes)))]
        return centre_around(box.low, box.high, (x, y, z), self.size, rng)

    def _transformed(self, voxels: Tensor, image: str, epoch: int) -> Tensor:
        if self.transform is None:
            return voxels
        reseed = getattr(self.transform, "set_random_state", None)
        if reseed:
            reseed(seed=key_words(self.seed, "transform", epoch, image)[0])
        made = torch.as_tensor(self.transform(voxels))
        plain = made.as_tensor() if hasattr(made, "as_tensor") else made  # MONAI's own tensors slow every later step
        return plain.float()

    def _batch(self, images: Sequence[str], epoch: int) -> VolumeBatch:
        valid = torch.zeros((len(images), 1, *self.size), dtype=torch.bool)
        voxels = torch.empty(0)
        for row, image in enumerate(images):
            sample, crop = self.sample(image, epoch)
            if row == 0:
                voxels = torch.empty((len(images), *sample.shape))
            if sample.ndim != 4 or sample.shape != voxels.shape[1:]:
                made = f"{tuple(sample.shape)} after {tuple(voxels.shape[1:])}"
                raise Refusal("TRANSFORM_SHAPE", f"the transform made {made}", "Want one shape [C, X, Y, Z]")
            voxels[row] = sample
            valid[row, 0][crop.inside] = True
        return VolumeBatch(voxels, valid, tuple(images))
