"""Binary metrics with row weights, for one weighting or for many at once (bootstrap draws).

Every function takes y [n] in {0, 1}, a score or log-odds [n] and weights [W, n] (or None for one weighting of ones) and
returns float64 [W]. Weights are usually the counts with which a bootstrap draw took each row.
"""

import numpy as np
from scipy.special import expit


def _groups(score: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight of positives and of negatives at each distinct score, ascending: two arrays [W, G]."""
    order = np.argsort(score, kind="stable")
    sorted_score = score[order]
    starts = np.flatnonzero(np.r_[True, sorted_score[1:] != sorted_score[:-1]])
    taken = weights[:, order]
    positive = taken * (y[order] == 1)
    if len(starts) == len(order):
        return positive, taken - positive
    return np.add.reduceat(positive, starts, axis=1), np.add.reduceat(taken - positive, starts, axis=1)


def _weights(n: int, weights: np.ndarray | None) -> np.ndarray:
    return np.ones((1, n)) if weights is None else np.asarray(weights, np.float64)


def auroc(y: np.ndarray, score: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """P(score of a positive > score of a negative) + half of the ties. NaN where a class has no weight."""
    positive, negative = _groups(score, y, _weights(len(y), weights))
    below = np.cumsum(negative, axis=1) - 0.5 * negative
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.einsum("wg,wg->w", positive, below) / (positive.sum(axis=1) * negative.sum(axis=1))


def average_precision(y: np.ndarray, score: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Step-wise average precision: sum over thresholds of (recall step) x precision; never a trapezoid."""
    positive, negative = _groups(score, y, _weights(len(y), weights))
    positive, negative = positive[:, ::-1], negative[:, ::-1]
    hits = np.cumsum(positive, axis=1)
    taken = hits + np.cumsum(negative, axis=1)
    precision = np.divide(hits, taken, out=np.zeros_like(hits), where=taken > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.einsum("wg,wg->w", positive, precision) / positive.sum(axis=1)


def brier(y: np.ndarray, log_odds: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Mean squared difference between outcome and probability."""
    weights = _weights(len(y), weights)
    return weights @ np.square(expit(log_odds) - y) / weights.sum(axis=1)


def calibration(
    y: np.ndarray, log_odds: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Calibration intercept a of ``logit P(y) = a + logit p`` and slope b of ``logit P(y) = a' + b logit p``.

    0 and 1 are perfect. NaN where the maximum of the likelihood does not exist (one class, or separated scores).
    """
    weights = _weights(len(y), weights)
    ones = np.ones((len(y), 1))
    intercept = _logistic(ones, y, np.asarray(log_odds, float), weights)[:, 0]
    slope = _logistic(np.column_stack([ones, log_odds]), y, np.zeros(len(y)), weights)[:, 1]
    return intercept, slope


def _logistic(design: np.ndarray, y: np.ndarray, offset: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted maximum-likelihood logistic regression by Newton: theta [W, K] for design [n, K] and weights [W, n].

    One weighting is solved to 1e-9. Several are bootstrap draws: each starts from the solution for all rows and stops with
    an error of a few 1e-4, a hundredth of what any interval of them can show.
    """
    start = np.zeros((1, design.shape[1]))
    if len(weights) > 1:
        start = _logistic(design, y, offset, np.ones((1, len(y))))
        if not np.isfinite(start).all():
            return np.full((len(weights), design.shape[1]), np.nan)
    theta = np.repeat(start, len(weights), axis=0)
    products = np.einsum("nk,nl->nkl", design, design).reshape(len(y), -1)
    running, tolerance = np.arange(len(weights)), 1e-9 if len(weights) == 1 else 0.02
    for turn in range(50):
        taken = weights if len(running) == len(weights) else weights[running]
        # the first step starts at one place for all weightings, so one row of p serves them all
        p = expit((theta[:1] if turn == 0 else theta[running]) @ design.T + offset)
        gradient = taken @ ((y - p)[0, :, None] * design) if turn == 0 else (taken * (y - p)) @ design
        spread = p * (1 - p)
        hessian = taken @ (spread[0, :, None] * products) if turn == 0 else (taken * spread) @ products
        step = _solve(hessian.reshape(-1, design.shape[1], design.shape[1]), gradient)
        size = np.abs(step).max(axis=1)
        step *= np.minimum(1, 2 / np.maximum(size, 1e-300))[:, None]  # a far start must not overshoot
        theta[running] += step
        # a Newton step of size s leaves an error of about s squared; what is NaN stays NaN
        running = running[size > tolerance]
        if not len(running):
            return theta
    theta[running] = np.nan
    return theta


def _solve(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Batched solve in one or two dimensions; NaN where the matrix is singular."""
    with np.errstate(invalid="ignore", divide="ignore"):
        if vector.shape[1] == 1:
            return np.where(matrix[:, 0] > 1e-12, vector / matrix[:, 0], np.nan)
        a, b, d = matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 1, 1]
        determinant = a * d - b * b
        determinant = np.where(determinant > 1e-12 * a * d, determinant, np.nan)
        return (
            np.column_stack([d * vector[:, 0] - b * vector[:, 1], a * vector[:, 1] - b * vector[:, 0]])
            / determinant[:, None]
        )


def roc_points(y: np.ndarray, score: np.ndarray, most: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at falling thresholds, from (0, 0) to (1, 1), thinned to at most ``most`` points."""
    positive, negative = _groups(score, y, np.ones((1, len(y))))
    true = np.r_[0, np.cumsum(positive[0, ::-1]) / positive.sum()]
    false = np.r_[0, np.cumsum(negative[0, ::-1]) / negative.sum()]
    keep = np.unique(np.linspace(0, len(true) - 1, min(most, len(true))).round().astype(int))
    return false[keep], true[keep]


def calibration_groups(y: np.ndarray, log_odds: np.ndarray, groups: int = 10) -> list[dict[str, float]]:
    """Rows in groups of equal size by predicted risk: mean predicted, observed share and rows of each."""
    parts = np.array_split(np.argsort(log_odds, kind="stable"), min(groups, len(y)))
    p = expit(log_odds)
    return [{"predicted": float(p[i].mean()), "observed": float(y[i].mean()), "rows": len(i)} for i in parts]
