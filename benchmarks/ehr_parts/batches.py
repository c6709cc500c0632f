"""Batches of 64 x 512 events with labels and events to hide, against meds-torch-data: CPU time a subject.

Both read the same 5,000 subjects (4,000 for training; rows a subject log-normal with median 400), the last 512 events at the
label's time, static rows apart, values, times since the event before, and hide 15 %. They take turns. Preparation is left out
of both. ``same_events``: both gave equally many.
"""

import json
import subprocess
import time
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from ehr_parts.common import LABELS, Options, environment, in_turns, line, record_lengths, write_world
from ehr_parts.peer import MEDS_TORCH_DATA, peer_python
from mmjepa.cohort import read_labels
from mmjepa.ehr.batches import BatchesConfig, EventBatches
from mmjepa.ehr.store import EventStore, to_us
from mmjepa.ehr.tokens import JointTokens, TokensConfig

LENGTH, SIZE, HIDE, GOAL = 512, 64, 0.15, 15.0


def run(options: Options) -> Iterator[dict[str, Any]]:
    root = write_world(options.scratch / "batches", record_lengths(200 if options.small else 5_000))
    ours = _ours(options)
    epochs = iter(range(1_000))
    figures: dict[str, Any] = {"subjects": len(ours), "batch": SIZE, "length": LENGTH}

    def our_epoch() -> float:
        events = hidden = 0
        cpu = time.process_time()
        for batch in ours.epoch(next(epochs), SIZE):
            assert batch.hidden is not None
            events, hidden = events + int(batch.present.sum()), hidden + int(batch.hidden.sum())
        figures["events"], figures["hidden"] = events, hidden
        return time.process_time() - cpu

    python = peer_python(options.peer_env, "meds-torch-data", MEDS_TORCH_DATA)
    if isinstance(python, str):
        (alone,) = in_turns(5, our_epoch)
        yield line("batches", None, GOAL, cpu_us_a_subject=alone / len(ours) * 1e6, peer="none", why=python, **figures)
        return
    worker = python, "-m", "ehr_parts.peers.meds_torch_data"
    command = [
        *worker,
        root,
        options.scratch / "batches_peer",
        root / "labels" / LABELS,
        str(LENGTH),
        str(SIZE),
        str(HIDE),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        prepared = _answer(process.stdout)
        peer: dict[str, Any] = {}

        def peer_epoch() -> float:
            process.stdin.write("\n")
            process.stdin.flush()
            peer.update(_answer(process.stdout))
            return peer["cpu_s"]

        mine, theirs = in_turns(5, our_epoch, peer_epoch)
        process.stdin.close()
    yield line(
        "batches",
        theirs / mine,
        GOAL,
        cpu_us_a_subject=mine / len(ours) * 1e6,
        peer="meds-torch-data 0.9.0",
        peer_cpu_us_a_subject=theirs / prepared["subjects"] * 1e6,
        same_events=peer["events"] == figures["events"] and prepared["subjects"] == len(ours),
        peer_prepare_s=prepared["prepare_s"],
        **figures,
    )


def _ours(options: Options) -> EventBatches:
    root = options.scratch / "batches"
    store = EventStore.build(root, options.scratch / "batches_store")
    train = store.splits["train"]
    tokens = JointTokens.fit(store, train, TokensConfig(min_count=1))
    labels = read_labels(root / "labels", LABELS)
    labels = labels[labels["subject_id"].isin(train)]
    config = BatchesConfig(length=LENGTH, static="separate", time="since", hide=HIDE)
    times, values = to_us(labels["prediction_time"]), np.asarray(labels["value"], bool)
    return EventBatches(
        store, np.asarray(labels["subject_id"], np.int64), times, tokens=tokens, labels=values, config=config
    )


def _answer(stream: IO[str]) -> dict[str, Any]:
    text = stream.readline()
    if not text:
        raise RuntimeError("the process of the peer has ended")
    return json.loads(text)
