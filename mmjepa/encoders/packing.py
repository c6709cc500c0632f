"""Many sequences behind one another in one pass, none of them seeing another.

A language model's layers act on each token alone, but for attention. So the tokens of all sequences lie in one stream without
padding, and attention alone is computed sequence by sequence, those of similar length together: its cost is that of the
sequences (a block-diagonal mask over rows of many sequences costs the square of the row).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = "mmjepa_packed"
_SHORT, _FILL = 64, 0.75


@dataclass(frozen=True)
class Groups:
    """Sequences of a stream, grouped by length. places: int64 [n, W] a group, where in the stream its tokens are; past its end a
    sequence repeats its last token, which no earlier one sees. back: int64 [L], where each token of the stream is in the
    groups' tokens behind one another."""

    places: list[Tensor]
    back: Tensor


def group_sequences(lengths: Tensor, device: torch.device | None = None) -> Groups:
    """Group sequences of the given lengths [V], all at least 1, so that in a group of more than 64 wide each fills 3/4.

    lengths: on the CPU; device: where the places are needed.
    """
    starts = torch.cumsum(lengths, 0) - lengths
    order = torch.argsort(lengths, descending=True, stable=True)
    sizes = lengths[order]
    places, back = [], torch.empty(int(lengths.sum()), dtype=torch.int64)
    first = done = 0
    while first < len(sizes):
        width = int(sizes[first])
        stop = len(sizes) if width <= _SHORT else int((sizes >= min(_FILL * width, width)).sum())
        some = order[first:stop]
        column = torch.arange(width).expand(len(some), -1)
        place = starts[some, None] + torch.minimum(column, lengths[some, None] - 1)
        real = column < lengths[some, None]
        back[place[real]] = done + torch.nonzero(real.flatten())[:, 0]
        places.append(place.to(device))
        first, done = stop, done + place.numel()
    return Groups(places, back.to(device))


def register_attention() -> str:
    """Make ``ATTENTION`` known to transformers: without ``groups`` it is SDPA. Returns the name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    return ATTENTION


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    groups: Groups | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Causal attention [R, heads, C, D] -> [R, C, heads, D] inside each sequence; the rows together are the stream."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if groups is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    stream = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]
    made = []
    for places in groups.places:
        q, k, v = (states[places].transpose(1, 2) for states in stream)
        made.append(sdpa_attention_forward(module, q, k, v, None, **settings)[0].flatten(0, 1))
    out = torch.zeros_like(stream[0])
    out[: len(groups.back)] = torch.cat(made)[groups.back]
    return out.unflatten(0, (query.shape[0], query.shape[2])), None


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
