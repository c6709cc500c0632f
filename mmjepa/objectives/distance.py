"""Distances between predicted and target latents."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Distance = Literal["l1_sum", "l2_mean", "smooth_l1", "cosine"]


def latent_distance(predicted: Tensor, target: Tensor, kind: Distance) -> Tensor:
    """Distance of each row: [M] from [M, D] and [M, D], float32.

    ``l1_sum`` sums |difference| over features (Clin-JEPA, arXiv 2605.10840); ``l2_mean`` is the squared error divided by
    D (CT+EHR, arXiv 2509.15470); ``smooth_l1`` its Huber form, mean over features; ``cosine`` is 1 - cos.
    """
    predicted, target = predicted.float(), target.float()
    if kind == "l1_sum":
        return (predicted - target).abs().sum(dim=-1)
    if kind == "l2_mean":
        return (predicted - target).square().mean(dim=-1)
    if kind == "smooth_l1":
        return F.smooth_l1_loss(predicted, target, reduction="none").mean(dim=-1)
    return 1 - F.cosine_similarity(predicted, target, dim=-1)
