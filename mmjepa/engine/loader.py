"""Batches by step number: what a step reads is a pure function of the curriculum, whoever fetches it."""

import os
import signal
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmjepa.batch import Batch, SequenceView
from mmjepa.curriculum import Curriculum
from mmjepa.engine.start import World


class Sampler(Protocol):
    """What the sample room offers the engine."""

    fingerprint: str

    def __len__(self) -> int:
        """Number of items."""
        ...

    def batch(self, items: Sequence[tuple[int, int]]) -> Batch:
        """The batch of (epoch, item) pairs: the same bits whoever asks, in whatever company."""
        ...

    def corpus(self, encoder: str) -> Iterator[SequenceView] | None:
        """All sequences of an encoder in chunks, by ascending id without gaps; None if they cannot be listed."""
        ...


class _Steps(Dataset[list[Batch]]):
    def __init__(
        self, sampler: Sampler, curriculum: Curriculum, phase: int, first: int, world: World, parts: int
    ) -> None:
        self.sampler, self.curriculum, self.phase, self.first = sampler, curriculum, phase, first
        self.rank, self.size, self.parts = world.rank, world.size, parts

    def __len__(self) -> int:
        return self.curriculum.phases[self.phase].steps - self.first

    def __getitem__(self, index: int) -> list[Batch]:
        items = self.curriculum.drawn(self.phase, self.first + index)
        mine = np.array_split(np.arange(len(items)), self.size)[self.rank]
        batches = [self.sampler.batch([items[i] for i in part]) for part in np.array_split(mine, self.parts)]
        for batch in batches:
            batch.worker = os.getpid()
        return batches


def steps(
    sampler: Sampler, curriculum: Curriculum, phase: int, first: int, world: World, *, parts: int, workers: int
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of every step of a phase from ``first`` on."""
    dataset = _Steps(sampler, curriculum, phase, first, world, parts)
    loader = DataLoader(
        dataset,
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        worker_init_fn=_quiet_worker,
        generator=torch.Generator(),  # the loader's own seed must not be drawn from the model's random stream
        multiprocessing_context="fork" if workers else None,
    )
    return iter(loader)


def _quiet_worker(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then leaves a checkpoint
    torch.set_num_threads(1)


def count(batches: Sequence[Batch], kinds: int) -> torch.Tensor:
    """int64 [kinds + 2]: targets of each kind, rollouts, next tokens of some micro-batches."""
    totals = torch.zeros(kinds + 2, dtype=torch.int64)
    for batch in batches:
        totals[:kinds] += batch.target_kinds(kinds)
        totals[kinds] += batch.rollouts()
        totals[kinds + 1] += batch.next_tokens()
    return totals
