"""Packing loses no token, pads little, and attention stays inside each sequence and behind each token."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from mmjepa.encoders.packing import _attend, group_sequences


@given(st.lists(st.integers(1, 300), min_size=1, max_size=30))
@settings(max_examples=25, deadline=None)
def test_every_token_has_a_place_in_one_group_among_its_own_sequence(sizes):
    lengths = torch.tensor(sizes)
    groups = group_sequences(lengths)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), lengths)
    flat = torch.cat([places.flatten() for places in groups.places])
    assert torch.equal(flat[groups.back], torch.arange(int(lengths.sum())))
    assert sum(len(places) for places in groups.places) == len(sizes)
    for places in groups.places:
        assert (owner[places] == owner[places[:, :1]]).all()
        assert (places.diff(dim=1) >= 0).all()


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60))
@settings(max_examples=25, deadline=None)
def test_in_a_wide_group_every_sequence_fills_three_quarters_and_groups_are_few(sizes):
    groups = group_sequences(torch.tensor(sizes))
    for places in groups.places:
        width = places.shape[1]
        own = (places.diff(dim=1) > 0).sum(1) + 1
        assert int(own.max()) == width
        assert width <= 64 or int(own.min()) >= 0.75 * width
    assert len(groups.places) <= 16


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_attention_over_the_stream_is_that_of_each_sequence_alone(sizes, row):
    """Whatever the length of the rows that the stream is folded into."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    module = Qwen3Attention(Qwen3Config(hidden_size=16, num_hidden_layers=1, **heads), 0)
    lengths = torch.tensor(sizes)
    count = int(lengths.sum())
    rows = -(-count // row)
    query, key, value = (torch.randn(rows, n, row, 4) for n in (4, 2, 2))
    out, _ = _attend(module, query, key, value, None, groups=group_sequences(lengths), scaling=0.5)
    assert out.shape == (rows, row, 4, 4)
    stream = out.flatten(0, 1)
    assert (stream[count:] == 0).all()
    for start, size in zip((lengths.cumsum(0) - lengths).tolist(), sizes, strict=True):
        q, k, v = (x.transpose(1, 2).flatten(0, 1)[start : start + size] for x in (query, key, value))
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * 0.5
        scores = scores.masked_fill(torch.ones(size, size, dtype=torch.bool).triu(1), -torch.inf)
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        torch.testing.assert_close(stream[start : start + size], expected, atol=1e-5, rtol=0)
