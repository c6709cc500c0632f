"""Sparse concepts: their rates, what drives them, and the channels that superpose them."""

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from synthetic import concepts
from synthetic.presets import find_site
from synthetic.world import World

INTERNAL = find_site("li2025", "internal")
N = 20_000


@pytest.fixture(scope="module")
def readouts():
    return World.named("li2025", 0).sample(INTERNAL, 0, N).t


@pytest.fixture(scope="module")
def drawn(readouts):
    return concepts.draw(readouts, 0, 0)


def test_rates_fall_from_a_tenth_to_a_two_hundredth():
    assert concepts.RATE[0] == pytest.approx(0.10)
    assert concepts.RATE[-1] == pytest.approx(0.005, abs=2e-5)
    assert (np.diff(concepts.RATE) < 0).all()


@pytest.mark.parametrize(("modality", "own", "half"), [("ehr", range(0, 40), 20), ("image", range(40, 52), 6)])
def test_half_of_a_modalitys_concepts_follow_one_coordinate_of_its_readout(readouts, modality, own, half):
    g = concepts.loadings(0, modality, readouts[modality].shape[1])
    assert set(np.abs(g[g != 0])) == {0.8}
    assert np.array_equal(np.unique(np.argwhere(g)[:, 0]), np.argwhere(g)[:, 0])
    assert (g != 0).sum() == half
    assert set(np.argwhere(g)[:, 0]) <= set(own)


def test_frequencies_are_those_of_the_logistic_law(readouts, drawn):
    odds = np.broadcast_to(logit(concepts.RATE), (N, 64)).copy()
    for modality in readouts:
        odds += readouts[modality] @ concepts.loadings(0, modality, readouts[modality].shape[1]).T
    expected = expit(odds).mean(0)
    error = np.sqrt(expected * (1 - expected) / N)
    assert (np.abs(drawn.mean(0) - expected) < 4.5 * error).all()
    np.testing.assert_allclose(expected[52:], concepts.RATE[52:])


def test_the_strength_is_recovered_by_logistic_regression(readouts, drawn):
    g = concepts.loadings(0, "ehr", readouts["ehr"].shape[1])
    j, k = np.argwhere(g)[0]
    fit = LogisticRegression(C=1e6).fit(readouts["ehr"][:, [k]], drawn[:, j])
    assert fit.coef_[0, 0] == pytest.approx(g[j, k], abs=0.15)


def test_a_modalitys_readout_moves_its_own_concepts_alone(readouts, drawn):
    for modality, own in (("ehr", concepts.EHR_ONLY), ("image", concepts.IMAGE_ONLY)):
        moved = (concepts.draw(readouts | {modality: readouts[modality] + 2}, 0, 0) != drawn).any(0)
        assert moved[own].any()
        assert not np.delete(moved, own).any()


def test_any_range_holds_the_bytes_of_the_whole(readouts, drawn):
    part = {m: t[7:40] for m, t in readouts.items()}
    np.testing.assert_array_equal(concepts.draw(part, 0, 7), drawn[7:40])
    whole = concepts.channels(drawn[:50], 0, 0)
    assert concepts.channels(drawn[7:40], 0, 7).tobytes() == whole[7:40].tobytes()


def test_channels_superpose_unit_directions_scaled_by_half_normal_magnitudes(drawn):
    x = concepts.channels(drawn, 0, 0)
    assert x.shape == (N, 32)
    assert x[~drawn.any(1)].std() == pytest.approx(0.05, abs=0.001)
    length = np.linalg.norm(np.linalg.lstsq(drawn.astype(float), x, rcond=None)[0], axis=1)
    np.testing.assert_allclose(length, 1 + 0.3 * np.sqrt(2 / np.pi), atol=0.06)
    alone = (drawn.sum(1) == 1) & drawn[:, 0]
    magnitude = np.linalg.norm(x[alone], axis=1)
    assert magnitude.std() == pytest.approx(0.3 * np.sqrt(1 - 2 / np.pi), abs=0.03)
    assert magnitude.min() > 0.8
