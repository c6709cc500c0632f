"""VICReg's terms against a reference written out entry by entry, and the conventions that its weights hang on."""

import math

import pytest
import torch

from mmjepa.objectives.vicreg import VICRegConfig, covariance_term, variance_term, vicreg


def reference(z, *, two_sided, convention):
    n, width = z.shape
    mean = [sum(z[i, j] for i in range(n)) / n for j in range(width)]

    def cov(a, b):
        return sum((z[i, a] - mean[a]) * (z[i, b] - mean[b]) for i in range(n)) / (n - 1)

    spread = [math.sqrt(cov(j, j) + 1e-4) for j in range(width)]
    variance = sum((s - 1) ** 2 if two_sided else max(0.0, 1 - s) for s in spread) / width
    off = sum(cov(a, b) ** 2 for a in range(width) for b in range(width) if a != b)
    return variance, off / width if convention == "paper" else off / (width * (width - 1))


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("convention", ["paper", "mean"])
def test_both_terms_equal_the_written_out_reference(two_sided, convention):
    z = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)) * 0.7 + 3
    variance, covariance = reference(z.double(), two_sided=two_sided, convention=convention)
    config = VICRegConfig(variance=2.0, covariance=0.3, two_sided=two_sided, convention=convention)
    assert float(variance_term(z, two_sided=two_sided)) == pytest.approx(float(variance), rel=1e-5)
    assert float(covariance_term(z, convention=convention)) == pytest.approx(float(covariance), rel=1e-5)
    assert float(vicreg(z, config)) == pytest.approx(float(2 * variance + 0.3 * covariance), rel=1e-5)


def test_the_paper_convention_is_width_minus_one_times_the_mean():
    z = torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(covariance_term(z), 6 * covariance_term(z, convention="mean"))


def slope(s, *, two_sided, width=256):
    """d loss / d scale at Z = s * N(0, I)."""
    noise = torch.randn(256, width, generator=torch.Generator().manual_seed(2))
    scale = torch.tensor(float(s), requires_grad=True)
    variance_term(scale * noise, two_sided=two_sided).backward()
    return float(scale.grad)


@pytest.mark.parametrize(("s", "hinge", "both"), [(1, -0.51, -0.01), (0.1, -0.99, -1.78), (0.01, -0.70, -1.38)])
def test_the_pull_out_of_collapse_has_the_known_slope(s, hinge, both):
    assert slope(s, two_sided=False) == pytest.approx(hinge, abs=0.06)
    assert slope(s, two_sided=True) == pytest.approx(both, abs=0.06)


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_give_zero_and_keep_the_graph(rows):
    z = torch.randn(rows, 3, requires_grad=True)
    loss = vicreg(z, VICRegConfig())
    loss.backward()
    assert float(loss) == 0
    assert z.grad is not None
    assert not z.grad.any()


@pytest.mark.parametrize("config", [VICRegConfig(), VICRegConfig(two_sided=True, convention="mean")])
def test_autocast_does_not_lower_the_precision(config):
    z = torch.randn(64, 16, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16):
        inside = vicreg(z, config)
    assert torch.equal(inside, vicreg(z, config))
