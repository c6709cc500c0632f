"""Keyed randomness: (seed, stream, subject index) decides every draw, never the batch, the workers or the order.

Sites share streams, so that two sites differ by their knobs alone (common random numbers).
"""

import hashlib

import numpy as np
from scipy.special import ndtri

Array = np.ndarray


def _key(seed: int, stream: str) -> Array:
    word = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little")
    return np.array([seed, word], dtype=np.uint64)


def uniforms(seed: int, stream: str, first: int, count: int, width: int) -> Array:
    """[count, width] float64 in (0, 1) for subjects first .. first + count - 1.

    Philox4x64 with key (seed, stream); subject i owns the counter blocks i * W/4 onwards, W = width rounded up to 4.
    """
    words = -(-width // 4) * 4
    bits = np.random.Philox(key=_key(seed, stream), counter=np.array([first * (words // 4), 0, 0, 0], dtype=np.uint64))
    raw = bits.random_raw(count * words).reshape(count, words)[:, :width]
    return ((raw >> np.uint64(11)) + 0.5) * 2.0**-53


def normals(seed: int, stream: str, first: int, count: int, width: int) -> Array:
    """[count, width] standard normals by inverse CDF of ``uniforms``."""
    return ndtri(uniforms(seed, stream, first, count, width))


def generator(seed: int, stream: str, subject: int = 0) -> np.random.Generator:
    """A generator of its own for (seed, stream, subject), for draws whose number varies."""
    counter = np.array([0, 0, 0, subject + 1], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=_key(seed, stream), counter=counter))


def by_row(matrix: Array, rows: Array) -> Array:
    """``rows @ matrix.T`` with one matrix-vector product a row.

    A matrix-matrix product may round a row differently when the number of rows changes, and so may any product where their
    layout in memory does; this one may not.
    """
    return np.matmul(matrix, np.ascontiguousarray(rows)[:, :, None])[:, :, 0]
