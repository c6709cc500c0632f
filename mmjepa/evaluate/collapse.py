"""The collapse panel: several plain measures of an embedding, because no single one tells health from collapse."""

from typing import Any

import numpy as np
from scipy.linalg import eigh

from mmjepa.keyed import generator
from mmjepa.refusal import Refusal


def collapse_panel(
    z: np.ndarray, classes: np.ndarray | None = None, *, initial_std_q05: float | None = None, seed: int = 0
) -> dict[str, Any]:
    """Measure z [n, D] (before any normalisation), at best on 2,048 rows or more.

    classes [n]: rows that should be alike share a class (the subject); rows of a class with one row are not used for it.
    initial_std_q05: the 5 % quantile of the standard deviations before training.

    Returns plain numbers: ``std_mean`` and ``std_q05`` over features, ``mean_cosine`` over pairs, ``rankme``
    (arXiv 2210.02885), ``effective_rank`` (exp entropy of covariance eigenvalues), ``lidar`` (arXiv 2312.04000) with
    ``lidar_mean_eigenvalue`` and the same for shuffled classes; ``warnings`` among ``STD_FELL``, ``LOW_RANK``,
    ``NO_CLASS_SIGNAL``, and ``not_checked`` for those without the data they need. The three together separate health
    from dead features, low rank, total collapse (also behind a BatchNorm) and pure noise; none does alone.
    """
    z = np.asarray(z, np.float64)
    if z.ndim != 2 or len(z) < 2 or not np.isfinite(z).all():
        raise Refusal("COLLAPSE_INPUT", f"the panel needs two or more finite rows [n, D], got {list(z.shape)}")
    std = z.std(axis=0, ddof=1)
    panel: dict[str, Any] = {
        "rows": len(z),
        "width": z.shape[1],
        "std_mean": float(std.mean()),
        "std_q05": float(np.quantile(std, 0.05)),
        "mean_cosine": mean_cosine(z),
        "rankme": rankme(z),
        "effective_rank": effective_rank(z),
        "lidar": None,
        "lidar_mean_eigenvalue": None,
        "lidar_shuffled_eigenvalue": None,
    }
    warnings, not_checked = [], []
    if initial_std_q05 is None:
        not_checked.append("STD_FELL")
    elif panel["std_q05"] < 0.1 * initial_std_q05:
        warnings.append("STD_FELL")
    if panel["effective_rank"] < 0.05 * z.shape[1]:
        warnings.append("LOW_RANK")
    rows, dense = _repeated(classes, len(z))
    if len(rows) and dense.max() > 0:
        panel["lidar"], panel["lidar_mean_eigenvalue"] = lidar(z[rows], dense)
        shuffled = generator(seed, "collapse").permutation(dense)
        panel["lidar_shuffled_eigenvalue"] = lidar(z[rows], shuffled)[1]
        if panel["lidar_mean_eigenvalue"] < 2 * panel["lidar_shuffled_eigenvalue"]:
            warnings.append("NO_CLASS_SIGNAL")
    else:
        not_checked.append("NO_CLASS_SIGNAL")
    return {**panel, "initial_std_q05": initial_std_q05, "warnings": warnings, "not_checked": not_checked}


def mean_cosine(z: np.ndarray) -> float:
    """Mean cosine over all pairs of rows of z [n, D], not centred."""
    unit = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    n, norms = len(z), np.square(unit).sum()
    return float((np.square(unit.sum(axis=0)).sum() - norms) / (n * (n - 1)))


def rankme(z: np.ndarray) -> float:
    """RankMe of z [n, D]: exp entropy of singular values / sum + 1e-5, not centred (arXiv 2210.02885, eq. 1-2)."""
    values = np.linalg.svd(z, compute_uv=False)
    p = values / max(values.sum(), 1e-300) + 1e-5
    return float(np.exp(-(p * np.log(p)).sum()))


def effective_rank(z: np.ndarray) -> float:
    """exp entropy of the normalised covariance eigenvalues of z [n, D]; 1 when all rows are equal."""
    return _exp_entropy(np.linalg.svd(z - z.mean(axis=0), compute_uv=False) ** 2)


def lidar(z: np.ndarray, classes: np.ndarray) -> tuple[float, float]:
    """LiDAR and mean eigenvalue of Sw^-1/2 Sb Sw^-1/2 for z [n, D] and classes [n] = 0..K-1 (arXiv 2312.04000).

    Sw is the within-class covariance with n - K degrees of freedom + 1e-4 I, Sb the covariance of the K class means.
    """
    sizes = np.bincount(classes)
    means = np.zeros((len(sizes), z.shape[1]))
    np.add.at(means, classes, z)
    means /= sizes[:, None]
    within = z - means[classes]
    centred = means - means.mean(axis=0)
    s_within = within.T @ within / (len(z) - len(sizes)) + 1e-4 * np.eye(z.shape[1])
    values = eigh(centred.T @ centred / (len(sizes) - 1), s_within, eigvals_only=True)
    values = np.maximum(values, 0)
    return _exp_entropy(values), float(values.mean())


def _exp_entropy(values: np.ndarray) -> float:
    total = values.sum()
    if total <= 0:
        return 1.0
    p = values[values > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))


def _repeated(classes: np.ndarray | None, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose class has two or more rows, and those classes as 0..K-1."""
    if classes is None:
        return np.empty(0, int), np.empty(0, int)
    if len(classes) != n:
        raise Refusal("COLLAPSE_INPUT", f"{len(classes)} classes for {n} rows")
    _, dense, sizes = np.unique(classes, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(sizes[dense] >= 2)
    return rows, np.unique(dense[rows], return_inverse=True)[1]
