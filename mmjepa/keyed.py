"""Keyed randomness: (seed, stream, *key) decides every draw, never the order in which draws are asked for."""

import hashlib

import numpy as np


def key_words(*key: int | str) -> list[int]:
    """Four 32-bit words that depend on every part of the key."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()
    return [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]


def generator(seed: int, stream: str, *key: int | str) -> np.random.Generator:
    """A numpy generator of its own for (seed, stream, *key): the same whatever the batch, worker or rank."""
    return np.random.Generator(np.random.Philox(key=key_words(seed, stream, *key)[:2]))


def torch_seed(seed: int, stream: str, *key: int | str) -> int:
    """A 63-bit seed for ``torch.Generator`` under the same rule."""
    words = key_words(seed, stream, *key)
    return (words[0] | words[1] << 32) & (2**63 - 1)
