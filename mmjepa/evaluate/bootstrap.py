"""Intervals: the subject is the unit. Whole subjects are drawn with replacement, within ever-positive and never-positive."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mmjepa.keyed import generator

CELLS = 2_000_000  # rows x draws held at once


class SubjectBootstrap:
    """The draws of one table, shared by everything that is compared on it.

    subject_id [n]; y [n] in {0, 1}, or None for no stratification. Draw d takes each subject ``counts[d]`` times and
    all rows of a subject together; numbers of ever-positive and never-positive subjects stay as observed.
    """

    def __init__(self, subject_id: np.ndarray, y: np.ndarray | None, *, draws: int = 2000, seed: int = 0) -> None:
        subjects, self.of_row = np.unique(subject_id, return_inverse=True)
        ever = np.zeros(len(subjects), bool)
        if y is not None:
            np.logical_or.at(ever, self.of_row, np.asarray(y, bool))
        random = generator(seed, "bootstrap")
        self.counts = np.zeros((draws, len(subjects)), np.int32)
        for stratum in (np.flatnonzero(ever), np.flatnonzero(~ever)):
            if len(stratum):
                chosen = random.integers(0, len(stratum), (draws, len(stratum)))
                flat = chosen + np.arange(draws)[:, None] * len(stratum)
                self.counts[:, stratum] = np.bincount(flat.ravel(), minlength=flat.size).reshape(flat.shape)

    def weights(self) -> Iterator[np.ndarray]:
        """Row weights [some draws, n], block by block so that memory stays small."""
        block = max(1, CELLS // max(1, len(self.of_row)))
        for start in range(0, len(self.counts), block):
            yield self.counts[start : start + block, self.of_row].astype(np.float64)

    def __call__(self, statistic: Callable[[np.ndarray], tuple[np.ndarray, ...]]) -> np.ndarray:
        """``statistic(weights [W, n])`` gives K arrays [W]; returns [K, draws]."""
        return np.concatenate([np.stack(statistic(weights)) for weights in self.weights()], axis=1)


def interval(draws: np.ndarray, *, level: float = 0.95, logit: bool = False) -> list[float] | None:
    """Percentile interval of one statistic's draws; None when more than 1 in 20 draws has no value.

    logit: take the percentiles of log(x / (1 - x)), for statistics between 0 and 1. (Percentiles do not depend on a
    monotone scale; only the interpolation between neighbouring draws does.)
    """
    finite = draws[np.isfinite(draws)]
    if len(finite) < 0.95 * len(draws) or not len(finite):
        return None
    tails = [(1 - level) / 2, (1 + level) / 2]
    if not logit:
        return [float(q) for q in np.quantile(finite, tails)]
    inside = np.clip(finite, 1e-12, 1 - 1e-12)
    return [float(1 / (1 + np.exp(-q))) for q in np.quantile(np.log(inside) - np.log1p(-inside), tails)]


def difference(draws: np.ndarray, reference: np.ndarray, value: float) -> dict[str, Any]:
    """A paired difference on the same draws: interval, two-sided p, standard error, smallest detectable difference.

    The difference of a thing with itself is exactly 0 with p = 1. Detectable = 2.8 standard errors (80 % power).
    """
    delta = draws - reference
    finite = delta[np.isfinite(delta)]
    below, above = int((finite <= 0).sum()), int((finite >= 0).sum())
    error = float(finite.std(ddof=1)) if len(finite) > 1 else float("nan")
    return {
        "value": value,
        "interval": interval(delta),
        "p": min(1.0, 2 * (1 + min(below, above)) / (1 + len(finite))),
        "standard_error": error,
        "detectable": 2.8 * error,
    }


def benjamini_hochberg(p: list[float]) -> list[float]:
    """Benjamini-Hochberg q values of one declared family."""
    values = np.asarray(p, float)
    if not len(values):
        return []
    order = np.argsort(values)[::-1]
    scaled = values[order] * len(values) / np.arange(len(values), 0, -1)
    q = np.empty(len(values))
    q[order] = np.minimum(1.0, np.minimum.accumulate(scaled))
    return [float(x) for x in q]
