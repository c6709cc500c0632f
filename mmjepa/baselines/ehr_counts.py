"""Record features without learning: counts of codes, last values, age and length, as of the prediction time."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mmjepa.ehr.store import EventStore, to_us
from mmjepa.refusal import Refusal

MOST_CODES = 1000
LEAST_SUBJECTS = 5  # a rarer code identifies people rather than describing them
LEAST_VALUE_SHARE = 0.05  # a value seen in fewer training rows is left to its count
EXCLUDED = ("MEDS_DEATH",)
BIRTH = "MEDS_BIRTH"
YEAR_US = 365.25 * 86_400e6


@dataclass(frozen=True)
class CountState:
    """Fitted on training rows alone. codes: counted codes. value_codes: codes whose last value is used. medians: of those
    last values, then of the age in years, for rows without one. excluded: codes (or their prefixes up to ``//``) unread."""

    codes: tuple[str, ...]
    value_codes: tuple[str, ...]
    medians: tuple[float, ...]
    excluded: tuple[str, ...] = EXCLUDED


def fit_counts(events: EventStore, rows: pd.DataFrame, excluded: tuple[str, ...] = EXCLUDED) -> CountState:
    """Vocabulary and medians of the rows of training subjects (subject_id, prediction_time).

    Codes seen in at least five subjects, the 1,000 in most subjects. Raises Refusal ``BASELINE_EMPTY`` when there is none.
    """
    size = len(events.vocabulary)
    subjects_with, rows_with_value = np.zeros(size, int), np.zeros(size, int)
    seen_of: dict[int, np.ndarray] = {}
    for subject, view in zip(rows["subject_id"], _views(events, rows, excluded), strict=True):
        mine = seen_of.setdefault(int(subject), np.zeros(size, bool))
        mine[view.codes] = True
        mine[view.static] = True
        rows_with_value[np.unique(view.codes[~np.isnan(view.values)])] += 1
    for mine in seen_of.values():
        subjects_with += mine
    kept = np.flatnonzero(subjects_with >= LEAST_SUBJECTS)
    kept = np.sort(kept[np.argsort(-subjects_with[kept], kind="stable")][:MOST_CODES])
    if not len(kept):
        raise Refusal("BASELINE_EMPTY", f"no code is seen in {LEAST_SUBJECTS} training subjects", "Give more subjects")
    valued = kept[rows_with_value[kept] >= max(1, LEAST_VALUE_SHARE * len(rows))]
    codes, value_codes = (tuple(events.vocabulary[code] for code in part) for part in (kept, valued))
    blank = CountState(codes, value_codes, (np.nan,) * (len(valued) + 1), excluded)
    known = _features(events, rows, blank)[:, len(codes) :][:, : len(valued) + 1]
    medians = [float(np.median(x[~np.isnan(x)])) if (~np.isnan(x)).any() else 0.0 for x in known.T]
    return CountState(codes, value_codes, tuple(medians), excluded)


def count_features(events: EventStore, rows: pd.DataFrame, state: CountState) -> np.ndarray:
    """float32 [n, codes + values + 3]: log1p counts, last values, age (years), log1p of record years and of events.

    Only rows available by the prediction_time are read. A value or age that is missing is the training
    median (whether it was measured is told by its count).
    """
    made = _features(events, rows, state)
    filled = made[:, len(state.codes) :][:, : len(state.medians)]
    np.copyto(filled, np.asarray(state.medians), where=np.isnan(filled))
    return made.astype(np.float32)


@dataclass(frozen=True)
class _View:
    """What one row may see: codes and values in order of time, static codes, age and length of the record in years."""

    codes: np.ndarray
    values: np.ndarray
    static: np.ndarray
    age: float
    years: float


def _views(events: EventStore, rows: pd.DataFrame, excluded: tuple[str, ...]) -> Iterator[_View]:
    subjects, times = rows["subject_id"].to_numpy(np.int64), to_us(rows["prediction_time"])
    unread, birth = events.match((*excluded, BIRTH)), events.match((BIRTH,))
    starts, stops = events.as_of(subjects, times)
    for place, start, stop, t in zip(events.rows(subjects), starts, stops, times, strict=True):
        known = start + np.argsort(events.times_us[start:stop], kind="stable")
        codes, at = events.codes[known], events.times_us[known]
        born = at[birth[codes]]
        use = ~unread[codes]
        static = np.asarray(events.static_codes[events.static_offsets[place] : events.static_offsets[place + 1]])
        yield _View(
            codes[use],
            events.values[known][use],
            static[~unread[static]],
            float((t - born[0]) / YEAR_US) if len(born) else np.nan,
            float((t - at[use][0]) / YEAR_US) if use.any() else 0.0,
        )


def _features(events: EventStore, rows: pd.DataFrame, state: CountState) -> np.ndarray:
    """The features with NaN where a value or the age is missing, float64."""
    known = {code: i for i, code in enumerate(events.vocabulary)}
    column = np.full(len(events.vocabulary), -1)  # a code of this site that training never saw stays -1
    value_column = column.copy()
    for target, codes in ((column, state.codes), (value_column, state.value_codes)):
        for i, code in enumerate(codes):
            if code in known:
                target[known[code]] = i
    width, values = len(state.codes), len(state.value_codes)
    made = np.full((len(rows), width + values + 3), np.nan)
    for out, view in zip(made, _views(events, rows, state.excluded), strict=True):
        present = np.concatenate([column[view.codes], column[view.static]])
        out[:width] = np.log1p(np.bincount(present[present >= 0], minlength=width))
        measured = (value_column[view.codes] >= 0) & ~np.isnan(view.values)
        # rows are in order of time and a later assignment wins: what stays is the last value
        out[width + value_column[view.codes[measured]]] = view.values[measured]
        out[width + values :] = view.age, np.log1p(view.years), np.log1p(len(view.codes))
    return made
