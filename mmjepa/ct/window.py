"""Windows: a range of HU to [0, 1], at batch time, so that one store serves them all.

=========  ==============  ==========================================================================================
name       HU              what for
=========  ==============  ==========================================================================================
``wide``   -1000 .. 1000   air to bone, the default
``lung``   -1350 .. 150    level -600, width 1500, in which radiologists read lungs
``dsb``    -1200 .. 600    of the Data Science Bowl 2017 (Liao et al., arXiv 1711.08324) and of nodule models since
``soft``   -160 .. 240     level 40, width 400: mediastinum and other soft tissue
``bone``   -500 .. 1300    level 400, width 1800, as Radiopaedia's article "Windowing (CT)" gives for bone
=========  ==============  ==========================================================================================

Any other is a pair of whole HU, ``(low, high)``.
"""

from collections.abc import Sequence
from numbers import Real
from typing import cast

import numpy as np

from mmjepa.refusal import Refusal

WINDOWS_HU = {
    "wide": (-1000, 1000),
    "lung": (-1350, 150),
    "dsb": (-1200, 600),
    "soft": (-160, 240),
    "bone": (-500, 1300),
}
_INT16 = np.iinfo(np.int16)

Range = tuple[int, int]
Window = str | tuple[float, float]


def ranges_hu(windows: Window | Sequence[Window]) -> tuple[Range, ...]:
    """The (low, high) HU of one window or of several. Raises Refusal WINDOW_UNKNOWN, WINDOW_RANGE."""
    if isinstance(windows, str) or (len(windows) == 2 and all(isinstance(end, Real) for end in windows)):
        windows = (cast(Window, windows),)
    if not windows:
        raise Refusal("WINDOW_UNKNOWN", "no window is named", f"Known: {', '.join(WINDOWS_HU)}")
    return tuple(_range(window) for window in cast(Sequence[Window], windows))


def _range(window: Window) -> Range:
    if isinstance(window, str):
        if window not in WINDOWS_HU:
            known = f"Known: {', '.join(WINDOWS_HU)}; or a pair (low, high) of HU"
            raise Refusal("WINDOW_UNKNOWN", f"no window {window!r}", known)
        return WINDOWS_HU[window]
    try:
        low, high = (int(end) for end in window)
        if (low, high) != tuple(window) or not (_INT16.min <= low < high <= _INT16.max and high - low <= _INT16.max):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise Refusal("WINDOW_RANGE", f"{window!r} is no window", "Want a name, or whole HU (low, high)") from None
    return low, high


def windowed(
    hu: np.ndarray,
    windows: Window | Sequence[Window] = "wide",
    out: np.ndarray | None = None,
    spare: np.ndarray | None = None,
) -> np.ndarray:
    """int16 HU [X, Y, Z] -> float32 [C, X, Y, Z] in [0, 1], one channel a window, written to ``out`` when given.

    spare: int16 [X, Y, Z] that is overwritten; without it as much is allocated. Raises Refusal WINDOW_UNKNOWN, WINDOW_RANGE.
    """
    ranges = ranges_hu(windows)
    channels = np.empty((len(ranges), *hu.shape), dtype=np.float32) if out is None else out
    part = np.empty(hu.shape, dtype=np.int16) if spare is None else spare  # int16 for longest: half the bytes
    for channel, (low, high) in zip(channels, ranges, strict=True):
        np.clip(hu, low, high, out=part)
        part -= low  # no window is too wide for int16
        np.divide(part, np.float32(high - low), out=channel)
    return channels
