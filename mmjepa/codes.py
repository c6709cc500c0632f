"""Codes of continuous quantities: times and places as sines and cosines."""

import torch
from torch import Tensor

TIME_WIDTH = 32
PLACE_WIDTH = 24


def time_code(days: Tensor) -> Tensor:
    """[..., 32] for times [...]: log(1 + |days|), signed, at 16 log-spaced frequencies."""
    frequencies = torch.exp(torch.linspace(-2.0, 1.0, TIME_WIDTH // 2, device=days.device))
    angle = (days.sign() * torch.log1p(days.abs()))[..., None] * frequencies
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def place_code(place: Tensor) -> Tensor:
    """[..., 24] for places [..., 3] in 0..1: four octaves an axis."""
    octaves = torch.pi * 2.0 ** torch.arange(PLACE_WIDTH // 6, device=place.device)
    angle = (place[..., None] * octaves).flatten(-2)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
