"""One AdamW over all parts, each with its own learning rate; a part that stands still gets no update at all."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmjepa.refusal import Refusal


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """lr: peak learning rate by part (``ehr.adapter``) or encoder (``ehr``); ``default`` for the rest. warmup: share of
    the steps. floor: last rate as a share of the peak. clip: gradient norm, per encoder and for the predictor. Weight
    decay acts on matrices alone."""

    lr: dict[str, float] = field(default_factory=lambda: {"default": 5e-4})
    weight_decay: float = 0.04
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.1
    floor: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not all(0 <= rate < float("inf") for rate in self.lr.values()):
            raise ValueError(f"lr={self.lr} holds a rate that is negative or no number")
        if not (0 <= self.warmup <= 1 and 0 <= self.floor <= 1 and self.weight_decay >= 0 and self.clip > 0):
            raise ValueError("warmup and floor lie in [0, 1], weight_decay is at least 0, clip above 0")

    def rate_of(self, part: str) -> float:
        """Peak learning rate of a part: its own, its encoder's, or the default."""
        for name in (part, part.split(".")[0], "default"):
            if name in self.lr:
                return self.lr[name]
        raise Refusal(
            "CONFIG_VALUE", f"optim.lr has no rate for the part '{part}'", f"Add optim.lr.{part} or optim.lr.default"
        )


def make_optimizer(parts: Mapping[str, Mapping[str, nn.Parameter]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with two groups a part (with and without weight decay); every parameter is in exactly one."""
    groups = []
    for part, parameters in parts.items():
        for decays in (True, False):
            chosen = [p for p in parameters.values() if (p.ndim >= 2) == decays]
            if chosen:
                decay = config.weight_decay if decays else 0.0
                groups.append({"params": chosen, "lr": 0.0, "peak": config.rate_of(part), "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=config.betas)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate = its peak times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def clip_gradients(parts: Mapping[str, Mapping[str, nn.Parameter]], clip: float) -> dict[str, Tensor]:
    """Clip the gradient norm of each encoder and of the predictor apart; returns the norms before clipping."""
    groups: dict[str, list[nn.Parameter]] = {}
    for part, parameters in parts.items():
        groups.setdefault(part.split(".")[0], []).extend(p for p in parameters.values() if p.grad is not None)
    return {name: nn.utils.clip_grad_norm_(chosen, clip) for name, chosen in groups.items() if chosen}


def moments(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """Adam's state as flat tensors named by parameter. names: id of a parameter -> its name."""
    flat = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            flat[f"{names[id(parameter)]}|{key}"] = value
    return flat


def restore_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], flat: Mapping[str, Tensor]
) -> None:
    """The inverse of ``moments``; the tensors must be on the CPU."""
    optimizer.state.clear()
    for name, value in flat.items():
        parameter, key = name.rsplit("|", 1)
        place = torch.device("cpu") if key == "step" else parameters[parameter].device
        optimizer.state[parameters[parameter]][key] = value.to(place, copy=True)
