"""Batches of encounters: the first p of a subject as context, the next one as target (causal prefixes, p in 2..n-1).

A context is what was known when its target was admitted: a diagnosis coded later, or an encounter whose discharge was not on
record yet, is not in it. The target, its day and the days of the context are those of the whole record.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmjepa.ehr.encounters import PAD, Encounter, EncounterForm
from mmjepa.ehr.stays import NEVER
from mmjepa.ehr.store import EventStore
from mmjepa.keyed import generator

SHORTEST = 2  # encounters of the shortest context
Context = tuple[list[np.ndarray], np.ndarray]  # tokens and day of each encounter


@dataclass
class EncounterBatch:
    """B contexts of at most C encounters of at most T tokens; a row's encounters come first, the rest is padding.

    subjects: int64 [B]. context: int64 [B], encounters before the target = number of the target; ``present``, bool [B, C],
    has fewer where some were not known yet. codes: int64 [B, C, T], PAD behind an encounter's tokens. days: float64 [B, C],
    since the first admission. target_codes: int64 [B, U]. target_day: float64 [B]. gap_days: float64 [B], from the last encounter of the context, not
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
    """The encounters of some subjects as tokens. ``samples``: int64 [N, 2], (place of the subject, p), all that have at least
    two encounters in their context. lengths: int64 [subjects], encounters of each."""

    def __init__(self, form: EncounterForm, store: EventStore, subjects: Iterable[int]) -> None:
        self.subjects = np.unique(np.fromiter(subjects, np.int64))
        visits = [form.of(store, int(subject)) for subject in self.subjects]
        self._whole = [self._encoded(form, mine, mine) for mine in visits]
        self._then: dict[tuple[int, int], Context] = {}
        for i, mine in enumerate(visits):
            known_us = -NEVER if form.config.drugs_when == "stay" else NEVER
            for p in range(1, len(mine)):
                known_us, t_us = max(known_us, mine[p - 1].known_us), mine[p].admit_us
                if known_us > t_us:  # else what was known then is the first p of the whole
                    seen = form.of(store, int(self.subjects[i]), t_us)
                    self._then[i, p] = self._encoded(form, seen, mine)
        self.lengths = np.array([len(mine) for mine in visits], np.int64)
        pairs = [
            (i, p)
            for i, n in enumerate(self.lengths.tolist())
            for p in range(SHORTEST, n)
            if len(self._context(i, p)[0]) >= SHORTEST
        ]
        self.samples = np.array(pairs, np.int64).reshape(-1, 2)

    @staticmethod
    def _encoded(form: EncounterForm, visits: list[Encounter], whole: list[Encounter]) -> Context:
        day = {visit.admit_us: visit.day for visit in whole}
        days = np.array([day.get(visit.admit_us, visit.day) for visit in visits])
        return [form.encode(visit) for visit in visits], days

    def _context(self, i: int, p: int) -> Context:
        """Tokens and days of the context of target ``p`` of the subject in place ``i``."""
        codes, days = self._whole[i]
        return self._then.get((i, p)) or (codes[:p], days[:p])

    def one_each(self, epoch: int, seed: int = 0) -> np.ndarray:
        """int64 [M, 2]: one sample of every subject that has any, p drawn by (seed, epoch, subject) alone: the rows of a
        regulariser must not repeat a person."""
        places, first, count = np.unique(self.samples[:, 0], return_index=True, return_counts=True)
        drawn = [
            self.samples[start + generator(seed, "ehr/prefix", epoch, int(self.subjects[i])).integers(n), 1]
            for i, start, n in zip(places, first, count, strict=True)
        ]
        return np.stack([places, np.array(drawn, np.int64)], axis=1)

    def batch(self, samples: np.ndarray) -> EncounterBatch:
        """The batch of some samples, int64 [B, 2], in their order."""
        if not ((samples[:, 1] >= 1) & (samples[:, 1] < self.lengths[samples[:, 0]])).all():
            raise ValueError("a sample's target is not among its subject's encounters")
        pairs = samples.tolist()
        contexts = [self._context(i, p) for i, p in pairs]
        lengths = np.array([len(days) for _, days in contexts], np.int64)
        if not lengths.all():
            raise ValueError("nothing of a sample's context was known when its target was admitted")
        size = int(lengths.max(initial=0))
        longest = max((len(tokens) for codes, _ in contexts for tokens in codes), default=0)
        targets = [self._whole[i][0][p] for i, p in pairs]
        codes = np.full((len(pairs), size, longest), PAD, np.int64)
        days = np.zeros((len(pairs), size))
        target = np.full((len(pairs), max(map(len, targets), default=0)), PAD, np.int64)
        for row, (mine, when) in enumerate(contexts):
            days[row, : len(when)] = when
            for place, tokens in enumerate(mine):
                codes[row, place, : len(tokens)] = tokens
            target[row, : len(targets[row])] = targets[row]
        target_day = np.array([self._whole[i][1][p] for i, p in pairs])
        last_day = np.array([when[-1] for _, when in contexts])
        columns = (
            self.subjects[samples[:, 0]],
            samples[:, 1],
            codes,
            days,
            np.arange(size) < lengths[:, None],
            target,
            target_day,
            target_day - last_day,
        )
        return EncounterBatch(*(torch.from_numpy(np.ascontiguousarray(column)) for column in columns))
