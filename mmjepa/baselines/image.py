"""Image features without learning: a coarse picture of the middle of the volume and how its HU are spread."""

import numpy as np
import pandas as pd

from mmjepa.cohort import Cohort
from mmjepa.ct.resample import crop_mm
from mmjepa.ct.store import VolumeStore
from mmjepa.progress import track

EDGE = 32  # voxels of 1 mm: the cube of 32 mm around the middle of the volume
BLOCKS = 8  # per edge
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
BINS_HU = (-950, -850, -700, -300, 0, 150)


def image_features(cohort: Cohort, rows: pd.DataFrame) -> np.ndarray:
    """float32 [n, 528]: 8 x 8 x 8 block means (HU), then mean, sd and quantiles (HU) and shares of HU ranges."""
    store = VolumeStore(cohort.path)
    images = track(rows["image_id"], "image features", total=len(rows))
    return np.stack([_describe(crop_mm(store, image, (EDGE,) * 3, (1.0, 1.0, 1.0))) for image in images])


def _describe(hu: np.ndarray) -> np.ndarray:
    values = hu.astype(np.float32)
    size = EDGE // BLOCKS
    pooled = values.reshape(BLOCKS, size, BLOCKS, size, BLOCKS, size).mean(axis=(1, 3, 5))
    shares = np.bincount(np.digitize(values.ravel(), BINS_HU), minlength=len(BINS_HU) + 1) / values.size
    spread = [values.mean(), values.std(), *np.quantile(values, QUANTILES)]
    return np.concatenate([pooled.ravel(), spread, shares]).astype(np.float32)
