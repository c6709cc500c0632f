"""Windows: a range of HU to [0, 1], at batch time, so that one store serves them all."""

from collections.abc import Sequence

import numpy as np

from mmjepa.refusal import Refusal

WINDOWS_HU = {"wide": (-1000, 1000), "lung": (-1350, 150), "dsb": (-1200, 600)}


def windowed(
    hu: np.ndarray, names: Sequence[str] = ("wide",), out: np.ndarray | None = None, spare: np.ndarray | None = None
) -> np.ndarray:
    """int16 HU [X, Y, Z] -> float32 [C, X, Y, Z] in [0, 1], one channel a window, written to ``out`` when given.

    spare: int16 [X, Y, Z] that is overwritten; without it as much is allocated. Raises Refusal WINDOW_UNKNOWN.
    """
    unknown = [name for name in names if name not in WINDOWS_HU]
    if unknown or not names:
        raise Refusal("WINDOW_UNKNOWN", f"no window {unknown or 'is named'}", f"Known: {', '.join(WINDOWS_HU)}")
    channels = np.empty((len(names), *hu.shape), dtype=np.float32) if out is None else out
    part = np.empty(hu.shape, dtype=np.int16) if spare is None else spare  # int16 for longest: half the bytes
    for channel, name in zip(channels, names, strict=True):
        low, high = WINDOWS_HU[name]
        np.clip(hu, low, high, out=part)
        part -= low  # no window is too wide for int16
        np.divide(part, np.float32(high - low), out=channel)
    return channels
