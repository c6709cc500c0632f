"""Sparse concepts: 64 rare facts of a subject, each seen in the record, in the image, or in both.

They are driven by the readouts t, never by the latents, which would bypass the measurement noise that the oracles know of.
"""

import numpy as np
from scipy.special import expit, logit

from synthetic.draws import Array, by_row, generator, normals, uniforms

N = 64
EHR_ONLY, IMAGE_ONLY, SHARED = np.arange(0, 40), np.arange(40, 52), np.arange(52, 64)
IN_EHR, IN_IMAGE = np.r_[EHR_ONLY, SHARED], np.r_[IMAGE_ONLY, SHARED]
RATE = 0.10 * np.arange(1, N + 1) ** -0.720
_STRENGTH, _CHANNELS = 0.8, 32


def loadings(seed: int, modality: str, width: int) -> Array:
    """g, [64, width]: half of a modality's own concepts follow one coordinate of its readout; no shared one does."""
    draw = generator(seed, f"world/concepts/{modality}")
    own = EHR_ONLY if modality == "ehr" else IMAGE_ONLY
    g = np.zeros((N, width))
    chosen = draw.permutation(own)[: len(own) // 2]
    g[chosen, draw.integers(0, width, len(chosen))] = _STRENGTH * draw.choice([-1, 1], len(chosen))
    return g


def draw(t: dict[str, Array], seed: int, first: int) -> Array:
    """Concepts of subjects first .. first + n - 1, [n, 64] bool; t {modality: [n, q]} their readouts."""
    n = len(t["ehr"])
    odds = np.broadcast_to(logit(RATE), (n, N)).copy()
    for modality, own in t.items():
        for j, k in np.argwhere(g := loadings(seed, modality, own.shape[1])):
            odds[:, j] += g[j, k] * own[:, k]
    return uniforms(seed, "concepts", first, n, N) < expit(odds)


def channels(k: Array, seed: int, first: int) -> Array:
    """The concepts as 32 feature channels, [n, 32]: sum_j k_j m_j d_j + .05 eps, m = 1 + .3 |N|, d_j random unit vectors."""
    directions = generator(seed, "world/concepts/directions").standard_normal((N, _CHANNELS))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    magnitude = 1 + 0.3 * np.abs(normals(seed, "concepts/magnitude", first, len(k), N))
    return by_row(directions.T, k * magnitude) + 0.05 * normals(seed, "concepts/noise", first, len(k), _CHANNELS)
