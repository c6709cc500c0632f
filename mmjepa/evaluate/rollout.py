"""Rollout metrics: how fast the error of a forecast grows, beside the forecasts that cost nothing."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mmjepa.evaluate.bootstrap import SubjectBootstrap, interval
from mmjepa.refusal import Refusal

FORECASTS = ("model", "copy_forward", "linear", "climatology")
COHORTS = ("shrinking", "fixed")


@dataclass(frozen=True)
class Rollout:
    """table: one row for each (cohort, forecast, hour). summary: drift, skill and sizes as plain values."""

    table: pd.DataFrame
    summary: dict[str, Any]


def rollout_metrics(
    z: np.ndarray,
    zhat: np.ndarray,
    subject_id: np.ndarray,
    climatology: np.ndarray,
    *,
    start: int,
    lengths: np.ndarray | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Rollout:
    """Errors of predictions made from hour ``start``: D(h) = mean over windows of ||zhat_{start+h} - z_{start+h}||_1.

    z [n, T, D]: the same encoder's own latents; NaN past a stay's end, or give lengths [n] (hours present).
    zhat [n, H, D]: zhat[:, h - 1] is the prediction for hour start + h. subject_id [n].
    climatology [T, D]: median of the training latents for each hour and feature. start >= 1, counted from 0.

    Cohort ``shrinking`` is every window that reaches hour start + h, ``fixed`` those that reach the last h. Columns of the
    table: cohort, forecast, h, windows, subjects, D, mase (D / D of copy-forward), skill (1 - D / D of climatology),
    normalised (D / mean L1 distance of z from its median at that hour) and ``_low``, ``_high`` of each: percentile
    intervals over subjects, all forecasts on the same draws. Drift = 100 (D(H) / D(1) - 1), never to be read alone: in a
    stationary world even the best forecast drifts upwards and climatology, which forecasts nothing, does not.
    Raises Refusal ``ROLLOUT_SHAPE``, ``ROLLOUT_EMPTY``.
    """
    valid = _valid(z, zhat, subject_id, climatology, start, lengths)
    horizon = int(np.flatnonzero(valid.any(axis=0))[-1]) + 1
    cohorts = {"shrinking": valid[:, :horizon], "fixed": valid[:, :horizon] & valid[:, [horizon - 1]]}
    error, norm = _errors(z, zhat, climatology, start, horizon, valid)
    subjects, of_row = np.unique(subject_id, return_inverse=True)
    bootstrap = SubjectBootstrap(subjects, None, draws=draws, seed=seed)
    frames, summary = [], {"start": start, "horizon": horizon, "draws": draws, "mean_norm": norm, "drift": {}}
    for cohort, member in cohorts.items():
        means, resampled = _means(_with_dispersion(error, z, start, member), member, of_row, bootstrap)
        frames.append(_table(cohort, member, of_row, means, resampled))
        summary["drift"][cohort] = {
            name: {
                "value": float(100 * (means[k, -1] / means[k, 0] - 1)),
                "interval": interval(100 * (resampled[k, :, -1] / resampled[k, :, 0] - 1)),
            }
            for k, name in enumerate(FORECASTS)
            if means[k, 0] > 0
        }
        summary[f"{cohort}_windows"] = [int(count) for count in member.sum(axis=0)]
    table = pd.concat(frames, ignore_index=True)
    last = table[(table["h"] == horizon) & (table["forecast"] == "model")].set_index("cohort")
    for name in ("mase", "skill", "normalised"):
        summary[f"{name}_at_last"] = {cohort: _plain(last.loc[cohort, name]) for cohort in COHORTS}
    return Rollout(table, summary)


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _valid(
    z: np.ndarray,
    zhat: np.ndarray,
    subject_id: np.ndarray,
    climatology: np.ndarray,
    start: int,
    lengths: np.ndarray | None,
) -> np.ndarray:
    """Which windows reach hour start + h with everything known: bool [n, H]."""
    if z.ndim != 3 or zhat.ndim != 3 or zhat.shape[::2] != z.shape[::2] or climatology.shape != z.shape[1:]:
        raise Refusal(
            "ROLLOUT_SHAPE",
            f"z {list(z.shape)}, zhat {list(zhat.shape)}, climatology {list(climatology.shape)} do not fit",
            "Want [n, T, D], [n, H, D] and [T, D]",
        )
    if len(subject_id) != len(z) or not 1 <= start < z.shape[1] - 1 or zhat.shape[1] == 0:
        raise Refusal("ROLLOUT_SHAPE", f"start {start} or {len(subject_id)} subjects do not fit z {list(z.shape)}")
    present: np.ndarray = np.all(np.isfinite(z), axis=2)
    if lengths is not None:
        present &= np.arange(z.shape[1]) < np.asarray(lengths)[:, None]
    horizon = min(zhat.shape[1], z.shape[1] - 1 - start)
    valid = present[:, start + 1 : start + 1 + horizon] & (present[:, start] & present[:, start - 1])[:, None]
    if not np.isfinite(zhat[:, :horizon][valid]).all() or not np.isfinite(climatology[start + 1 :][:horizon]).all():
        raise Refusal("ROLLOUT_SHAPE", "a prediction or the climatology is not finite where the truth is known")
    if not valid[:, 0].any():
        raise Refusal("ROLLOUT_EMPTY", f"no window goes beyond hour {start}")
    return valid


def _errors(
    z: np.ndarray, zhat: np.ndarray, climatology: np.ndarray, start: int, horizon: int, valid: np.ndarray
) -> tuple[np.ndarray, list[float]]:
    """L1 errors [4, n, H] of the four forecasts (0 where not valid) and the mean L2 norm of z at each h."""
    error, norm = np.zeros((len(FORECASTS), len(z), horizon)), []
    for h in range(1, horizon + 1):
        rows = valid[:, h - 1]
        now, before, truth = (z[rows, hour].astype(np.float64) for hour in (start, start - 1, start + h))
        forecasts = (zhat[rows, h - 1], now, now + h * (now - before), climatology[start + h])
        for k, forecast in enumerate(forecasts):
            error[k, rows, h - 1] = np.abs(forecast - truth).sum(axis=1)
        norm.append(float(np.linalg.norm(truth, axis=1).mean()))
    return error, norm


def _with_dispersion(error: np.ndarray, z: np.ndarray, start: int, member: np.ndarray) -> np.ndarray:
    """The errors and, as a fifth, each row's L1 distance from the cohort's own median at that hour: [5, n, H]."""
    spread = np.zeros(error.shape[1:])
    for h in range(member.shape[1]):
        truth = z[member[:, h], start + 1 + h].astype(np.float64)
        spread[member[:, h], h] = np.abs(truth - np.median(truth, axis=0)).sum(axis=1)
    return np.concatenate([error, spread[None]])


def _means(
    values: np.ndarray, member: np.ndarray, of_row: np.ndarray, bootstrap: SubjectBootstrap
) -> tuple[np.ndarray, np.ndarray]:
    """Means over windows [5, H] and their bootstrap draws [5, draws, H]; a draw without a window is NaN."""
    subjects = bootstrap.counts.shape[1]
    sums = np.zeros((len(values), subjects, member.shape[1]))
    count = np.zeros((subjects, member.shape[1]))
    np.add.at(count, of_row, member)
    for k, value in enumerate(values):
        np.add.at(sums[k], of_row, value * member)
    weights = bootstrap.counts.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = weights @ count
        return sums.sum(axis=1) / count.sum(axis=0), np.stack([weights @ total / drawn for total in sums])


def _table(
    cohort: str, member: np.ndarray, of_row: np.ndarray, means: np.ndarray, resampled: np.ndarray
) -> pd.DataFrame:
    copy, climatology, spread = FORECASTS.index("copy_forward"), FORECASTS.index("climatology"), len(FORECASTS)
    rows = []
    with np.errstate(invalid="ignore", divide="ignore"):
        for k, name in enumerate(FORECASTS):
            measures = {
                "D": (means[k], resampled[k]),
                "mase": (means[k] / means[copy], resampled[k] / resampled[copy]),
                "skill": (1 - means[k] / means[climatology], 1 - resampled[k] / resampled[climatology]),
                "normalised": (means[k] / means[spread], resampled[k] / resampled[spread]),
            }
            for h in range(member.shape[1]):
                row: dict[str, Any] = {
                    "cohort": cohort,
                    "forecast": name,
                    "h": h + 1,
                    "windows": int(member[:, h].sum()),
                    "subjects": len(np.unique(of_row[member[:, h]])),
                }
                for label, (value, drawn) in measures.items():
                    low, high = interval(drawn[:, h]) or (np.nan, np.nan)
                    row |= {label: value[h], f"{label}_low": low, f"{label}_high": high}
                rows.append(row)
    return pd.DataFrame(rows)
