"""The oracles are exact."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from synthetic import oracle
from synthetic.presets import Preset, Site, find_site
from synthetic.world import World

INTERNAL, EXTERNAL = find_site("li2025", "internal"), find_site("li2025", "external")
# measured over eight seeds, image / ehr / both; standard deviations .015 / .004 / .004
PUBLISHED = {
    "internal": {
        "env_bayes": (0.811, 0.918, 0.943),
        "source_bayes": (0.811, 0.918, 0.943),
        "c_blind": (0.773, 0.813, 0.877),
    },
    "external": {
        "env_bayes": (0.812, 0.787, 0.895),
        "source_bayes": (0.779, 0.685, 0.826),
        "c_blind": (0.812, 0.787, 0.895),
    },
}


@pytest.mark.parametrize("site", ["internal", "external"])
def test_oracles_score_as_specified(site):
    rows = [oracle.table("li2025", site, 4000, seed) for seed in range(8)]
    for name, expected in PUBLISHED[site].items():
        for view, value, tolerance in zip(("image", "ehr", "both"), expected, (0.015, 0.01, 0.01), strict=True):
            assert np.mean([row[f"{name}_{view}"] for row in rows]) == pytest.approx(value, abs=tolerance), (name, view)


@pytest.mark.parametrize("view", ["image", "ehr", "both"])
@pytest.mark.parametrize("rho", [0.0, 0.7])
def test_log_odds_equal_brute_force_monte_carlo_on_a_reduced_world(view, rho):
    small = {f"a_{block}_{m}": 0.2 for block in "suc" for m in ("image", "ehr")}
    preset = Preset(d_image=7, d_ehr=8, k_b=1, k_n_image=1, k_n_ehr=1, a_b=0.2, a_n=0.2, w_b=0.3, **small)
    site = Site(name="small", rho=rho, spec=1.3, code_shift=0.7, offset=0)
    world = World(preset, site, 5)
    subjects = world.sample(site, 0, 6)
    exact = oracle.env_bayes(world, site, subjects, view)
    draw = np.random.default_rng(0)
    z = draw.standard_normal((400_000, world.p)) * np.sqrt(world.law(site).variance)
    risk = expit(preset.bias + z @ world.w)
    pathway = draw.standard_normal((len(z), 1))
    rows = {"image": slice(None), "ehr": world.channels(site)}
    A = np.concatenate([world.A[m][rows[m]] for m in oracle.VIEWS[view]])
    B = np.concatenate([world.B[m][rows[m]] for m in oracle.VIEWS[view]])
    for theta, score in zip(subjects.theta_of(oracle.VIEWS[view]), exact, strict=True):
        density = [
            (p * np.exp(-0.5 * ((theta - z @ A.T - (pathway + sign * rho) @ B.T) ** 2).sum(1))).mean()
            for sign, p in ((1, risk), (-1, 1 - risk))
        ]
        assert score == pytest.approx(np.log(density[0] / density[1]), abs=0.05)


def test_env_bayes_is_calibrated_and_code_shift_costs_it_nothing():
    world = World.named("li2025", 1)
    subjects = world.sample(EXTERNAL, 0, 8000)
    score = oracle.env_bayes(world, EXTERNAL, subjects, "both")
    fit = LogisticRegression(C=1e6).fit(score[:, None], subjects.y)
    assert fit.coef_[0, 0] == pytest.approx(1, abs=0.1)
    assert fit.intercept_[0] == pytest.approx(0, abs=0.1)
    unshifted = replace(EXTERNAL, code_shift=0.0)
    plain = oracle.env_bayes(world, unshifted, world.sample(unshifted, 0, 8000), "both")
    np.testing.assert_allclose(plain, score, atol=1e-8)


def test_a_model_with_many_labels_nears_env_bayes_and_does_not_pass_it():
    world = World.named("li2025", 2)
    subjects = world.sample(INTERNAL, 0, 12_000)
    train, test = np.arange(12_000) < 8000, np.arange(12_000) >= 8000
    for view in ("image", "ehr"):
        t = subjects.t[view]
        model = LogisticRegression().fit(t[train], subjects.y[train])
        found = oracle.auc(subjects.y[test], model.decision_function(t[test]))
        best = oracle.auc(subjects.y[test], oracle.env_bayes(world, INTERNAL, subjects, view)[test])
        assert best - 0.01 < found < best + 0.01


def test_auc_is_the_usual_one_with_ties():
    draw = np.random.default_rng(0)
    y, score = draw.random(300) < 0.3, draw.integers(0, 9, 300)
    assert oracle.auc(y, score) == pytest.approx(roc_auc_score(y, score))
