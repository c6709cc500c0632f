"""Which image of a moment is taken, and which part of it."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mmjepa.ct.batches import VolumeBatches
from mmjepa.ct.crop import Size, Triple
from mmjepa.ct.store import VolumeStore
from mmjepa.ct.window import Window

FEW = 0.05  # of a volume, below which a crop is warned of


def order_images(paired: pd.DataFrame, index: pd.DataFrame, prefer_kernel: Sequence[str] = ()) -> pd.DataFrame:
    """Paired images (``mmjepa.pairing.pair``) by subject and time; of those of one moment, the one to take comes first.

    That is the one whose kernel stands first in ``prefer_kernel`` (capitals do not matter), then the one of the thinnest
    slices, then the first kernel by name. index: of the volume store.
    """
    ranks = {name.casefold(): rank for rank, name in reversed(list(enumerate(prefer_kernel)))}
    known = index.set_index("image_id").loc[paired["image_id"]]
    kernels = known["kernel"].fillna("").str.casefold()
    keys = {
        "rank": kernels.map(lambda name: ranks.get(str(name), len(ranks))).to_numpy(),
        "thick": known["spacing_z"].to_numpy(),
        "kernel": kernels.to_numpy(),
    }
    order = paired.assign(**keys).sort_values(["subject_id", "prediction_time", *keys, "image_id"])
    return order[list(paired.columns)]


class Crops:
    """One windowed crop of an image: anywhere in it while training, keyed by (seed, epoch, image); else its middle."""

    def __init__(
        self,
        store: VolumeStore,
        images: Sequence[str],
        *,
        size: Size,
        spacing_mm: Triple | None,
        window: Window,
        seed: int,
    ) -> None:
        """size: voxels. spacing_mm: of a crop's voxels, None for each volume's own."""
        settings: dict[str, Any] = {"size": size, "batch": 1, "seed": seed, "windows": window, "spacing_mm": spacing_mm}
        self._anywhere = VolumeBatches(store, images, **settings)
        self._middle = VolumeBatches(store, images, centres={i: store.centre(i, None) for i in images}, **settings)
        self.report = self._report(store.index.set_index("image_id").loc[list(images)], np.array(size), spacing_mm)

    def voxels(self, images: Sequence[str], epochs: Sequence[int] | None = None) -> Tensor:
        """float32 [V, 1, X, Y, Z] in 0..1: each image's crop in its epoch, or with None its middle."""
        if epochs is None:
            return torch.stack([self._middle.sample(image, 0)[0] for image in images])
        return torch.stack([self._anywhere.sample(image, n)[0] for image, n in zip(images, epochs, strict=True)])

    @staticmethod
    def _report(index: pd.DataFrame, size: np.ndarray, spacing_mm: Triple | None) -> dict[str, Any]:
        """The median crop in mm, and the part of the median volume that it covers."""
        own_mm = index[["spacing_x", "spacing_y", "spacing_z"]].to_numpy(float)
        volume_mm = own_mm * index[["shape_x", "shape_y", "shape_z"]].to_numpy(float)
        crop_mm = size * (own_mm if spacing_mm is None else np.full_like(own_mm, spacing_mm))
        covered = np.minimum(1, crop_mm / volume_mm).prod(axis=1)
        return {
            "crop_mm": [round(float(edge), 1) for edge in np.median(crop_mm, axis=0)],
            "crop_covers": round(float(np.median(covered)), 5),
        }


def report_choice(scans: Sequence[Sequence[str]], index: pd.DataFrame) -> dict[str, Any]:
    """How many moments have several images, and how often each kernel was taken. scans: images of each, in order."""
    kernel = dict(zip(index["image_id"], index["kernel"].fillna(""), strict=True))
    taken = Counter(kernel[images[0]] or "not told" for images in scans)
    return {"several_images": sum(len(images) > 1 for images in scans), "kernels": dict(sorted(taken.items()))}


def say_images(report: dict[str, Any], *, chosen_by: Sequence[str]) -> list[str]:
    """What a reader should know of the crops and images of a sampler's report, a line each."""
    edges = " x ".join(f"{edge:g}" for edge in report["crop_mm"])
    lines = [f"a CT crop is {edges} mm, {100 * report['crop_covers']:.3g} % of the median volume"]
    if report["crop_covers"] < FEW:
        lines.append("warning: most of each volume is never in one crop; raise views.spacing_mm or views.crop")
    if report["several_images"]:
        taken = ", ".join(f"{name} {n}" for name, n in report["kernels"].items())
        rule = (
            f"views.prefer_kernel, {', '.join(chosen_by)}"
            if chosen_by
            else "the thinnest slices (no views.prefer_kernel)"
        )
        lines.append(
            f"{report['several_images']} dates have several images: training draws one, embedding takes one by {rule}; "
            f"kernels taken: {taken}"
        )
    return lines
