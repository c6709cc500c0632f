"""Peak memory of an epoch of 64 x 512 random windows over 5,000 and over 100,000 subjects, each in a process of its own.

Anonymous memory is what the process itself holds; the resident set counts the pages of the mapped store too, which the
system takes back when it needs them. ``growth_mib``: anonymous, large over small; the goal is at most 50.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ehr_parts.common import Options, in_child, line, record_lengths, write_world
from mmjepa.ehr.batches import BatchesConfig, EventBatches
from mmjepa.ehr.store import EventStore
from mmjepa.ehr.tokens import JointTokens

MOST_MIB = 50


def run(options: Options) -> Iterator[dict[str, Any]]:
    found = []
    for subjects in (50, 500) if options.small else (5_000, 100_000):
        root = write_world(options.scratch / f"memory{subjects}", record_lengths(subjects))
        store = EventStore.build(root, options.scratch / f"memory_store{subjects}")
        rows = len(store.codes)
        peak = in_child("memory", "epoch", options.scratch / f"memory_store{subjects}")
        found.append(line("memory", subjects=subjects, rows=rows, **peak))
    growth = found[1]["peak_anonymous_mib"] - found[0]["peak_anonymous_mib"]
    yield from found
    yield line("memory", growth_mib=growth, at_most=MOST_MIB, met=growth <= MOST_MIB)


def epoch(store: str) -> dict[str, Any]:
    """One epoch, tokens fitted on a thousand subjects; the whole store is touched at random."""
    events = EventStore.open(Path(store))
    tokens = JointTokens.fit(events, events.subjects[:1_000])
    batches = EventBatches(events, events.subjects, tokens=tokens, config=BatchesConfig(window="random", hide=0.15))
    seen = sum(int(batch.present.sum()) for batch in batches.epoch(0, 64))
    return {"events": seen}
