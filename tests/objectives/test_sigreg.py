"""SIGReg against an inlined reference, and the convention that decides what its weight means."""

import math

import pytest
import torch

from mmjepa.objectives.sigreg import SIGRegConfig, sigreg


def reference(z, config, key):
    """T of the paper, slice by slice and knot by knot."""
    directions = torch.randn(z.shape[1], config.slices, generator=torch.Generator().manual_seed(key))
    total, dt = 0.0, 3.0 / (config.knots - 1)
    for a in range(config.slices):
        u = z.double() @ (directions[:, a].double() / directions[:, a].double().norm())
        for k in range(config.knots):
            t = k * dt
            phi = math.exp(-t * t / 2)
            weight = (1 if k in (0, config.knots - 1) else 2) * dt * phi
            gap = (float((t * u).cos().mean()) - phi) ** 2 + float((t * u).sin().mean()) ** 2
            total += weight * gap
    return len(z) * total / config.slices


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_both_conventions_equal_the_reference(rows):
    z = 1.4 * torch.randn(rows, 6, generator=torch.Generator().manual_seed(0)) + 0.2
    paper = SIGRegConfig(slices=24, convention="paper")
    expected = reference(z, paper, 11)
    assert float(sigreg(z, paper, 11)) == pytest.approx(expected, rel=1e-4)
    assert float(sigreg(z, SIGRegConfig(slices=24), 11)) == pytest.approx(expected / rows, rel=1e-4)


def test_full_collapse_reads_the_known_constant():
    assert float(sigreg(torch.zeros(256, 8), SIGRegConfig(slices=8), 0)) == pytest.approx(0.402, abs=1e-3)
    assert float(sigreg(torch.zeros(256, 8), SIGRegConfig(slices=8, convention="paper"), 0)) == pytest.approx(
        102.9, abs=0.2
    )


@pytest.mark.parametrize(("s", "expected"), [(2, 0.31), (1, 0.0), (0.3, -0.65), (0.1, -0.29), (0.01, -0.031)])
def test_the_pull_out_of_collapse_has_the_known_slope(s, expected):
    noise = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor(float(s), requires_grad=True)
    sigreg(scale * noise, SIGRegConfig(slices=256), 2).backward()
    assert float(scale.grad) == pytest.approx(expected, abs=max(0.03 * abs(expected), 0.01))


def test_the_key_alone_decides_the_directions():
    z, config = torch.randn(20, 5), SIGRegConfig(slices=16)
    one = sigreg(z, config, 1)
    torch.randn(3)
    assert torch.equal(one, sigreg(z, config, 1))
    assert not torch.equal(one, sigreg(z, config, 2))


def test_no_rows_give_zero_and_keep_the_graph():
    z = torch.randn(0, 4, requires_grad=True)
    loss = sigreg(z, SIGRegConfig(), 0)
    loss.backward()
    assert float(loss) == 0
    assert z.grad is not None


def test_autocast_does_not_lower_the_precision():
    z, config = torch.randn(64, 16, generator=torch.Generator().manual_seed(3)), SIGRegConfig(slices=64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = sigreg(z, config, 4)
    assert torch.equal(inside, sigreg(z, config, 4))
