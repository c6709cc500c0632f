"""Check 14: what was fitted, and on whom: statistics and vocabularies that only rows of other splits explain."""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mmjepa.audit.finding import Finding, judge, not_applicable
from mmjepa.files import read_json

TOLERANCE, TELLS_APART = 1e-4, 1e-3  # relative: of a match; of the statistics of two groups, for a code to be of use
MATCHING, MIN_CODES = 0.9, 3


def fitted_statistics(store: Any, codes_file: Path) -> Finding:
    """Check 14: numbers beside the codes in ``metadata/codes.parquet`` that are statistics of more than the training split.

    store: the event store of the cohort. Counts, sums, means, deviations, least and largest values of each code are computed for
    every set of splits and compared with every column of numbers.
    """
    name = "statistics fitted on other splits"
    if "train" not in store.splits or len(store.splits) < 2:
        return not_applicable("14", name, "the cohort has no training split")
    table = pd.read_parquet(codes_file).set_index("code").reindex(store.vocabulary)
    columns = table.select_dtypes("number")
    if columns.empty:
        return not_applicable("14", name, "codes.parquet holds no numbers beside the codes")
    code, value, split = _rows(store)
    train = _statistics(code[split == "train"], value[split == "train"], len(store.vocabulary))
    hits = []
    for names in _others(list(store.splits)):
        mine = np.isin(split, names)
        wide = _statistics(code[mine], value[mine], len(store.vocabulary))
        for column in columns:
            numbers = columns[column].to_numpy(float)
            if any(_matches(numbers, wide[kind], train[kind]) for kind in wide):
                hits.append(f"{column} ({' + '.join(names)})")
    sentence = (
        f"{len(hits)} of {columns.shape[1]} columns of codes.parquet are statistics of more than the training split"
    )
    advice = "Compute them over the training split alone"
    return judge("14", name, len(hits), sentence + (f": {', '.join(hits[:5])}" if hits else ""), advice)


def fitted_vocabulary(store: Any, tokens_file: Path) -> Finding:
    """Check 14: codes of a fitted token file that occur too seldom in the training split to have been fitted on it.

    tokens_file: JSON with ``codes``, ``config.min_count`` and ``fitted_on``.
    """
    name = "vocabulary fitted on other splits"
    if "train" not in store.splits or len(store.splits) < 2:
        return not_applicable("14b", name, "the cohort has no training split")
    fitted = read_json(tokens_file)
    if fitted["fitted_on"] != store.fingerprint:
        return not_applicable("14b", name, "the vocabulary was fitted on another cohort")
    code, _, split = _rows(store)
    count = np.bincount(code[split == "train"], minlength=len(store.vocabulary))
    seen = dict(zip(store.vocabulary, count.tolist(), strict=True))
    strangers = [name for name in fitted["codes"] if seen.get(name, 0) < fitted["config"]["min_count"]]
    sentence = (
        f"{len(strangers)} of {len(fitted['codes'])} codes of the vocabulary are too rare in the training split for it"
    )
    return judge("14b", name, len(strangers), sentence, "Fit it on the training split of this cohort alone")


def _rows(store: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Code, value and split of every row, static ones included."""
    split_of = np.full(len(store.subjects), "", dtype=object)
    for name, members in store.splits.items():
        split_of[np.searchsorted(store.subjects, members)] = name
    lengths = np.diff(store.offsets), np.diff(store.static_offsets)
    code = np.concatenate([store.codes, store.static_codes])
    value = np.concatenate([store.values, store.static_values]).astype(float)
    return code, value, np.concatenate([np.repeat(split_of, length) for length in lengths])


def _others(names: list[str]) -> Iterator[tuple[str, ...]]:
    """Sets of splits other than the training split, the largest first."""
    for size in range(len(names), 0, -1):
        yield from (chosen for chosen in combinations(names, size) if chosen != ("train",))


def _statistics(code: np.ndarray, value: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Name -> [codes] float, NaN where there is none."""
    rows = np.bincount(code, minlength=size).astype(float)
    code, value = code[np.isfinite(value)], value[np.isfinite(value)]
    count = np.bincount(code, minlength=size).astype(float)
    total, squares = (np.bincount(code, weights=value**power, minlength=size) for power in (1, 2))
    low, high = np.full(size, np.inf), np.full(size, -np.inf)
    np.minimum.at(low, code, value)
    np.maximum.at(high, code, value)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / count
        spread = np.sqrt(np.maximum(squares / count - mean**2, 0))
        sample = spread * np.sqrt(count / (count - 1))
    found = {"rows": rows, "count": count, "sum": total, "squares": squares, "mean": mean, "sd": spread, "sd1": sample}
    return found | {"low": low, "high": high}


def _matches(numbers: np.ndarray, wide: np.ndarray, train: np.ndarray) -> bool:
    """Whether the numbers are the wide statistic wherever it differs from that of the training split."""
    with np.errstate(invalid="ignore"):
        apart = np.isfinite(numbers) & np.isfinite(wide) & ~np.isclose(wide, train, rtol=TELLS_APART, atol=0)
    near = np.isclose(numbers[apart], wide[apart], rtol=TOLERANCE, atol=0)
    return bool(apart.sum() >= MIN_CODES and near.mean() >= MATCHING)
