"""How targets are made: by the online weights, by a slow average of them, or by weights that stand still.

The average is a set of float32 shadows, kept outside every module and optimiser and swapped in for one call. In bfloat16
a shadow at tau >= 0.996 would not move.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

TeacherKind = Literal["online", "ema", "frozen"]


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """kind: ``online`` (stop-gradient), ``ema`` (tau, moving to tau_end along a cosine) or ``frozen`` (the shadows as
    they are; copies of the online weights if there are none yet)."""

    kind: TeacherKind = "online"
    tau: float = 0.996
    tau_end: float | None = None

    def __post_init__(self) -> None:
        for value in (self.tau, self.tau if self.tau_end is None else self.tau_end):
            if not 0 <= value <= 1:
                raise ValueError(f"tau={value} must lie in [0, 1]")

    def tau_at(self, progress: float) -> float:
        """tau after a share ``progress`` (0..1) of the phase."""
        end = self.tau if self.tau_end is None else self.tau_end
        return end - (end - self.tau) * (math.cos(math.pi * progress) + 1) / 2


class Teacher:
    """Shadows of some encoder parameters. Not a module: nothing here is ever trained, wrapped or moved by accident."""

    def __init__(self) -> None:
        self.kind: TeacherKind = "online"
        self.shadows: dict[str, Tensor] = {}

    def begin(self, config: TeacherConfig, online: Mapping[str, nn.Parameter]) -> None:
        """Enter a phase. ``online``: the parameters that an average follows; copied at the first ``ema`` or ``frozen``
        phase, kept from then on."""
        self.kind = config.kind
        if config.kind != "online":
            for name, parameter in online.items():
                if name not in self.shadows:
                    self.shadows[name] = parameter.detach().to(torch.float32, copy=True)

    @torch.no_grad()
    def update(self, online: Mapping[str, nn.Parameter], tau: float) -> None:
        """shadow <- tau * shadow + (1 - tau) * online. Once an optimiser step."""
        names = list(self.shadows)
        if names:
            fresh = [online[name].detach().float() for name in names]
            torch._foreach_lerp_([self.shadows[name] for name in names], fresh, 1 - tau)

    @torch.no_grad()
    def sync(self, online: Mapping[str, nn.Parameter]) -> None:
        """Hard synchronisation: every shadow becomes the online weight."""
        for name, shadow in self.shadows.items():
            shadow.copy_(online[name])

    @torch.no_grad()
    def gap(self, online: Mapping[str, nn.Parameter]) -> Tensor:
        """Largest |online - shadow| over all shadowed entries; 0 without shadows."""
        gaps = [(online[name].float() - shadow).abs().max() for name, shadow in self.shadows.items()]
        return torch.stack(gaps).max() if gaps else torch.zeros(())

    @torch.no_grad()
    def encode(self, encoders: nn.ModuleDict, name: str, view: object) -> Tensor:
        """Latents of one view under the teacher's weights, without gradient, dropout off."""
        encoder = encoders[name]
        prefix = f"{name}."
        swapped = {key[len(prefix) :]: shadow for key, shadow in self.shadows.items() if key.startswith(prefix)}
        with _evaluating(encoder):
            if self.kind == "online" or not swapped:
                return encoder(view)
            return functional_call(encoder, swapped, (view,), tie_weights=True)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
