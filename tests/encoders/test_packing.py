"""Packing loses no token, mixes no sequences, and lets nothing look ahead."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjepa.encoders.packing import block_causal_mask, pack_rows, token_places


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(8, 32))
@settings(max_examples=60, deadline=None)
def test_every_token_has_a_place_of_its_own_and_rows_keep_their_length(sizes, room):
    lengths = torch.tensor(sizes)
    rows, columns, count = pack_rows(lengths, room)
    sequence, position, row, column = token_places(lengths, rows, columns)
    assert len(set(zip(row.tolist(), column.tolist(), strict=True))) == int(lengths.sum())
    assert sequence.tolist() == [i for i, n in enumerate(sizes) for _ in range(n)]
    assert position.tolist() == [p for n in sizes for p in range(n)]
    assert int(row.max()) + 1 == count
    for one in range(count):
        inside = lengths[rows == one]
        assert int(inside.sum()) <= room or len(inside) == 1


def test_packing_wastes_at_most_half_of_the_rows():
    lengths = torch.randint(1, 60, (400,), generator=torch.Generator().manual_seed(0))
    _, _, count = pack_rows(lengths, 64)
    assert count * 64 < 2 * int(lengths.sum())


def test_the_mask_shows_a_token_itself_and_what_precedes_it_in_its_own_sequence():
    segment = torch.tensor([[3, 3, 5, -1], [7, 7, 7, 7]])
    expected = torch.zeros(2, 4, 4, dtype=torch.bool)
    for row in range(2):
        for i in range(4):
            for j in range(4):
                expected[row, i, j] = j <= i and segment[row, i] == segment[row, j]
    assert torch.equal(block_causal_mask(segment)[:, 0], expected)
