"""Closed-form arms: what image-only, record-only, fused and cross-modal learners make of the measurements.

Every arm is linear, so that a trained arm is a vector of weights over (image, record) measurements, and trains in
milliseconds. JEPA in closed form is CCA: whitened linear encoders, one predicting the other's latent.

Subjects, by index (all sites share the numbering, so a range is one group of people under every site's knobs):
pretraining 0 .. n_unlabelled - 1; labelled ``LABELLED`` + 0 .. n - 1; test ``TEST`` + 0 .. n - 1. The ranges are a million
apart and never meet.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from synthetic.draws import Array, by_row, generator, uniforms
from synthetic.presets import Preset, Site
from synthetic.ranking import auc
from synthetic.world import MODALITIES, Subjects, World

LABELLED, TEST = 1_000_000, 2_000_000
ARMS = ("image", "ehr", "fusion_weak", "fusion_tuned", "jepa", "pca")
ARM_VIEW = {arm: arm if arm in MODALITIES else "both" for arm in ARMS}  # what an arm may see
WEAK, GRID, FOLDS = 0.05, (0.01, 0.1, 1.0, 10.0), 4
PCA_RANK = 8
_SHRINKAGE = 0.01  # added to the covariances before whitening


def ridge(x: Array, y: Array, penalties: Sequence[float], weight: Array | None = None) -> tuple[Array, Array]:
    """Ridge on standardised features, (Z'Z + penalty n I)^-1 Z'(y - mean y), for several penalties at once.

    x [n, d], y [n], weight [n] of the subjects with mean 1 (None: all alike). Returns coefficients on the raw features
    [penalties, d] and intercepts [penalties]. A feature that never varies gets 0.
    """
    n = len(x)
    share = np.full(n, 1 / n) if weight is None else weight / n
    mean, target = share @ x, share @ y
    centred = x - mean
    sd = np.sqrt(share @ centred**2)
    sd[sd <= 1e-10 * np.abs(mean)] = np.inf  # never varies; a constant's mean is rounded, and its sd not quite 0
    z = centred / sd
    weighted = z * (n * share)[:, None]
    gram = weighted.T @ z
    systems = gram + n * np.array(penalties)[:, None, None] * np.eye(x.shape[1])
    coefficients = np.linalg.solve(systems, (weighted.T @ (y - target))[:, None])[:, :, 0] / sd
    return coefficients, target - coefficients @ mean


def tuned(x: Array, y: Array, weight: Array | None = None) -> Array:
    """Ridge whose penalty wins on the pooled AUC of 4 folds (row index mod 4), fitted on all; coefficients [d]."""
    fold = np.arange(len(x)) % FOLDS
    held_out = np.empty((len(GRID), len(x)))
    for k in range(FOLDS):
        inside = fold != k
        coefficients, intercepts = ridge(x[inside], y[inside], GRID, None if weight is None else weight[inside])
        held_out[:, ~inside] = coefficients @ x[~inside].T + intercepts[:, None]
    best = int(np.argmax([auc(y, scores) for scores in held_out]))
    return ridge(x, y, GRID[best : best + 1], weight)[0][0]


@dataclass(frozen=True)
class Codes:
    """What pretraining leaves: {arm: [width, d_image + d_ehr]} encoders, and the canonical correlations [min d], falling."""

    encoders: dict[str, Array]
    canonical: Array


def pairs(site: Site, seed: int, seen: Array) -> tuple[Array, Array]:
    """Rows (images, records) of the pretraining pairs among subjects 0 .. n - 1; seen [n] bool: has a record.

    Unpaired subjects are dropped; the mispaired exchange images in a ring among themselves.
    """
    n = len(seen)
    image = np.arange(n)
    if site.mispair:
        hit = np.flatnonzero(uniforms(seed, "mispair", 0, n, 1)[:, 0] < site.mispair)
        ring = generator(seed, "mispair/ring").permutation(hit)
        image[ring] = np.roll(ring, 1)
    kept = seen.copy()
    if site.unpaired:
        kept &= uniforms(seed, "unpaired", 0, n, 1)[:, 0] >= site.unpaired
    return image[kept], np.flatnonzero(kept)


def cca(image: Array, ehr: Array, rank: int) -> tuple[Array, Array]:
    """Encoder [2 rank, d_image + d_ehr] of paired measurements [n, d] and the canonical correlations [min d].

    Covariances + .01 I, whitened; the top singular pairs of the whitened cross-covariance; both modalities' codes.
    """
    centred = [x - x.mean(0) for x in (image, ehr)]
    whiteners = []
    for x in centred:
        values, vectors = np.linalg.eigh(x.T @ x / len(x) + _SHRINKAGE * np.eye(x.shape[1]))
        whiteners.append((vectors / np.sqrt(values)) @ vectors.T)
    left, r, right = np.linalg.svd(whiteners[0] @ (centred[0].T @ centred[1] / len(image)) @ whiteners[1], False)
    return _block_diagonal(left[:, :rank].T @ whiteners[0], right[:rank] @ whiteners[1]), r


def pca(image: Array, ehr: Array, rank: int) -> Array:
    """Encoder [2 rank, d_image + d_ehr]: the leading principal components of either modality [n, d]."""
    parts = []
    for x in (image, ehr):
        centred = x - x.mean(0)
        parts.append(np.linalg.eigh(centred.T @ centred)[1][:, : -rank - 1 : -1].T)
    return _block_diagonal(*parts)


def _block_diagonal(image: Array, ehr: Array) -> Array:
    encoder = np.zeros((len(image) + len(ehr), image.shape[1] + ehr.shape[1]))
    encoder[: len(image), : image.shape[1]] = image
    encoder[len(image) :, image.shape[1] :] = ehr
    return encoder


def pretrain(world: World, site: Site) -> Codes:
    """The encoders that learn without labels, from the preset's n_unlabelled subjects of a site."""
    subjects = world.sample(site, 0, world.preset.n_unlabelled)
    rows, records = pairs(site, world.seed, subjects.seen_ehr)
    theta = subjects.theta
    jepa, r = cca(theta["image"][rows], theta["ehr"][records], world.preset.rank)
    return Codes({"jepa": jepa, "pca": pca(theta["image"], theta["ehr"][subjects.seen_ehr], PCA_RANK)}, r)


def fit(preset: Preset, codes: Codes, theta: Array, label: Array) -> dict[str, Array]:
    """Every arm's weights, {arm: [d_image + d_ehr]}, from labelled measurements theta [n, d_image + d_ehr], label [n] bool.

    A score is theta @ weights but for a constant.
    """
    d = preset.d_image
    weights = {arm: np.zeros(theta.shape[1]) for arm in ("image", "ehr")}
    weights["image"][:d] = tuned(theta[:, :d], label)
    weights["ehr"][d:] = tuned(theta[:, d:], label)
    weights["fusion_weak"] = ridge(theta, label, [WEAK])[0][0]
    weights["fusion_tuned"] = tuned(theta, label)
    for arm, encoder in codes.encoders.items():
        weights[arm] = tuned(by_row(encoder, theta), label) @ encoder
    return weights


def train(world: World, site: Site, sizes: Sequence[int]) -> dict[int, dict[str, Array]]:
    """Pretrain and fit at a site: {number of labels: {arm: weights}}; the first n labelled subjects are always the same."""
    codes, labelled = pretrain(world, site), world.sample(site, LABELLED, max(sizes))
    theta, label = labelled.theta_of(MODALITIES), labelled.label
    return {n: fit(world.preset, codes, theta[:n], label[:n]) for n in sizes}


def scores(subjects: Subjects, weights: dict[str, Array]) -> dict[str, Array]:
    """Every arm's score of subjects, {arm: [n]}, from ``weights`` {arm: [d_image + d_ehr]}."""
    columns = by_row(np.stack(list(weights.values())), subjects.theta_of(MODALITIES)).T
    return dict(zip(weights, columns, strict=True))


def statistic(world: World) -> Array:
    """G' of both modalities, [q, d_image + d_ehr]: what is sufficient for (z, c) at sites without code shift."""
    loadings = [np.concatenate([world.A[m], world.B[m]], axis=1) for m in MODALITIES]
    image, ehr = (G[:, np.abs(G).sum(0) > 0].T for G in loadings)
    return _block_diagonal(image, ehr)


def ceiling(world: World, site: Site, sizes: Sequence[int]) -> dict[int, Array]:
    """The n-label ceiling's weights, {n: [d_image + d_ehr]}: tuned ridge that is handed the sufficient statistic."""
    labelled = world.sample(site, LABELLED, max(sizes))
    G, theta = statistic(world), labelled.theta_of(MODALITIES)
    x = by_row(G, theta)
    return {n: tuned(x[:n], labelled.label[:n]) @ G for n in sizes}


def block_r2(world: World, subjects: Subjects, encoder: Array) -> dict[str, float]:
    """Share of each block's variance that the code explains linearly in ``subjects``: {block or "c": R^2}."""
    code = by_row(encoder, subjects.theta_of(MODALITIES))
    design = np.column_stack([np.ones(len(code)), code])
    blocks = {name: subjects.z[:, part] for name, part in world.block.items()} | {"c": subjects.c}
    found = {}
    for name, values in blocks.items():
        residual = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
        found[name] = float(1 - residual.var(0).sum() / values.var(0).sum())
    return found
