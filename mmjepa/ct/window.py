"""Windows: a range of HU to [0, 1], at batch time, so that one store serves them all."""

from collections.abc import Sequence

import numpy as np

from mmjepa.refusal import Refusal

WINDOWS_HU = {"wide": (-1000.0, 1000.0), "lung": (-1350.0, 150.0), "dsb": (-1200.0, 600.0)}


def windowed(hu: np.ndarray, names: Sequence[str] = ("wide",)) -> np.ndarray:
    """int16 HU [X, Y, Z] -> float32 [C, X, Y, Z] in [0, 1], one channel a window. Raises Refusal WINDOW_UNKNOWN."""
    unknown = [name for name in names if name not in WINDOWS_HU]
    if unknown or not names:
        raise Refusal("WINDOW_UNKNOWN", f"no window {unknown or 'is named'}", f"Known: {', '.join(WINDOWS_HU)}")
    channels = np.empty((len(names), *hu.shape), dtype=np.float32)
    for channel, name in zip(channels, names, strict=True):
        low, high = WINDOWS_HU[name]
        np.subtract(hu, np.float32(low), out=channel)
        channel /= high - low
        np.clip(channel, 0, 1, out=channel)
    return channels
