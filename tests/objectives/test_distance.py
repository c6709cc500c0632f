"""Distances have the closed forms that their names promise, in float32."""

import pytest
import torch

from mmjepa.objectives.distance import latent_distance
from mmjepa.objectives.next_token import next_token

X = torch.tensor([[1.0, 2.0, -2.0], [0.0, 0.5, 3.0]])
Y = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("l1_sum", [4.0, 3.5]),
        ("l2_mean", [8 / 3, 9.25 / 3]),
        ("smooth_l1", [(1.5 + 1.5) / 3, (0.125 + 2.5) / 3]),
    ],
)
def test_each_distance_has_its_closed_form(kind, expected):
    torch.testing.assert_close(latent_distance(X, Y, kind), torch.tensor(expected))


def test_cosine_is_zero_for_one_direction_and_two_for_the_opposite():
    torch.testing.assert_close(latent_distance(X, 3 * X, "cosine"), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(latent_distance(X, -X, "cosine"), torch.full((2,), 2.0))


@pytest.mark.parametrize("kind", ["l1_sum", "l2_mean", "smooth_l1", "cosine"])
def test_half_precision_is_measured_in_float32(kind):
    got = latent_distance(X.bfloat16(), Y.bfloat16(), kind)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, latent_distance(X, Y, kind))


def test_next_token_is_the_negative_log_probability():
    logits = torch.tensor([[0.0, 0.0], [2.0, -1.0]])
    expected = torch.tensor([2.0, 1 + torch.tensor(-3.0).exp()]).log()
    torch.testing.assert_close(next_token(logits, torch.tensor([1, 0])), expected)
