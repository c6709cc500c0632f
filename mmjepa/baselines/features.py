"""The registry of baselines: cohort and rows in, an embedding table of plain features out."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mmjepa.baselines.ehr_counts import CountState, count_features, fit_counts
from mmjepa.baselines.image import image_features
from mmjepa.cohort import Cohort
from mmjepa.evaluate.tables import EmbeddingTable
from mmjepa.refusal import Refusal


@dataclass(frozen=True)
class FeatureState:
    """What was fitted on the training subjects; reused unchanged on another site. counts is None for images alone."""

    name: str
    counts: CountState | None = None


def _image(cohort: Cohort, rows: pd.DataFrame, state: FeatureState) -> np.ndarray:
    return image_features(cohort, rows)


def _ehr_counts(cohort: Cohort, rows: pd.DataFrame, state: FeatureState) -> np.ndarray:
    assert state.counts is not None
    return count_features(cohort.events(), rows, state.counts)


def _early_fusion(cohort: Cohort, rows: pd.DataFrame, state: FeatureState) -> np.ndarray:
    return np.concatenate([_image(cohort, rows, state), _ehr_counts(cohort, rows, state)], axis=1)


BASELINES: dict[str, Callable[[Cohort, pd.DataFrame, FeatureState], np.ndarray]] = {
    "image": _image,
    "ehr_counts": _ehr_counts,
    "early_fusion": _early_fusion,
}


def features(
    name: str,
    cohort: Cohort,
    rows: pd.DataFrame,
    train_subjects: np.ndarray,
    state: FeatureState | None = None,
) -> tuple[EmbeddingTable, FeatureState]:
    """Features of prediction rows, and the state fitted on the way.

    name: one of ``BASELINES``. rows: subject_id, prediction_time and, for images, image_id; a row without an image has no
    image features and is left out, never filled (a judge counts it). train_subjects: the only ones that vocabulary and
    medians may see. state: what an earlier call returned; with it nothing is fitted and train_subjects is not read.

    Returns z = features [rows kept, D] in the order of ``rows``; the split is the cohort's own where it has one.
    Raises Refusal ``BASELINE_UNKNOWN``, ``BASELINE_STATE``, ``BASELINE_EMPTY``.
    """
    if name not in BASELINES:
        raise Refusal("BASELINE_UNKNOWN", f"no baseline is called '{name}'", f"Known: {', '.join(BASELINES)}")
    if state is not None and state.name != name:
        raise Refusal(
            "BASELINE_STATE", f"a state of '{state.name}' was given for '{name}'", "Fit one for each baseline"
        )
    if name != "ehr_counts":
        rows = rows[rows["image_id"].notna()] if "image_id" in rows else rows.iloc[:0]
    if rows.empty:
        raise Refusal("BASELINE_EMPTY", f"no row has what '{name}' needs", "Check that the rows name ingested images")
    if state is None:
        seen = rows[rows["subject_id"].isin(train_subjects)]
        if seen.empty:
            raise Refusal(
                "BASELINE_EMPTY", "no row is of a training subject", "Give rows of training subjects to fit on"
            )
        state = FeatureState(name, None if name == "image" else fit_counts(cohort.events(), seen))
    z = BASELINES[name](cohort, rows, state)
    table = EmbeddingTable(
        rows["subject_id"].to_numpy(), rows["prediction_time"].to_numpy(), z, _splits(cohort, rows), {"baseline": name}
    )
    return table, state


def _splits(cohort: Cohort, rows: pd.DataFrame) -> np.ndarray | None:
    """The cohort's own split of every row, or None where a row has none."""
    of_subject = {int(subject): name for name, ids in cohort.events().splits.items() for subject in ids}
    split = rows["subject_id"].map(of_subject)
    return None if split.isna().any() else split.to_numpy(object)
