"""From the tokens of a scan to one latent. Where scans hold different numbers of tokens, a mask says which are real."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pool = Literal["mean", "attention"]


def scan_pool(pool: Pool, width: int) -> Callable[[Tensor], Tensor]:
    """What makes one latent [B, width] of the tokens [B, N, width] of a scan: their mean, or attention with one head,
    whose weights learn wherever the latent of a whole scan is read."""
    return AttentionPool(width, heads=1) if pool == "attention" else mean_pool


def mean_pool(tokens: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean [B, D] over the valid tokens of each scan.

    tokens: [B, N, D]. valid: bool [B, N], None for all. Raises ValueError for a scan without a valid token.
    """
    if valid is None:
        return tokens.mean(dim=1)
    return _valid_only(tokens, valid).sum(dim=1) / valid.sum(dim=1, keepdim=True)


class AttentionPool(nn.Module):
    """One learned query that attends to the valid tokens of a scan (arXiv 1810.00825, pooling by attention)."""

    def __init__(self, width: int, heads: int) -> None:
        """width: of tokens and output, a multiple of ``heads``."""
        super().__init__()
        if min(width, heads) < 1 or width % heads:
            raise ValueError(f"width={width} must be a positive multiple of heads={heads}")
        self.heads = heads
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.norm = nn.LayerNorm(width)
        self.keys_values = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """Pooled [B, D] of tokens [B, N, D]; valid: bool [B, N], None for all. Raises ValueError for a scan without a
        valid token."""
        inputs = self.norm(tokens if valid is None else _valid_only(tokens, valid))
        keys, values = self.keys_values(inputs).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query = self.query.expand(len(tokens), -1, -1).unflatten(-1, (self.heads, -1)).transpose(1, 2).to(keys.dtype)
        allow = None if valid is None else valid[:, None, None, :]
        seen = F.scaled_dot_product_attention(query, keys, values, attn_mask=allow)
        return self.out(seen.flatten(1))


def _valid_only(tokens: Tensor, valid: Tensor) -> Tensor:
    """Tokens with zeros, whatever was there (NaN included), where they are not valid."""
    if not bool(valid.any(dim=1).all()):
        raise ValueError("a scan without valid tokens cannot be pooled")
    return tokens.where(valid[:, :, None], 0.0)
