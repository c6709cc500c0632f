"""The one predictor: slots in, latents out. It knows kinds, hours and places, not what they mean.

With three kinds, learned positions and no queries it is Clin-JEPA's predictor (arXiv 2605.10840): 4097 H + 75,732,992
parameters at width 1024, six layers. With queries and continuous positions it predicts across modalities.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmjepa.batch import Layout
from mmjepa.codes import PLACE_WIDTH, TIME_WIDTH, place_code, time_code


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """kinds: names of the slot kinds, each with its own input projection. latent: width in and out; outer: width inside.
    position: ``learned`` (an index, at most ``positions``) or ``continuous`` (time and place). queries: has a mask token
    for every kind. mode: ``absolute`` predicts the latent, ``residual`` its change. noise: standard deviation of
    Gaussian noise on the input latents in training, as a share of their own."""

    kinds: tuple[str, ...] = ("state", "action", "static")
    latent: int = 96
    width: int = 96
    depth: int = 2
    heads: int = 4
    ffn: int = 384
    position: Literal["learned", "continuous"] = "learned"
    positions: int = 149
    queries: bool = False
    mode: Literal["absolute", "residual"] = "absolute"
    dropout: float = 0.15
    attention_dropout: float = 0.1
    noise: float = 0.0

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("latent", "width", "depth", "heads", "ffn", "positions")}
        if min(sizes.values()) < 1:
            raise ValueError(f"every size must be at least 1, not {sizes}")
        if not (0 <= self.dropout < 1 and 0 <= self.attention_dropout < 1 and self.noise >= 0):
            raise ValueError("dropout and attention_dropout lie in [0, 1), noise is at least 0")
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")
        if self.queries and self.mode == "residual":
            raise ValueError("a query has no latent of its own to add a residual to; use mode=absolute")


@dataclass
class Slots:
    """A layout with its latents gathered. latent: float32 [B, S, D]; allow: bool [B, 1, S, S] attention mask."""

    latent: Tensor
    layout: Layout
    allow: Tensor


def gather_slots(table: Tensor, layout: Layout) -> Slots:
    """Fill slots from a latent table [R, D]; queries and padding hold zeros."""
    filled = layout.source >= 0
    latent = table[layout.source.clamp(min=0)] * filled[:, :, None]
    return Slots(latent=latent, layout=layout, allow=attention_mask(layout))


def attention_mask(layout: Layout) -> Tensor:
    """[B, 1, S, S]: slot i sees slot j iff j is real, not of a later hour, and not a query (but itself)."""
    real, query = layout.kind >= 0, (layout.kind >= 0) & (layout.source < 0)
    itself = torch.eye(layout.kind.shape[1], dtype=torch.bool, device=layout.kind.device)
    earlier = layout.hour[:, None, :] <= layout.hour[:, :, None]
    return ((earlier & real[:, None, :] & ~query[:, None, :]) | itself)[:, None]


class Block(nn.Module):
    """A pre-norm transformer block on fused attention."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.heads, self.attention_dropout = config.heads, config.attention_dropout
        self.norm_attention, self.norm_ffn = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.up, self.down = nn.Linear(config.width, config.ffn), nn.Linear(config.ffn, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, allow: Tensor) -> Tensor:
        """x: [B, S, W]; allow: bool [B, 1, S, S]."""
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        drop = self.attention_dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=allow, dropout_p=drop)
        x = x + self.dropout(self.out(seen.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(self.dropout(F.gelu(self.up(self.norm_ffn(x))))))


class Predictor(nn.Module):
    """Slots to predicted latents [B, S, D], one for every slot."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        self.inputs = nn.ModuleList(nn.Linear(config.latent, config.width) for _ in config.kinds)
        if config.position == "learned":
            self.position = nn.Embedding(config.positions, config.width)
        else:
            self.kind = nn.Embedding(len(config.kinds), config.width)
            self.continuous = nn.Linear(TIME_WIDTH + PLACE_WIDTH, config.width)
        if config.queries:
            self.query = nn.Parameter(torch.zeros(len(config.kinds), config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.output = nn.Linear(config.width, config.latent)
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
            elif name.startswith(("position", "output", "kind", "query")):
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.xavier_uniform_(parameter)

    def forward(self, slots: Slots) -> Tensor:
        """Predicted latents [B, S, D]; float32 throughout, whatever the autocast around it."""
        with torch.autocast(slots.latent.device.type, enabled=False):
            return self._predict(slots)

    def _predict(self, slots: Slots) -> Tensor:
        config, layout, latent = self.config, slots.layout, slots.latent.float()
        if self.training and config.noise:
            latent = latent + config.noise * latent.detach().std(dim=-1, keepdim=True) * torch.randn_like(latent)
        filled = (layout.source >= 0)[:, :, None]
        x = self._positions(layout)
        for index, project in enumerate(self.inputs):
            here = (layout.kind == index)[:, :, None]
            x = x + project(latent) * (here & filled)
            if config.queries:
                x = x + self.query[index] * (here & ~filled)
        for block in self.blocks:
            x = block(x, slots.allow)
        predicted = self.output(x)
        return predicted + latent if config.mode == "residual" else predicted

    def _positions(self, layout: Layout) -> Tensor:
        if self.config.position == "learned":
            return self.position(layout.position)
        code = torch.cat([time_code(layout.time), place_code(layout.place)], dim=-1)
        return self.kind(layout.kind.clamp(min=0)) + self.continuous(code)
