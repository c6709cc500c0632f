"""Crops of one volume, and files to normalised batches beside MONAI's data sets."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ct_parts.common import cpu_s, make_store, peak_anonymous_mb, say
from mmjepa.ct.batches import VolumeBatches
from mmjepa.ct.crop import random_centre
from mmjepa.ct.store import VolumeStore
from mmjepa.ct.window import WINDOWS_HU

Work = Callable[[], Any]
WINDOWS = ("wide", "lung", "soft")


def cropping(folder: Path, shape: tuple[int, int, int], edge: int, repeats: int) -> None:
    """Random crops of one volume."""
    make_store(folder, 1, shape)
    store, size = VolumeStore(folder / "cohort"), (edge, edge, edge)
    image = store.index["image_id"][0]
    opened = np.load(folder / "cohort" / "ct" / "volumes" / f"{image}.npy", mmap_mode="r")
    centres = [random_centre(shape, size, np.random.default_rng(n)) for n in range(100)]
    starts = [[int(place - (edge - 1) / 2) for place in centre] for centre in centres]
    works: list[Work] = [
        lambda: [opened[a : a + edge, b : b + edge, c : c + edge].copy() for a, b, c in starts],
        lambda: [store.crop(image, size, centre) for centre in centres],
    ]
    if importlib.util.find_spec("blosc2"):
        make_store(folder / "blosc2", 1, shape, "blosc2")
        packed = VolumeStore(folder / "blosc2" / "cohort")
        works.append(lambda: [packed.crop(image, size, centre) for centre in centres])
    bare, ours, *blosc2 = cpu_s(repeats, *works)
    say("crop, ours / bare memory map", ours / bare, 1.5, at_most=True, bare_ms=10 * bare, ours_ms=10 * ours)
    if blosc2:
        say("crop, blosc2 / npy", blosc2[0] / ours, npy_ms=10 * ours, blosc2_ms=10 * blosc2[0])
    else:
        print(json.dumps({"name": "crop, blosc2 / npy", "skipped": "blosc2 is not installed"}), flush=True)


def loaders(
    paths: list[Path],
    cache: Path,
    edge: int,
    windows: Sequence[str],
    *,
    track_meta: bool,
    look: Callable[[torch.Tensor], Any] = lambda batch: batch.shape,
) -> tuple[Work, Work]:
    """An epoch of MONAI's PersistentDataset, and of its CacheDataset with ThreadDataLoader; windows are made before the cache.

    look: at every batch; what it returns is kept.
    """
    from monai.data import CacheDataset, DataLoader, PersistentDataset, ThreadDataLoader, set_track_meta
    from monai.transforms import Compose, EnsureChannelFirst, Lambda, LoadImage, Orientation, RandFlip, RandSpatialCrop
    from monai.transforms import ScaleIntensityRange as Scale

    scales = [Scale(*WINDOWS_HU[name], 0, 1, clip=True) for name in windows]
    steps = [
        LoadImage(image_only=True),
        EnsureChannelFirst(channel_dim="no_channel"),
        Orientation("RAS"),
        scales[0]
        if len(scales) == 1
        else Lambda(lambda voxels: torch.cat([torch.as_tensor(scale(voxels)) for scale in scales])),
        RandSpatialCrop((edge, edge, edge), random_size=False),
        RandFlip(prob=0.5, spatial_axis=0),
    ]
    files = [str(path) for path in paths]

    def tracked(work: Work) -> Work:
        def run() -> Any:
            set_track_meta(track_meta)
            try:
                return work()
            finally:
                set_track_meta(True)

        return run

    persistent = DataLoader(PersistentDataset(files, Compose(steps), cache_dir=cache), batch_size=4, num_workers=0)
    cached = tracked(lambda: CacheDataset(files, Compose(steps), copy_cache=False, progress=False))()
    threaded = ThreadDataLoader(cached, batch_size=4, num_workers=0, shuffle=True)
    return tracked(lambda: [look(batch) for batch in persistent]), tracked(lambda: [look(batch) for batch in threaded])


def batching(folder: Path, shape: tuple[int, int, int], edge: int, repeats: int) -> None:
    """Files to normalised batches."""
    from monai.transforms import RandFlip

    paths = make_store(folder, 12, shape)
    store, epochs = VolumeStore(folder / "cohort"), iter(range(10**6))
    images, flip = list(store.index["image_id"]), RandFlip(prob=0.5, spatial_axis=0)
    made, several = (
        VolumeBatches(store, images, size=edge, batch=4, seed=0, windows=windows, transform=flip)
        for windows in (("wide",), WINDOWS)
    )

    def peak_mb(count: int) -> float:
        return peak_anonymous_mb(lambda: [batch.images for _ in range(count) for batch in made.epoch(next(epochs))])

    peak_mb(2)
    first, later = peak_mb(5), peak_mb(15)
    works = [
        *loaders(paths, folder / "cache", edge, ("wide",), track_meta=True),
        *loaders(paths, folder / "plain", edge, ("wide",), track_meta=False),
        lambda: [batch.voxels.shape for batch in made.epoch(next(epochs))],
        lambda: [batch.valid.shape for batch in made.epoch(next(epochs))],
    ]
    each = 1000 / len(images)
    disk, memory, plain_disk, plain, ours, masked = (each * spent for spent in cpu_s(repeats, *works))
    figures = {"ours_ms": ours, "ours_masked_ms": masked}
    say("batches, MONAI PersistentDataset / ours", disk / ours, 10, monai_ms=disk, **figures)
    say("batches, MONAI CacheDataset / ours", memory / ours, 1, monai_ms=memory, **figures)
    say("batches, MONAI PersistentDataset without metadata / ours", plain_disk / ours, monai_ms=plain_disk, **figures)
    say("batches, MONAI CacheDataset without metadata / ours", plain / ours, monai_ms=plain, **figures)
    say("batches, peak memory later / first", later / first, 1.05, at_most=True, first_mb=first, later_mb=later)
    cached = loaders(paths, folder / "several", edge, WINDOWS, track_meta=True)[1]
    memory, ours = (
        each * spent for spent in cpu_s(repeats, cached, lambda: [b.voxels.shape for b in several.epoch(next(epochs))])
    )
    say("batches, MONAI CacheDataset / ours, three windows", memory / ours, monai_ms=memory, ours_ms=ours)
