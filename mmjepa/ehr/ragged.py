"""Arithmetic over ragged rows, all at once: their ranges, a padded table of them, keyed draws for each of their entries."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor


class Grid:
    """Lays ragged rows, each a front part and a main part, into a padded table [B, L]."""

    def __init__(self, front: np.ndarray, main: np.ndarray, pad: Literal["right", "left"]) -> None:
        total = front + main
        longest = int(total.max(initial=0))
        pads = longest - total if pad == "left" else np.zeros_like(total)
        begin = np.arange(len(total)) * longest + pads
        column = np.arange(longest, dtype=np.int32)
        self.present = column < total[:, None] if pad == "right" else column >= pads[:, None]
        self.in_front = self.present & (column < (pads + front)[:, None])
        self._full = bool((main == longest).all())
        self._main = ranges(begin + front, begin + total)
        self._front = ranges(begin, begin + front)

    def lay(self, main: np.ndarray, front: np.ndarray | float, empty: float) -> Tensor:
        """The table of some column; ``empty`` where there is nothing."""
        if self._full:
            return torch.from_numpy(main.reshape(self.present.shape))
        table = np.full(self.present.size, empty, main.dtype)
        table[self._main] = main
        table[self._front] = front
        return torch.from_numpy(table.reshape(self.present.shape))


def ranges(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """The whole numbers of some half-open ranges, behind one another."""
    length = stop - start
    ends = np.cumsum(length)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(start - ends + length, length)


def hash64(key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """uint64: the SplitMix64 finaliser (Steele, Lea and Flood, OOPSLA 2014) of key + golden ratio * (value + 1)."""
    x = key + (value.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def hash32(key: np.ndarray, rows: np.ndarray, begin: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """uint32: the finaliser of MurmurHash3 (Appleby) of each event's key and its number in the record, rows - begin."""
    step = np.uint32(0x9E3779B9)
    x = rows.astype(np.uint32) * step
    x += np.repeat(key.astype(np.uint32) - begin.astype(np.uint32) * step, taken)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return x
