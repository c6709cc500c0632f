"""Latents, measurements and readouts."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit

from mmjepa.refusal import Refusal
from synthetic.presets import find_preset, find_site
from synthetic.world import MODALITIES, World

INTERNAL, EXTERNAL = find_site("li2025", "internal"), find_site("li2025", "external")


@pytest.fixture(scope="module")
def world():
    return World.named("li2025", 0)


def same(a, b):
    parts = [
        (a.z, b.z),
        (a.c, b.c),
        (a.y, b.y),
        *((getattr(a, k)[m], getattr(b, k)[m]) for k in ("theta", "t") for m in MODALITIES),
    ]
    return all(x.tobytes() == y.tobytes() for x, y in parts)


def cut(subjects, a, b):
    pick = {k: getattr(subjects, k)[a:b] for k in ("index", "z", "c", "eta", "y")}
    return replace(
        subjects, **pick, **{k: {m: getattr(subjects, k)[m][a:b] for m in MODALITIES} for k in ("theta", "t")}
    )


@pytest.mark.parametrize("site", [INTERNAL, EXTERNAL])
@pytest.mark.parametrize(("first", "count"), [(0, 1), (3, 7), (59, 41), (99, 1)])
def test_a_range_of_subjects_holds_the_bytes_of_the_whole(world, site, first, count):
    whole = world.sample(site, 0, 100)
    assert same(cut(whole, first, first + count), world.sample(site, first, count))


def test_neutral_knobs_give_the_bytes_of_the_internal_site(world):
    neutral = replace(EXTERNAL, rho=INTERNAL.rho, spec=1.0, code_shift=0.0)
    assert same(world.sample(neutral, 0, 50), world.sample(INTERNAL, 0, 50))


def test_sites_share_their_random_numbers(world):
    inside, outside = world.sample(INTERNAL, 0, 200), world.sample(EXTERNAL, 0, 200)
    unique = world.block["u_image"]
    np.testing.assert_allclose(outside.z[:, unique], 1.4 * inside.z[:, unique])
    shared = world.block["s"]
    assert (outside.z[:, shared] == inside.z[:, shared]).all()


def test_the_label_follows_its_log_odds_at_the_declared_prevalence(world):
    s = world.sample(INTERNAL, 0, 20_000)
    assert s.y.mean() == pytest.approx(0.417, abs=0.012)
    assert s.y.mean() == pytest.approx(expit(s.eta).mean(), abs=0.012)
    assert (s.c[s.y].mean(), s.c[~s.y].mean()) == pytest.approx((0.8, -0.8), abs=0.04)


def test_the_readout_has_unit_covariance_inside_and_lies_near_the_axes(world):
    s = world.sample(INTERNAL, 0, 20_000)
    assert {m: s.t[m].shape[1] for m in MODALITIES} == {"image": 15, "ehr": 19}
    for m in MODALITIES:
        np.testing.assert_allclose(np.cov(s.t[m].T), np.eye(s.t[m].shape[1]), atol=0.04)
        for j, name in enumerate(world.loaded(m)):
            block = name.rstrip("0123456789")
            latent = s.c if block == "c" else s.z[:, world.block[block]]
            assert np.corrcoef(s.t[m][:, j], latent[:, int(name[len(block) :]) - 1])[0, 1] > 0.4


def test_code_shift_moves_values_in_a_ring_among_the_hit_channels(world):
    source = world.channels(EXTERNAL)
    assert sorted(source) == list(range(128))
    assert (source != np.arange(128)).sum() == int(0.15 * 128)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(Refusal, match="internal, external"):
        find_site("li2025", "mars")
    with pytest.raises(Refusal, match="li2025"):
        find_preset("li2026")
