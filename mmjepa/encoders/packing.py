"""Several sequences in one row, none of them seeing another."""

import torch
from torch import Tensor


def pack_rows(lengths: Tensor, row_length: int) -> tuple[Tensor, Tensor, int]:
    """Place sequences of the given lengths [V] into rows, longest first, each in the first row that has room.

    Returns the row [V] and the column [V] of each sequence's first token, and the number of rows. A sequence longer than
    ``row_length`` gets a row of its own, and rows are as wide as the fullest one. Deterministic.
    """
    rows, columns = torch.empty_like(lengths), torch.empty_like(lengths)
    sizes = lengths.tolist()
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    used: list[int] = []
    first_open = 0
    for i in order:
        for row in range(first_open, len(used)):
            if used[row] + sizes[i] <= row_length:
                break
        else:
            used.append(0)
            row = len(used) - 1
        rows[i], columns[i] = row, used[row]
        used[row] += sizes[i]
        while first_open < len(used) and used[first_open] >= row_length:
            first_open += 1
    return rows, columns, len(used)


def token_places(lengths: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For every token of the flat sequences: its sequence, its position there, its row and its column. int64 [L] each."""
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    starts = torch.cumsum(lengths, 0) - lengths
    position = torch.arange(len(sequence), device=lengths.device) - starts[sequence]
    return sequence, position, rows[sequence], columns[sequence] + position


def block_causal_mask(segment: Tensor) -> Tensor:
    """Boolean attention mask [R, 1, W, W]: a token sees itself and what precedes it in its own segment.

    segment: int64 [R, W]; unused columns hold -1 and see only themselves, so that no row of the softmax is empty.
    """
    same = segment[:, :, None] == segment[:, None, :]
    causal = torch.ones(segment.shape[1], segment.shape[1], dtype=torch.bool, device=segment.device).tril()
    return (same & causal)[:, None]
