"""Checks 2 and 3: does a model see the future? For any function from (a subject's events, t) to a vector."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from mmjepa.audit.finding import Finding, judge, not_applicable
from mmjepa.keyed import generator

Embed = Callable[[pd.DataFrame, pd.Timestamp], np.ndarray]
TOLERANCE = 1e-4  # other sequence lengths sum in another order


def prefix_invariance(
    embed: Embed, records: Sequence[pd.DataFrame], times: Sequence[pd.Timestamp], *, seed: int = 0
) -> Finding:
    """Check 2: what is embedded as of t must not depend on events that become available after t.

    embed: (events, t) -> z [D]; it is given the whole record and must look at its past alone. records: one table a subject with
    the columns time, code, numeric_value, sorted by time, and available_time where it differs. times: one t a record.
    The future is randomised (any difference in z fires) and deleted (a relative difference above 1e-4 fires).
    """
    name, tried, randomised, deleted = "prefix invariance", 0, 0, 0
    for i, (record, t) in enumerate(zip(records, times, strict=True)):
        late = _late(record, t)
        if not late.any():
            continue
        tried += 1
        z = np.asarray(embed(record, t))
        randomised += not np.array_equal(z, embed(_randomised(record, late, generator(seed, "audit/future", i)), t))
        deleted += _moved(z, np.asarray(embed(record[~late].reset_index(drop=True), t)))
    if not tried:
        return not_applicable("2", name, "no record has events after its prediction time")
    sentence = (
        f"of {tried} records, z moved for {randomised} when the future was randomised and {deleted} when it was deleted"
    )
    return judge(
        "2", name, randomised + deleted, sentence, "Cut the input by available_time <= t before the model sees it"
    )


def future_swap(
    predict: Embed,
    label: Callable[[pd.DataFrame, pd.Timestamp], float],
    records: Sequence[pd.DataFrame],
    times: Sequence[pd.Timestamp],
) -> Finding:
    """Check 3: with another subject's future spliced in after t the label moves and the prediction must not.

    predict, records, times: as in ``prefix_invariance``. label: (events, t) -> the answer, read from the future. Each record
    is spliced with the next one whose label differs; without such a pair the check says nothing.
    """
    name, tried, moved = "future swap", 0, 0
    answers = [label(record, t) for record, t in zip(records, times, strict=True)]
    for i, (record, t) in enumerate(zip(records, times, strict=True)):
        other = next((j for j in (*range(i + 1, len(records)), *range(i)) if answers[j] != answers[i]), None)
        if other is None:
            continue
        spliced = _spliced(record, t, records[other], times[other])
        if label(spliced, t) == answers[i]:
            continue
        tried += 1
        moved += _moved(np.asarray(predict(record, t)), np.asarray(predict(spliced, t)))
    if not tried:
        return not_applicable("3", name, "no swap moved a label, so nothing could be seen")
    sentence = f"of {tried} records whose label moved with another subject's future, {moved} predictions moved too"
    return judge("3", name, moved, sentence, "Cut the input by available_time <= t before the model sees it")


def _late(record: pd.DataFrame, t: pd.Timestamp) -> np.ndarray:
    """Events not yet available at t; static rows (no time) are always available."""
    known = record["available_time"].fillna(record["time"]) if "available_time" in record else record["time"]
    return (known > t).to_numpy()


def _randomised(record: pd.DataFrame, late: np.ndarray, draw: np.random.Generator) -> pd.DataFrame:
    """The late rows with codes and values of rows drawn from the whole record, values scaled; times stay."""
    changed, source = record.copy(), draw.integers(len(record), size=int(late.sum()))
    changed.loc[late, "code"] = record["code"].to_numpy()[source]
    values = record["numeric_value"].to_numpy(float)[source] * draw.uniform(-2, 2, len(source))
    changed.loc[late, "numeric_value"] = pd.Series(values).astype(record["numeric_value"].dtype).to_numpy()
    return changed


def _spliced(record: pd.DataFrame, t: pd.Timestamp, other: pd.DataFrame, other_t: pd.Timestamp) -> pd.DataFrame:
    past, future = record[~_late(record, t)], other[_late(other, other_t)].copy()
    for column in ("time", "available_time"):
        if column in future:
            future[column] = future[column] + (t - other_t)
    return pd.concat([past, future]).sort_values("time", kind="stable", na_position="first", ignore_index=True)


def _moved(z: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.linalg.norm(z - other) > TOLERANCE * max(float(np.linalg.norm(z)), 1e-12))
