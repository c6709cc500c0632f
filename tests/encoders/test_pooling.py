"""Pooling a padded scan is pooling the scan: what the mask hides says nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjepa.encoders.pooling import AttentionPool, mean_pool, scan_pool

WIDTH = 8
SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def attention():
    torch.manual_seed(0)
    pool = AttentionPool(WIDTH, 2)
    torch.nn.init.normal_(pool.query)
    return pool


POOLS = {"mean": mean_pool, "attention": attention()}


def padded(sizes, seed, filling):
    """Tokens of scans of several sizes at random places among padding, and which are real."""
    rng = torch.Generator().manual_seed(seed)
    scans = [torch.randn(n, WIDTH, generator=rng) for n in sizes]
    tokens = torch.full((len(sizes), max(sizes) + 2, WIDTH), filling)
    valid = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    for row, scan in enumerate(scans):
        places = torch.randperm(tokens.shape[1], generator=rng)[: len(scan)]
        tokens[row, places], valid[row, places] = scan, True
    return scans, tokens, valid


@pytest.mark.parametrize("name", POOLS)
@given(sizes=SIZES, seed=st.integers(0, 99), filling=st.sampled_from([0.0, 1e6, float("nan"), float("inf")]))
@settings(max_examples=40, deadline=None)
def test_a_padded_scan_is_pooled_as_the_scan_alone_in_any_order(name, sizes, seed, filling):
    scans, tokens, valid = padded(sizes, seed, filling)
    pooled = POOLS[name](tokens, valid)
    alone = [POOLS[name](scan[None], torch.ones(1, len(scan), dtype=torch.bool))[0] for scan in scans]
    torch.testing.assert_close(pooled, torch.stack(alone), atol=1e-5, rtol=1e-5)


def test_the_mean_is_over_valid_tokens():
    tokens = torch.tensor([[[1.0], [5.0], [90.0]]])
    assert mean_pool(tokens, torch.tensor([[True, True, False]])).tolist() == [[3.0]]


def test_attention_weighs_tokens_by_what_they_say():
    tokens, valid = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(1)), torch.ones(1, 6).bool()
    pool = attention()
    linear = pool.out(pool.keys_values(pool.norm(tokens))[..., WIDTH:].mean(dim=1))  # with equal weights
    assert not torch.allclose(pool(tokens, valid), linear, atol=1e-3)


@pytest.mark.parametrize("name", POOLS)
def test_gradients_are_finite_and_none_reaches_a_hidden_token(name):
    _, tokens, valid = padded([3, 5], 0, float("nan"))
    tokens.requires_grad_()
    POOLS[name](tokens, valid).square().sum().backward()
    assert tokens.grad.isfinite().all()
    assert torch.equal(tokens.grad.any(dim=-1), valid)


def test_every_weight_of_the_attention_learns():
    pool = attention()
    _, tokens, valid = padded([3, 5], 0, 0.0)
    pool(tokens, valid).square().sum().backward()
    assert [name for name, p in pool.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", POOLS)
def test_a_scan_without_tokens_and_impossible_sizes_are_errors(name):
    with pytest.raises(ValueError, match="without valid tokens"):
        POOLS[name](torch.zeros(2, 3, WIDTH), torch.tensor([[True] * 3, [False] * 3]))
    with pytest.raises(ValueError, match="multiple of heads"):
        AttentionPool(7, 2)


@pytest.mark.parametrize("name", POOLS)
def test_without_a_mask_every_token_counts(name):
    tokens = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(POOLS[name](tokens), POOLS[name](tokens, torch.ones(3, 5).bool()))
    assert (scan_pool(name, WIDTH)(tokens)).shape == (3, WIDTH)
