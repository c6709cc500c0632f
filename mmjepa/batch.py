"""What a batch is made of: views for the encoders, and a layout that says which latent sits in which predictor slot.

Plain tensors only. The sample room makes them; the model rooms read them; neither needs the other.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor

Moved = TypeVar("Moved")


@dataclass
class VolumeView:
    """CT crops for a volume encoder.

    voxels: float32 [V, 1, X, Y, Z] in RAS+, in 0..1 (``mmjepa.ct.window.windowed``). keep: int64 [V, K], the token places that the encoder may see; None for all.
    read: ``cell`` gives one latent a crop (V rows), ``tokens`` one a kept token (V*K rows, crop by crop).
    """

    encoder: str
    voxels: Tensor
    keep: Tensor | None = None
    read: Literal["cell", "tokens"] = "cell"

    @property
    def rows(self) -> int:
        """How many latents the view yields."""
        if self.read == "cell":
            return len(self.voxels)
        assert self.keep is not None
        return self.keep.numel()


@dataclass
class SequenceView:
    """Ragged token sequences for a sequence encoder, one latent each.

    tokens: int64 [L], all sequences behind one another. offsets: int64 [V+1]. values, has_value, days: float32 [L] for
    joint code+value tokens, None for text. ids: int64 [V], a name of each sequence that is the same in every batch
    (equal ids hold equal tokens), so that latents of a frozen encoder can be kept; None where they have no names.
    """

    encoder: str
    tokens: Tensor
    offsets: Tensor
    values: Tensor | None = None
    has_value: Tensor | None = None
    days: Tensor | None = None
    ids: Tensor | None = None

    @property
    def rows(self) -> int:
        """How many latents the view yields."""
        return len(self.offsets) - 1


View = VolumeView | SequenceView


@dataclass
class Layout:
    """B sequences of S predictor slots.

    kind: int64 [B, S], index into the predictor's kinds; -1 = padding.
    source: int64 [B, S], row of the latent table that fills the slot; -1 = a query (mask token).
    hour: int64 [B, S]; a slot attends to slots of its own or an earlier hour.
    position: int64 [B, S], index of a learned position. time: float32 [B, S] (days), place: float32 [B, S, 3] (token
    grid places in 0..1), for continuous positions.
    target: int64 [B, S], row of the target table that the slot's output must match; -1 = none.
    feeds: int64 [B, S], slot that the output stands for in a rollout (the next state); -1 = none.
    start: int64 [B], slot where the training rollout begins; -1 = none.
    """

    kind: Tensor
    source: Tensor
    hour: Tensor
    position: Tensor
    time: Tensor
    place: Tensor
    target: Tensor
    feeds: Tensor
    start: Tensor

    @classmethod
    def empty(cls, batch: int, slots: int) -> "Layout":
        """All padding."""

        def minus(*shape: int) -> Tensor:
            return torch.full(shape, -1, dtype=torch.int64)

        def zero(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64)

        return cls(
            kind=minus(batch, slots),
            source=minus(batch, slots),
            hour=zero(batch, slots),
            position=zero(batch, slots),
            time=torch.zeros(batch, slots),
            place=torch.zeros(batch, slots, 3),
            target=minus(batch, slots),
            feeds=minus(batch, slots),
            start=minus(batch),
        )


@dataclass
class Batch:
    """One micro-batch. views: what the online encoders may see; targets: what the teacher sees (None: the same views,
    with the same table). subjects: int64 [B], for tests and audits, never for the model. worker: the process id that
    made the batch. notes: counts that the log shows, such as items skipped; the same names in every batch."""

    views: list[View]
    targets: list[View] | None
    layout: Layout
    subjects: Tensor
    worker: int = 0
    notes: dict[str, int] = field(default_factory=dict)

    def target_kinds(self, kinds: int) -> Tensor:
        """How many targets each slot kind has: int64 [kinds]."""
        layout = self.layout
        return torch.bincount(layout.kind[layout.target >= 0], minlength=kinds)

    def uses(self) -> Tensor:
        """How many slots each row of the latent table fills: int64 [R]."""
        source = self.layout.source
        return torch.bincount(source[source >= 0], minlength=sum(view.rows for view in self.views))

    def next_tokens(self) -> int:
        """How many next tokens its sequences ask for, a sequence counted once for every slot that it fills."""
        used, first, total = self.uses(), 0, 0
        for view in self.views:
            if isinstance(view, SequenceView):
                total += int(((view.offsets.diff() - 1) * used[first : first + view.rows]).sum())
            first += view.rows
        return total

    def rollouts(self) -> int:
        """How many sequences start a training rollout."""
        return int((self.layout.start >= 0).sum())


def to_device(item: Moved, device: torch.device) -> Moved:
    """The same dataclass (or list of them) with every tensor on ``device``."""
    return cast(Moved, _moved(item, device))


def _moved(item: object, device: torch.device) -> object:
    if isinstance(item, Tensor):
        return item.to(device, non_blocking=True)
    if isinstance(item, list):
        return [_moved(entry, device) for entry in item]
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return dataclasses.replace(
            item, **{f.name: _moved(getattr(item, f.name), device) for f in dataclasses.fields(item)}
        )
    return item
