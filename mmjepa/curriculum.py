"""Phases as data: what learns, which teacher, which losses, how long."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from mmjepa.jepa import LossConfig
from mmjepa.keyed import generator
from mmjepa.teacher import TeacherConfig


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase. steps: optimiser steps (0 for a pure ``sync``). train: parts that learn; all others stand still, bit for
    bit. sync: set the teacher's shadows to the online weights at the start. batch: items a step, when it differs from
    the run's. own_schedule: warm-up and cosine of its own, outside the one that spans the other phases."""

    name: str
    steps: int
    train: tuple[str, ...] = ()
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    sync: bool = False
    batch: int | None = None
    own_schedule: bool = False

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"phase {self.name!r} has steps={self.steps}")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"phase {self.name!r} has batch={self.batch}; it is at least 1")
        if self.steps and not self.train:
            raise ValueError(
                f"phase {self.name!r} takes {self.steps} steps but trains nothing; name its parts in train"
            )


@dataclass(frozen=True)
class Curriculum:
    """A sequence of phases over a stream of items (windows, subjects). batch: items a step."""

    phases: tuple[Phase, ...]
    batch: int
    items: int
    seed: int

    @property
    def steps(self) -> int:
        """Optimiser steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def batch_of(self, phase: int) -> int:
        """Items a step of a phase."""
        return self.phases[phase].batch or self.batch

    def drawn(self, phase: int, step: int) -> list[tuple[int, int]]:
        """The (epoch, item) pairs of one step. Items come in a keyed order, every one once an epoch; nothing but
        (seed, phases, step) decides them."""
        before = sum(p.steps * self.batch_of(i) for i, p in enumerate(self.phases[:phase]))
        first = before + step * self.batch_of(phase)
        return [self._at(place) for place in range(first, first + self.batch_of(phase))]

    def _at(self, place: int) -> tuple[int, int]:
        epoch, index = divmod(place, self.items)
        return epoch, int(self._order(epoch)[index])

    def _order(self, epoch: int) -> np.ndarray:
        orders = self.__dict__.setdefault("_orders", {})  # one epoch's order is drawn once, not once an item
        if epoch not in orders:
            orders.clear()
            orders[epoch] = generator(self.seed, "order", epoch).permutation(self.items)
        return orders[epoch]

    def rate(self, phase: int, step: int, warmup: float, floor: float) -> float:
        """Learning-rate factor: linear warm-up over a share of the steps, then a cosine down to ``floor``, over all
        phases that share the schedule (or over the phase itself)."""
        if self.phases[phase].own_schedule:
            done, total = step, self.phases[phase].steps
        else:
            shared = [p.steps * (not p.own_schedule) for p in self.phases]
            done, total = sum(shared[:phase]) + step, sum(shared)
        rise = max(1, round(warmup * total))
        if done < rise:
            return (done + 1) / rise
        fall = (done - rise) / max(1, total - rise)
        return floor + (1 - floor) * (1 + math.cos(math.pi * fall)) / 2

    def walk(self, phase: int, step: int) -> Iterator[tuple[int, int]]:
        """The phases still to do with the step each starts at, given a position."""
        yield phase, step
        for index in range(phase + 1, len(self.phases)):
            yield index, 0
