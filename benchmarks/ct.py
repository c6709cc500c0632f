"""What the CT path costs beside the tools that people use instead, in one run: one JSON line a ratio, `"met"` says whether a goal is held.

Times are CPU seconds of this process on one thread (threads of a peer count too), each the median of interleaved repeats with warm files.

read        every volume of a DICOM folder as int16 HU, found, sorted, checked; bare = pydicom's pixels times slope plus intercept
            (float32) in file order; monai = MONAI's PydicomReader on each series folder. The ratio is theirs / ours (higher is better).
ingest      the same with hashing, sidecars and writing / bare.
crop        a random 96^3 crop of a 320 x 431 x 431 volume through the store / a copied slice of an open numpy memory map; the same from
            a store of blosc2 files (noise of 88 values, chunks of 64^3) / of npy files.
batches     random 96^3 crops in batches of 4, wide window, half of them flipped along the first axis by MONAI's RandFlip on both sides:
            ours from the store, MONAI's PersistentDataset (warm) and CacheDataset + ThreadDataLoader from its own caches of the same NIfTI
            volumes, spacing as it is; 12 volumes, by then all kept open by the store, or cached. All give float32 in 0..1;
            ours_masked_ms makes the mask of valid voxels too, which the peers lack. "Without metadata" is MONAI after
            set_track_meta(False); "three windows" gives three channels, which the peer keeps in its cache ready made. Memory:
            the most anonymous bytes, looked at every millisecond, while three times as many batches are made.
tokens      forward and backward of a ViT-S on 96^3 with patch 8: all tokens / a quarter of them visible.

``--data`` names a folder of DICOM series in subfolders; without it (or the variable MMJEPA_DATA, below which ``chest_ct`` is taken) a
series of noise is written and read. ``--small`` takes tiny sizes: that says that the path works, nothing of its speed.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from ct_parts.batching import batching, cropping
from ct_parts.common import cpu_s, say
from ct_parts.reading import reading, source_of

from mmjepa.batch import VolumeView
from mmjepa.encoders.vit3d import ViT3D, ViT3DConfig


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
