"""Variance and covariance terms of VICReg (arXiv 2105.04906), and their two-sided form."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmjepa.objectives.reduce import gather_rows


@dataclass(frozen=True, kw_only=True)
class VICRegConfig:
    """variance, covariance: weights. two_sided: (s - 1)^2 instead of the hinge. convention: ``paper`` divides the sum of
    squared covariances by D; ``mean`` takes their mean over off-diagonal entries, (D - 1) times weaker."""

    variance: float = 1.0
    covariance: float = 0.04
    two_sided: bool = False
    convention: Literal["paper", "mean"] = "paper"


def variance_term(z: Tensor, *, two_sided: bool = False, floor: float = 1.0, eps: float = 1e-4) -> Tensor:
    """Mean over D of max(0, floor - s), or of (s - floor)^2, with s = sqrt(var + eps), unbiased. z: [N, D]; scalar."""
    spread = torch.sqrt(z.float().var(dim=0) + eps)
    return (spread - floor).square().mean() if two_sided else torch.relu(floor - spread).mean()


def covariance_term(z: Tensor, *, convention: Literal["paper", "mean"] = "paper") -> Tensor:
    """Squared off-diagonal covariances (with N - 1): their sum over D, or their mean. z: [N, D]; scalar."""
    z = z.float()
    n, width = z.shape
    centred = z - z.mean(dim=0)
    covariance = centred.T @ centred / (n - 1)
    total = covariance.square().sum() - covariance.diagonal().square().sum()
    return total / width if convention == "paper" else total / (width * (width - 1))


def vicreg(z: Tensor, config: VICRegConfig) -> Tensor:
    """Weighted variance and covariance terms over the rows of all ranks. Zero when there are fewer than two rows."""
    z = gather_rows(z)
    if len(z) < 2:
        return z.sum() * 0.0
    with torch.autocast(z.device.type, enabled=False):  # statistics in float32, whatever the encoders ran in
        variance = variance_term(z, two_sided=config.two_sided)
        return config.variance * variance + config.covariance * covariance_term(z, convention=config.convention)
