"""The one autoregressive loop: the two-step training term, the 48 h evaluation and counterfactuals all run it."""

from dataclasses import replace

import torch
from torch import Tensor

from mmjepa.predictor import Predictor, Slots


def rollout(predictor: Predictor, slots: Slots, start: Tensor, horizon: int) -> Tensor:
    """Predict ``horizon`` states beyond each start slot, feeding every prediction back as the next state.

    slots: latents of all kinds; actions of future hours are read as they stand there (recorded, held or counterfactual:
    the caller decides), states after ``start`` are never read, because each is overwritten before its hour is reached.
    start: int64 [B], the slot of the last known state; -1 for rows that do not roll.
    Returns [B, horizon, D]; steps beyond a row's last state hold NaN. The gradient runs through the chain.
    """
    rows = torch.arange(len(start), device=start.device)
    alive, current, steps = start >= 0, start.clamp(min=0), []
    for step in range(horizon):
        out = predictor(slots)[rows, current]
        following = slots.layout.feeds[rows, current]
        alive = alive & (following >= 0)
        steps.append(torch.where(alive[:, None], out, torch.nan))
        current = torch.where(alive, following, current)
        if step + 1 < horizon:
            slots = _feed_back(slots, rows[alive], current[alive], out[alive])
    return torch.stack(steps, dim=1)


def _feed_back(slots: Slots, rows: Tensor, places: Tensor, states: Tensor) -> Slots:
    return replace(slots, latent=slots.latent.index_put((rows, places), states.to(slots.latent.dtype)))
