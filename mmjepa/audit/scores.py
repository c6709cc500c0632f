"""Checks 10 and 16 of a model's scores: is a model of record size as good, is the model better than can be."""

from pathlib import Path

import numpy as np
import pandas as pd

from mmjepa.audit.finding import Finding, judge, not_applicable
from mmjepa.audit.scan import MIN_CLASS
from mmjepa.keyed import generator
from mmjepa.refusal import Refusal

KEY = ["subject_id", "prediction_time"]
DRAWS, STANDARD_ERRORS = 500, 3
BEST = ("env_bayes_both", "risk")  # an oracle table's column of the best score there can be


def read_scores(path: Path | str) -> pd.DataFrame:
    """A score table: subject_id, prediction_time (datetime64[us]), score. Raises SCORES_TABLE."""
    return _read(path, [*KEY, "score"])


def read_oracle(path: Path | str) -> pd.DataFrame:
    """An oracle table: subject_id, prediction_time, y and ``best``, the score no honest model passes. Raises SCORES_TABLE."""
    table = _read(path, [*KEY, "y"])
    best = next((name for name in BEST if name in table), None)
    if best is None:
        raise Refusal("SCORES_TABLE", f"{path} has none of the columns {', '.join(BEST)}", "Name the oracle's table")
    return table[[*KEY, "y"]].assign(best=table[best])


def above_the_oracle(scores: pd.DataFrame, oracle: pd.DataFrame) -> Finding:
    """Check 16: an AUROC above the oracle's by 3 standard errors of the paired difference (bootstrap by subject)."""
    name = "better than possible"
    both = scores.merge(oracle, on=KEY)
    if both.groupby("y")["subject_id"].nunique().reindex([0, 1], fill_value=0).min() < MIN_CLASS:
        return not_applicable("16", name, "too few rows are in both the score table and the oracle's")
    columns = both[["score", "best"]].to_numpy(float).T
    value, draws = auroc_draws(columns, both["y"].to_numpy(bool), both["subject_id"].to_numpy())
    above, error = value[0] - value[1], float(np.std(draws[0] - draws[1]))
    sentence = (
        f"AUROC {value[0]:.3f}, the best possible {value[1]:.3f}: {above:+.3f} with a standard error of {error:.3f}"
    )
    return judge(
        "16", name, int(above > STANDARD_ERRORS * error), sentence, "Something leaks: look for it by dropping inputs"
    )


def auroc_draws(scores: np.ndarray, y: np.ndarray, subject: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC of each row of scores [K, N], and of each over 500 bootstrap draws of subjects, [K, 500]."""
    people, member = np.unique(subject, return_inverse=True)
    draw = generator(0, "audit/bootstrap", len(people))
    weights = draw.multinomial(len(people), np.full(len(people), 1 / len(people)), DRAWS)[:, member]
    value = np.array([_auroc(s, y, np.ones((1, len(y))))[0] for s in scores])
    return value, np.array([_auroc(s, y, weights) for s in scores])


def _auroc(score: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC under each row of weights [D, N]; ties count one half."""
    _, at = np.unique(score, return_inverse=True)
    order = np.argsort(at, kind="stable")
    starts = np.flatnonzero(np.diff(at[order], prepend=-1))
    positive, negative = (np.add.reduceat((weights * which)[:, order], starts, axis=1) for which in (y, ~y))
    below = np.cumsum(negative, axis=1) - negative / 2
    with np.errstate(invalid="ignore"):
        return (positive * below).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))


def _read(path: Path | str, wanted: list[str]) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError):
        raise Refusal("SCORES_TABLE", f"{path} cannot be read as parquet", "Write it again") from None
    missing = [name for name in wanted if name not in table]
    if missing:
        raise Refusal("SCORES_TABLE", f"{path} has no column {', '.join(missing)}", f"Want {', '.join(wanted)}")
    return table.astype({"prediction_time": "datetime64[us]"})
