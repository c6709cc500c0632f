"""SIGReg: sketched isotropic Gaussian regularisation (LeJEPA, arXiv 2511.08544)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmjepa.objectives.reduce import gather_rows


@dataclass(frozen=True, kw_only=True)
class SIGRegConfig:
    """weight; slices: random directions; knots on [0, 3]. convention: ``per_sample`` (T/N) or ``paper`` (T, which grows
    with the number of rows, so its weight depends on the batch)."""

    weight: float = 0.05
    slices: int = 1024
    knots: int = 17
    convention: Literal["per_sample", "paper"] = "per_sample"


def sigreg(z: Tensor, config: SIGRegConfig, key: int) -> Tensor:
    """Epps-Pulley distance of random projections of z [N, D] to N(0, 1), over the rows of all ranks; scalar.

    T = N * sum_k w_k [(mean cos t_k u - phi_k)^2 + (mean sin t_k u)^2], phi = exp(-t^2/2), w = 2 dt phi (ends dt phi),
    mean over slices. key: seed of the directions, the same on all ranks of a step.
    Zero without rows.
    """
    z = gather_rows(z.float())
    if not len(z):
        return z.sum()
    with torch.autocast(z.device.type, enabled=False):  # statistics in float32, whatever the encoders ran in
        rng = torch.Generator().manual_seed(key)
        directions = torch.randn(z.shape[1], config.slices, generator=rng).to(z.device)
        directions = directions / directions.norm(dim=0)
        t = torch.linspace(0.0, 3.0, config.knots, device=z.device)
        phi = torch.exp(-t.square() / 2)
        weight = 2 * (t[1] - t[0]) * phi
        weight[[0, -1]] /= 2
        angle = (z @ directions)[:, :, None] * t
        gap = (angle.cos().mean(dim=0) - phi).square() + angle.sin().mean(dim=0).square()
        statistic = (gap @ weight).mean()
    return statistic * len(z) if config.convention == "paper" else statistic
