"""Event tables and stores made by hand."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mmjepa.audit.events import Events

HOUR_US = 3_600_000_000


@pytest.fixture(scope="session")
def events_of() -> Callable[..., Events]:
    """Events of rows (subject, hour, code) or (subject, hour, code, value); everyone of ``people`` has a birth-like first row."""

    def make(rows: list[tuple], people: int) -> Events:
        table = pd.DataFrame([(*row, np.nan)[:4] for row in rows], columns=["subject", "hour", "code", "value"])
        table = table.sort_values(["subject", "hour"], kind="stable")
        codes, vocabulary = pd.factorize(table["code"], sort=True)
        times = (table["hour"] * HOUR_US).to_numpy(np.int64)
        return Events(
            subjects=np.arange(people, dtype=np.int64),
            subject=table["subject"].to_numpy(np.int64),
            times_us=times,
            available_us=times,
            codes=codes.astype(np.int32),
            values=table["value"].to_numpy(np.float32),
            vocabulary=np.asarray(vocabulary, object),
        )

    return make


@pytest.fixture(scope="session")
def store_of() -> Callable[..., SimpleNamespace]:
    """What checks read of an event store, of ``Events``; statics: subject -> static code."""

    def make(events: Events, splits: dict[str, list[int]], statics: dict[int, str] | None = None) -> SimpleNamespace:
        people, statics = len(events.subjects), statics or {}
        vocabulary = sorted({*events.vocabulary, *statics.values()})
        at = {code: i for i, code in enumerate(vocabulary)}
        return SimpleNamespace(
            subjects=events.subjects,
            offsets=np.searchsorted(events.subject, np.arange(people + 1)),
            codes=np.array([at[events.vocabulary[code]] for code in events.codes], np.int32),
            values=events.values,
            available_us=events.available_us,
            static_offsets=np.concatenate([[0], np.cumsum([subject in statics for subject in range(people)])]),
            static_codes=np.array([at[statics[s]] for s in sorted(statics)], np.int32),
            static_values=np.full(len(statics), np.nan, np.float32),
            vocabulary=vocabulary,
            splits={name: np.array(members) for name, members in splits.items()},
            match=lambda prefixes: np.array([code.split("//")[0] in prefixes for code in vocabulary]),
            fingerprint="f",
        )

    return make
