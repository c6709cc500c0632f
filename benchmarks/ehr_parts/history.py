"""Cost of a window of 64 events against the length of the record it lies in, 10^2 to 10^6 events.

A million rows of each length in one store, so that the caches of the machine are equally cold; each batch holds 64 windows of
subjects of one length, at times spread over the second half of their records, as of which everything before is known.
``as_of_us``: the search for those times, a window.
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from ehr_parts.common import Options, in_turns, line, write_world
from mmjepa.ehr.batches import BatchesConfig, EventBatches
from mmjepa.ehr.store import EventStore
from mmjepa.ehr.tokens import JointTokens

LENGTH, WINDOWS = 64, 6_400


def run(options: Options) -> Iterator[dict[str, Any]]:
    powers = np.array([128, 1_000] if options.small else [128, 1_000, 10_000, 100_000, 1_000_000])
    people = powers[-1] // powers
    root = write_world(options.scratch / "history", np.repeat(powers, people), shards=1)
    store = EventStore.build(root, options.scratch / "history_store")
    subjects = np.split(np.asarray(store.subjects), np.cumsum(people)[:-1])
    tokens = JointTokens.fit(store, subjects[1])
    all_batches = [_batches(store, tokens, some) for some in subjects]
    spent = in_turns(5, *[lambda batches=batches: _epoch(batches) for batches in all_batches])
    searched = in_turns(5, *[lambda batches=batches: _search(store, batches) for batches in all_batches])
    each, search = (np.array(column) / WINDOWS * 1e6 for column in (spent, searched))
    yield line(
        "history",
        float(each[0] / each.max()),
        0.8,
        events=powers.tolist(),
        cpu_us_a_window=each.tolist(),
        as_of_us=search.tolist(),
    )


def _batches(store: EventStore, tokens: JointTokens, people: np.ndarray) -> EventBatches:
    rng = np.random.default_rng(0)
    subjects = rng.choice(people, WINDOWS)
    rows = store.rows(subjects)
    start, stop = np.asarray(store.offsets)[rows], np.asarray(store.offsets)[rows + 1]
    at = start + ((stop - start - 1) * rng.uniform(0.5, 1, WINDOWS)).astype(np.int64)
    return EventBatches(
        store, subjects, np.asarray(store.times_us)[at], tokens=tokens, config=BatchesConfig(length=LENGTH, hide=0.15)
    )


def _epoch(batches: EventBatches) -> float:
    start = time.process_time()
    for batch in batches.epoch(0, 64):
        assert batch.codes.shape[1] == LENGTH
    return time.process_time() - start


def _search(store: EventStore, batches: EventBatches) -> float:
    assert batches.prediction_times is not None
    start = time.process_time()
    for first in range(0, WINDOWS, 64):
        store.as_of(batches.subjects[first : first + 64], batches.prediction_times[first : first + 64])
    return time.process_time() - start
