"""The one collective of the objectives: rows of all ranks, with a gradient that is exact after DDP averages it."""

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:  # type: ignore[override]
        sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
        counts = [int(size) for size in sizes]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        rank = dist.get_rank()
        ctx.start, ctx.stop = sum(counts[:rank]), sum(counts[: rank + 1])  # type: ignore[attr-defined]
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may still need what it handed in
        dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.stop]  # type: ignore[attr-defined]


def gather_rows(rows: Tensor) -> Tensor:
    """Rows [n, D] of every rank behind one another, [sum n, D]; the rows themselves where there is one rank.

    The backward sums over ranks: every rank computes the same loss from the gathered rows, so each row receives W times
    its gradient, and DDP's mean over W ranks restores it. A forward-only gather would leave it W times too small.
    """
    return _Gather.apply(rows) if dist.is_initialized() and dist.get_world_size() > 1 else rows  # type: ignore[return-value]
