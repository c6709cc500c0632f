"""What the CT path costs beside the tools that people use instead, in one run: one JSON line a ratio, `"met"` says whether it is held.

Times are CPU seconds of this process on one thread (threads of a peer count too), each the median of interleaved repeats with warm files.

read        every volume of a DICOM folder as int16 HU, found, sorted, checked; bare = pydicom's pixels times slope plus intercept
            in file order; monai = MONAI's PydicomReader on each series folder. The ratio is theirs / ours (higher is better).
ingest      the same with hashing, sidecars and writing / bare.
crop        a random 96^3 crop of a 320 x 431 x 431 volume through the store / a copied slice of an open numpy memory map.
batches     random 96^3 crops in batches of 4, wide window, random flips by a MONAI transform: ours from the store, MONAI's
            PersistentDataset (warm) and CacheDataset + ThreadDataLoader from its own caches of the same NIfTI volumes, spacing as it is;
            12 volumes, by then all kept open by the store, or cached. All give float32 in 0..1; ours_masked_ms makes the mask of
            valid voxels too, which the peers lack. Memory: anonymous bytes that a run over three times as many batches holds more
            at its peak.
tokens      forward and backward of a ViT-S on 96^3 with patch 8: all tokens / a quarter of them visible.

``--data`` names a folder of DICOM series in subfolders; without it (or the variable MMJEPA_DATA, below which ``chest_ct`` is taken) a
series of noise is written and read. ``--small`` takes tiny sizes: that says that the path works, nothing of its speed.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import torch
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from mmjepa.batch import VolumeView
from mmjepa.ct import ingest, series
from mmjepa.ct.batches import VolumeBatches
from mmjepa.ct.crop import random_centre
from mmjepa.ct.store import VolumeStore
from mmjepa.ct.volume import Settings
from mmjepa.encoders.vit3d import ViT3D, ViT3DConfig
from mmjepa.identity import Crosswalk

CROSSWALK = Crosswalk.none("a salt for benchmarks")
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"


def say(name: str, ratio: float, target: float, *, at_most: bool = False, **figures: float) -> None:
    """One JSON line."""
    met = ratio <= target if at_most else ratio >= target
    rounded = {key: float(f"{value:.4g}") for key, value in figures.items()}
    bound = {"at_most" if at_most else "at_least": target}
    print(json.dumps({"name": name, "ratio": float(f"{ratio:.3g}"), **bound, "met": bool(met), **rounded}), flush=True)


def cpu_s(repeats: int, *works: Callable[[], Any]) -> list[float]:
    """Median CPU seconds of each work, which take turns; each runs once before."""
    for work in works:
        work()
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, spent in zip(works, times, strict=True):
            start = time.process_time()
            work()
            spent.append(time.process_time() - start)
    return [statistics.median(spent) for spent in times]


def write_series(folder: Path, slices: int, edge: int) -> None:
    """A DICOM series of chest-like noise."""
    folder.mkdir(parents=True)
    rng, uid = np.random.default_rng(0), generate_uid()
    for k in range(slices):
        data = pydicom.Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = CT_IMAGE, generate_uid(), uid
        data.PatientID, data.Modality, data.InstanceNumber = "P", "CT", k + 1
        data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.PixelSpacing, data.ImageOrientationPatient = [0.7, 0.7], [1, 0, 0, 0, 1, 0]
        data.ImagePositionPatient, data.SliceThickness = [0, 0, 5.0 * k], 5
        data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = edge, edge, 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        data.PixelData = rng.integers(0, 2000, (edge, edge)).astype(np.uint16).tobytes()
        data.save_as(folder / f"{k}.dcm", enforce_file_format=True)


def bare_hu(folders: list[Path]) -> list[np.ndarray]:
    """pydicom, a loop, and nothing else."""
    volumes = []
    for folder in folders:
        slices = []
        for path in sorted(folder.glob("*.dcm")):
            data = pydicom.dcmread(path)
            slices.append((data.pixel_array * float(data.RescaleSlope) + float(data.RescaleIntercept)).astype(np.int16))
        volumes.append(np.stack(slices))
    return volumes


def monai_hu(folders: list[Path]) -> list[np.ndarray]:
    """MONAI's PydicomReader, a series at a time."""
    from monai.data import PydicomReader

    return [(reader := PydicomReader()).get_data(reader.read(str(folder)))[0] for folder in folders]


def our_hu(source: Path) -> list[np.ndarray]:
    """What ingest reads, before it writes."""
    settings = Settings()
    return [
        series.read_volume(found, settings).hu for found in ingest.scan(source, CROSSWALK, settings)[0] if found.parts
    ]


def reading(source: Path, scratch: Path, repeats: int) -> None:
    """Reading and the whole ingest."""
    folders = sorted({path.parent for path in source.rglob("*.dcm")})
    turn = iter(range(1000))

    def whole() -> None:
        ingest.ingest_images(source, scratch / f"cohort{next(turn)}", crosswalk=CROSSWALK)

    bare, monai, ours, all_of_it = cpu_s(
        repeats, lambda: bare_hu(folders), lambda: monai_hu(folders), lambda: our_hu(source), whole
    )
    say("read, bare pydicom / ours", bare / ours, 0.8, bare_s=bare, ours_s=ours)
    say("read, MONAI PydicomReader / ours", monai / ours, 2, monai_s=monai, ours_s=ours)
    say("ingest, bare pydicom / ours", bare / all_of_it, 0.4, bare_s=bare, ours_s=all_of_it)


def make_store(folder: Path, count: int, shape: tuple[int, int, int]) -> list[Path]:
    """NIfTI volumes of smooth noise, ingested to ``folder/cohort``; their paths."""
    (folder / "source").mkdir(parents=True)
    paths, lines = [], ["file,patient_id,time"]
    for n in range(count):
        rng = np.random.default_rng(n)
        hu = (rng.integers(-1000, 400, shape) // 16 * 16).astype(np.int16)
        paths.append(folder / "source" / f"{n}.nii")
        nib.save(nib.Nifti1Image(hu, np.diag([1.5, 1.5, 1.5, 1])), paths[-1])
        lines.append(f"{n}.nii,P{n},")
    (folder / "source" / "images.csv").write_text("\n".join(lines) + "\n")
    ingest.ingest_images(folder / "source", folder / "cohort", crosswalk=CROSSWALK)
    return paths


def cropping(folder: Path, shape: tuple[int, int, int], edge: int, repeats: int) -> None:
    """Random crops of one volume."""
    make_store(folder, 1, shape)
    store, size = VolumeStore(folder / "cohort"), (edge, edge, edge)
    image = store.index["image_id"][0]
    opened = np.load(folder / "cohort" / "ct" / "volumes" / f"{image}.npy", mmap_mode="r")
    centres = [random_centre(shape, size, np.random.default_rng(n)) for n in range(100)]
    starts = [[int(place - (edge - 1) / 2) for place in centre] for centre in centres]
    bare, ours = cpu_s(
        repeats,
        lambda: [opened[a : a + edge, b : b + edge, c : c + edge].copy() for a, b, c in starts],
        lambda: [store.crop(image, size, centre) for centre in centres],
    )
    say("crop, ours / bare memory map", ours / bare, 1.5, at_most=True, bare_ms=10 * bare, ours_ms=10 * ours)


def anonymous_mb() -> float:
    """Memory of this process that no file backs, where the system tells it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), float("nan"))


def peers(paths: list[Path], cache: Path, edge: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """An epoch of MONAI's PersistentDataset, and of its CacheDataset with ThreadDataLoader."""
    from monai.data import CacheDataset, DataLoader, PersistentDataset, ThreadDataLoader
    from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Orientation, RandFlip, RandSpatialCrop
    from monai.transforms import ScaleIntensityRange as Scale

    steps = [
        LoadImage(image_only=True),
        EnsureChannelFirst(),
        Orientation("RAS"),
        Scale(-1000, 1000, 0, 1, clip=True),
        RandSpatialCrop((edge, edge, edge), random_size=False),
        RandFlip(prob=0.5, spatial_axis=0),
    ]
    files = [str(path) for path in paths]
    persistent = DataLoader(PersistentDataset(files, Compose(steps), cache_dir=cache), batch_size=4, num_workers=0)
    cached = CacheDataset(files, Compose(steps), copy_cache=False, progress=False)
    threaded = ThreadDataLoader(cached, batch_size=4, num_workers=0, shuffle=True)
    return lambda: [batch.shape for batch in persistent], lambda: [batch.shape for batch in threaded]


def batching(folder: Path, shape: tuple[int, int, int], edge: int, repeats: int) -> None:
    """Files to normalised batches."""
    from monai.transforms import RandFlip

    paths, flip = make_store(folder, 12, shape), RandFlip(prob=0.5, spatial_axis=0)
    store, epochs = VolumeStore(folder / "cohort"), iter(range(10**6))
    images = list(store.index["image_id"])
    made = VolumeBatches(store, images, size=(edge, edge, edge), batch=4, seed=0, transform=flip)

    def peak_mb(count: int) -> float:
        return max(anonymous_mb() for _ in range(count) for batch in made.epoch(next(epochs)) if len(batch.images))

    peak_mb(2)
    first, later = peak_mb(5), peak_mb(15)
    persistent, threaded = peers(paths, folder / "cache", edge)
    disk, memory, ours, masked = cpu_s(
        repeats,
        persistent,
        threaded,
        lambda: [batch.voxels.shape for batch in made.epoch(next(epochs))],
        lambda: [batch.valid.shape for batch in made.epoch(next(epochs))],
    )
    each = 1000 / len(images)
    ours_ms = {"ours_ms": ours * each, "ours_masked_ms": masked * each}
    say("batches, MONAI PersistentDataset / ours", disk / ours, 10, monai_ms=disk * each, **ours_ms)
    say("batches, MONAI CacheDataset / ours", memory / ours, 1, monai_ms=memory * each, **ours_ms)
    say("batches, peak memory later / first", later / first, 1.05, at_most=True, first_mb=first, later_mb=later)


def encoding(edge: int, config: ViT3DConfig, repeats: int) -> None:
    """A step of the encoder with a quarter of the tokens."""
    torch.manual_seed(0)
    encoder, voxels = ViT3D(config), torch.rand(1, 1, edge, edge, edge)
    tokens = (edge // config.patch) ** 3
    keep = torch.randperm(tokens)[None, : tokens // 4].sort().values

    def step(kept: torch.Tensor | None) -> None:
        encoder.zero_grad()
        encoder(VolumeView("ct", voxels, keep=kept)).square().mean().backward()

    whole, part = cpu_s(repeats, lambda: step(None), lambda: step(keep))
    say("tokens, all / a quarter visible", whole / part, 4, all_s=whole, quarter_s=part)


def source_of(data: Path | None, scratch: Path, small: bool) -> Path:
    """The folder that is read."""
    if data is None and "MMJEPA_DATA" in os.environ:
        data = Path(os.environ["MMJEPA_DATA"]) / "chest_ct"
    if data is not None:
        print("reading the DICOM folder that was named", file=sys.stderr)
        return data
    print("reading a generated DICOM series", file=sys.stderr)
    write_series(scratch / "dicom" / "a", *((5, 16) if small else (60, 512)))
    return scratch / "dicom"


def main() -> None:
    """All ratios, in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of DICOM series in subfolders")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    small = arguments.small
    repeats, edge = (1, 8) if small else (5, 96)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        reading(source_of(arguments.data, scratch, small), scratch, repeats)
        cropping(scratch / "crop", (12, 11, 10) if small else (320, 431, 431), edge, repeats)
        batching(scratch / "batches", (12, 11, 10) if small else (240, 240, 200), edge, repeats)
    vit_s = ViT3DConfig(patch=8, width=384, depth=12, heads=6, ffn=1536, latent=384)
    tiny = ViT3DConfig(patch=8, width=12, depth=1, heads=2, ffn=8, latent=8)
    encoding(16 if small else 96, tiny if small else vit_s, min(repeats, 3))


if __name__ == "__main__":
    main()
