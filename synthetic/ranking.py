"""Areas under the ROC curve, their paired errors, and the area that a label cannot owe to a tag it travels with."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit
from scipy.stats import rankdata
from scipy.stats import t as student

from mmjepa.refusal import Refusal
from synthetic.draws import Array

_CAP_PERCENTILE = 99


def _classes(y: Array) -> tuple[int, int]:
    positive = int(y.sum())
    if not 0 < positive < len(y):
        raise Refusal("SYNTHETIC_RANGE", f"an AUC needs both outcomes; of {len(y)} subjects {positive} are positive")
    return positive, len(y) - positive


def auc(y: Array, score: Array) -> float:
    """Area under the ROC curve of ``score`` [n] for the outcome y [n] bool; ties count one half.

    Raises Refusal ``SYNTHETIC_RANGE`` where one of the outcomes is absent.
    """
    positive, negative = _classes(y)
    return float((rankdata(score)[y].sum() - positive * (positive + 1) / 2) / (positive * negative))


def _placements(y: Array, score: Array) -> tuple[Array, Array]:
    """Share of negatives below each positive, and of positives above each negative."""
    positive, negative = _classes(y)
    ranks = rankdata(score)
    return (ranks[y] - rankdata(score[y])) / negative, 1 - (ranks[~y] - rankdata(score[~y])) / positive


def paired_difference(y: Array, a: Array, b: Array) -> tuple[float, float]:
    """AUC of score a [n] less that of score b [n] on the same subjects, and its standard error (DeLong et al. 1988)."""
    above, below = (p - q for p, q in zip(_placements(y, a), _placements(y, b), strict=True))
    return float(above.mean()), float(np.sqrt(above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below)))


def weighted_auc(y: Array, score: Array, weight: Array) -> float:
    """AUC where a pair counts by the product of its two weights [n]; ties count one half."""
    _classes(y)
    _, level = np.unique(score, return_inverse=True)
    positive = np.bincount(level[y], weight[y], level.max() + 1)
    negative = np.bincount(level[~y], weight[~y], level.max() + 1)
    below = np.cumsum(negative) - negative / 2
    return float(positive @ below / (positive.sum() * negative.sum()))


def decorrelating_weights(y: Array, tag: Array) -> Array:
    """p(y) / p(y | tag) of every subject, [n], capped at the 99th percentile: under them tag and label are independent.

    tag [n] or [n, k]: what gives the site or the protocol away, such as the scanner, coded as numbers. p(y | tag) is a
    logistic regression, exact for a binary tag and for one that is Gaussian in either class.
    """
    _classes(y)
    x = np.column_stack([np.ones(len(y)), np.asarray(tag, dtype=float)])
    coefficients = np.zeros(x.shape[1])
    for _ in range(25):
        p = expit(x @ coefficients)
        step = np.linalg.lstsq((x * (p * (1 - p))[:, None]).T @ x, x.T @ (y - p), rcond=None)[0]
        coefficients += step
        if np.abs(step).max() < 1e-10:
            break
    p, share = expit(x @ coefficients), y.mean()
    weight = np.where(y, share / np.maximum(p, 1e-12), (1 - share) / np.maximum(1 - p, 1e-12))
    return np.minimum(weight, np.percentile(weight, _CAP_PERCENTILE))


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds, their sd, the mean's 95 % interval (Student's t; both None for one seed) and the values."""
    n, mean = len(values), float(np.mean(values))
    found: dict[str, Any] = {"mean": mean, "sd": None, "low": None, "high": None, "values": list(values)}
    if n > 1:
        sd = float(np.std(values, ddof=1))
        half = float(student.ppf(0.975, n - 1)) * sd / np.sqrt(n)
        found |= {"sd": sd, "low": mean - half, "high": mean + half}
    return found
