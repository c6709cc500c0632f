"""Batches of encounters: the first p of a subject as context, the next one as target (causal prefixes, p in 2..n-1)."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmjepa.ehr.encounters import PAD, EncounterForm
from mmjepa.ehr.store import EventStore
from mmjepa.keyed import generator

SHORTEST = 2  # encounters of the shortest context


@dataclass
class EncounterBatch:
    """B contexts of at most C encounters of at most T tokens; a row's encounters come first, the rest is padding.

    subjects: int64 [B]. context: int64 [B], encounters of each context = number of the target. codes: int64 [B, C, T], PAD
    behind an encounter's tokens. days: float64 [B, C], since the first admission. present: bool [B, C].
    target_codes: int64 [B, U]. target_day: float64 [B]. gap_days: float64 [B], from the last encounter of the context, not
    the last column, to the target.
    """

    subjects: Tensor
    context: Tensor
    codes: Tensor
    days: Tensor
    present: Tensor
    target_codes: Tensor
    target_day: Tensor
    gap_days: Tensor


class EncounterHistories:
    """The encounters of some subjects as tokens. ``samples``: int64 [N, 2], (place of the subject, p), all there are."""

    def __init__(self, form: EncounterForm, store: EventStore, subjects: Iterable[int]) -> None:
        self.subjects = np.unique(np.fromiter(subjects, np.int64))
        visits = [form.of(store, int(subject)) for subject in self.subjects]
        self._codes = [[form.encode(visit) for visit in mine] for mine in visits]
        self._days = [np.array([visit.day for visit in mine]) for mine in visits]
        self.lengths = np.array([len(mine) for mine in visits], np.int64)
        pairs = [(i, p) for i, n in enumerate(self.lengths.tolist()) for p in range(SHORTEST, n)]
        self.samples = np.array(pairs, np.int64).reshape(-1, 2)

    def one_each(self, epoch: int, seed: int = 0) -> np.ndarray:
        """int64 [M, 2]: one sample of every subject that has any, p drawn by (seed, epoch, subject) alone: the rows of a
        regulariser must not repeat a person."""
        places = np.flatnonzero(self.lengths > SHORTEST)
        drawn = [
            generator(seed, "ehr/prefix", epoch, int(self.subjects[i])).integers(SHORTEST, self.lengths[i])
            for i in places
        ]
        return np.stack([places, np.array(drawn, np.int64)], axis=1)

    def batch(self, samples: np.ndarray) -> EncounterBatch:
        """The batch of some samples, int64 [B, 2], in their order."""
        if not ((samples[:, 1] >= 1) & (samples[:, 1] < self.lengths[samples[:, 0]])).all():
            raise ValueError("a sample's target is not among its subject's encounters")
        pairs = samples.tolist()
        context, size = samples[:, 1], int(samples[:, 1].max(initial=0))
        longest = max((len(codes) for i, p in pairs for codes in self._codes[i][:p]), default=0)
        codes = np.full((len(pairs), size, longest), PAD, np.int64)
        days = np.zeros((len(pairs), size))
        target = np.full((len(pairs), max((len(self._codes[i][p]) for i, p in pairs), default=0)), PAD, np.int64)
        for row, (i, p) in enumerate(pairs):
            days[row, :p] = self._days[i][:p]
            for place, tokens in enumerate(self._codes[i][:p]):
                codes[row, place, : len(tokens)] = tokens
            target[row, : len(self._codes[i][p])] = self._codes[i][p]
        target_day = np.array([self._days[i][p] for i, p in pairs])
        last_day = np.array([self._days[i][p - 1] for i, p in pairs])
        columns = (
            self.subjects[samples[:, 0]],
            context,
            codes,
            days,
            np.arange(size) < context[:, None],
            target,
            target_day,
            target_day - last_day,
        )
        return EncounterBatch(*(torch.from_numpy(np.ascontiguousarray(column)) for column in columns))
