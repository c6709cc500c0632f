"""Every field of every row for every combination of flags, on 1,000 subjects, against pandas and plain Python.

The world has late rows, admissions and static rows. 216 combinations, each with and without a prediction time; bits must agree.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ehr_parts.common import Options, line, write_world
from ehr_parts.reference import Reference, every_config, mismatches, read_frame
from mmjepa.ehr.batches import EventBatches
from mmjepa.ehr.store import EventStore
from mmjepa.ehr.tokens import JointTokens, TokensConfig


def run(options: Options) -> Iterator[dict[str, Any]]:
    subjects = 10 if options.small else 1_000
    rng = np.random.default_rng(0)
    root = write_world(options.scratch / "equality", rng.integers(1, 60, subjects), extras=True)
    store = EventStore.build(root, options.scratch / "equality_store")
    tokens = JointTokens.fit(store, store.splits["train"], TokensConfig(min_count=2, exclude=("SEX", "LAB//51999")))
    reference = Reference(read_frame(root), tokens)
    last = np.asarray(store.times_us)[np.asarray(store.offsets)[1:] - 1]
    times = last - rng.integers(-5, 40, subjects) * 3_600_000_000
    labels = rng.random(subjects) < 0.5
    rows = wrong = 0
    configs = every_config(length=16)
    for timed in (True, False):
        made = EventBatches(store, store.subjects, times if timed else None, tokens=tokens, labels=labels)
        for number, config in enumerate(configs):
            made.config = replace(config, seed=number)
            wrong += mismatches(made, reference, rng.permutation(subjects), epoch=number % 5)
            rows += subjects
    yield line(
        "equality", subjects=subjects, flag_combinations=2 * len(configs), rows=rows, wrong=wrong, met=wrong == 0
    )
