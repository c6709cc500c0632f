"""The oracles are exact."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from mmjepa.refusal import Refusal
from synthetic import oracle
from synthetic.presets import Preset, Site, find_site
from synthetic.ranking import auc
from synthetic.world import World

INTERNAL, EXTERNAL = find_site("li2025", "internal"), find_site("li2025", "external")
VIEWS = ("image", "ehr", "both")
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
CAUSAL = {"internal": 0.893, "external": 0.908}
CEILINGS = {
    "internal": {100: 0.899, 200: 0.918, 400: 0.931, 1000: 0.939, 4000: 0.945},
    "external": {100: 0.774, 200: 0.782, 400: 0.798, 1000: 0.809, 4000: 0.824},
}
# a world small enough to integrate by brute force, where every block matters
TINY = Preset(
    d_image=7, d_ehr=7, k_b=1, k_n_image=1, k_n_ehr=1, a_b=0.15, a_n=0.05, w_u_ehr=0.8, w_b=0.4,
    **{f"a_{block}_{m}": a for block, a in (("s", 0.25), ("u", 0.15), ("c", 0.25)) for m in ("image", "ehr")},
)  # fmt: skip
HOME = Site(name="home", rho=0.7, offset=0)
KNOBS = {
    "neutral": {},
    "unlinked": {"rho": 0.0},
    "reversed": {"rho": -0.6},
    "c_mean": {"c_mean": 1.5},
    "spec": {"spec": 1.7},
    "bias_shift": {"bias_shift": -1.2},
    "w_u_ehr_factor": {"w_u_ehr_factor": -2.0},
    "group_shift": {"group_shift": 1.5},
    "code_shift": {"code_shift": 0.7},
    "noise_image": {"noise_image": 2.0},
    "all": {"rho": 0.4, "c_mean": -0.7, "spec": 0.6, "bias_shift": 0.8, "w_u_ehr_factor": 2.0, "group_shift": -1.0,
            "code_shift": 1.0, "noise_image": 0.7},
}  # fmt: skip


@pytest.fixture(scope="module")
def found():
    return oracle.run("li2025", seeds=8)


@pytest.mark.parametrize("site", ["internal", "external"])
def test_oracles_score_as_specified(found, site):
    means = {name: value["mean"] for name, value in found["sites"][site].items()}
    for name, expected in PUBLISHED[site].items():
        for view, value, tolerance in zip(VIEWS, expected, (0.015, 0.01, 0.01), strict=True):
            assert means[f"{name}_{view}"] == pytest.approx(value, abs=tolerance), (name, view)
    assert means["causal_z"] == pytest.approx(CAUSAL[site], abs=0.01)
    for n, value in CEILINGS[site].items():
        assert means[f"ceiling_{n}"] == pytest.approx(value, abs=0.015), n
    assert means["prevalence"] == pytest.approx(0.417, abs=0.015)


def test_labels_lift_the_ceiling_towards_env_bayes_inside(found):
    inside = found["sites"]["internal"]
    rising = [inside[f"ceiling_{n}"]["mean"] for n in oracle.CEILING_LABELS] + [inside["env_bayes_both"]["mean"]]
    assert rising == sorted(rising)


def test_the_result_is_plain_json_with_intervals(found):
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    entry = found["sites"]["external"]["env_bayes_both"]
    assert entry["low"] < entry["mean"] < entry["high"]
    assert len(entry["values"]) == 8
    # Student's t with 7 degrees of freedom
    assert entry["high"] - entry["mean"] == pytest.approx(2.3646 * entry["sd"] / np.sqrt(8), rel=1e-3)
    assert oracle.run("base", seeds=1, patients=300)["sites"]["internal"]["causal_z"]["sd"] is None


def test_too_few_patients_or_seeds_are_refused():
    for numbers in ({"seeds": 0}, {"seeds": 1, "patients": 9}):
        with pytest.raises(Refusal, match="outside"):
            oracle.run("li2025", **numbers)
    with pytest.raises(Refusal, match="li2025"):
        oracle.run("li2026", seeds=1)


def brute_force(world, site, theta, n=200_000):
    """{view: log p(y=1, theta) - log p(y=0, theta) and its Monte Carlo error}, and the prior's, by drawing the latents."""
    draw, p = np.random.default_rng(1), world.preset
    s, u_image, u_ehr, b, n_image, n_ehr = (draw.standard_normal((n, k)) for k in p.blocks.values())
    u_image *= site.spec
    b += site.group_shift  # the only factor of b in this world
    eta = p.bias + site.bias_shift + p.w_s * s.sum(1) + p.w_u_image * u_image.sum(1) + p.w_b * b.sum(1)
    risk = expit(eta + p.w_u_ehr * site.w_u_ehr_factor * u_ehr.sum(1))
    z = np.concatenate([s, u_image, u_ehr, b, n_image, n_ehr], axis=1)
    pathway = site.c_mean + draw.standard_normal((n, 1))
    density = {}
    for m, rows, tau in (("image", slice(None), site.noise_image), ("ehr", world.channels(site), 1.0)):
        for sign in (1, -1):
            mean = (z @ world.A[m][rows].T + (pathway + sign * site.rho) @ world.B[m][rows].T) / tau
            density[m, sign] = (theta[m] / tau) @ mean.T - 0.5 * (mean**2).sum(1)
    found = {}
    for view, modalities in oracle.VIEWS.items():
        exponents = [sum(density[m, sign] for m in modalities) for sign in (1, -1)]
        top = np.max(exponents, axis=(0, 2))[:, None]
        yes, no = (share * np.exp(e - top) for share, e in zip((risk, 1 - risk), exponents, strict=True))
        yes_mean, no_mean = yes.mean(1), no.mean(1)
        error = (yes / yes_mean[:, None] - no / no_mean[:, None]).std(1) / np.sqrt(n)
        found[view] = np.log(yes_mean / no_mean), error
    return found, logit(risk.mean())


@pytest.mark.parametrize("knob", KNOBS)
def test_every_oracle_equals_brute_force_monte_carlo_on_a_reduced_world(knob):
    world, site = World(TINY, HOME, 5), replace(HOME, name="away", **KNOBS[knob])
    subjects = world.sample(site, 0, 6)
    for scored, law in ((oracle.env_bayes, site), (oracle.c_blind, replace(site, rho=0.0))):
        expected, prior = brute_force(world, law, subjects.theta)
        for view in VIEWS:
            value, error = expected[view]
            assert np.median(error) < 0.03
            assert (np.abs(scored(world, site, subjects, view) - value) < 4 * error + 0.002).all()
        assert oracle.prior_log_odds(world, site) == pytest.approx(prior, abs=0.03)
    for view in VIEWS:
        source = oracle.log_odds(world, HOME, subjects.theta_of(oracle.VIEWS[view]), oracle.VIEWS[view])
        np.testing.assert_array_equal(oracle.source_bayes(world, subjects, view), source)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 37, 999])
def test_scores_are_the_same_bytes_among_any_number_of_subjects(count):
    world = World.named("li2025", 0)
    whole, part = (oracle.scores(world, EXTERNAL, world.sample(EXTERNAL, 0, n)) for n in (1000, count))
    assert all(part[name].tobytes() == whole[name][:count].tobytes() for name in whole)


def test_a_subject_without_a_record_is_judged_by_the_image_and_otherwise_by_the_prior():
    world, site = World(TINY, HOME, 5), replace(HOME, ehr_missing=0.5)
    subjects = world.sample(site, 0, 40)
    blind = ~subjects.seen_ehr
    assert 5 < blind.sum() < 35
    whole = oracle.env_bayes(world, HOME, world.sample(HOME, 0, 40), "both")
    found = {view: oracle.env_bayes(world, site, subjects, view) for view in VIEWS}
    np.testing.assert_allclose(found["both"][~blind], whole[~blind])
    np.testing.assert_allclose(found["both"][blind], found["image"][blind])
    expected, prior = brute_force(world, HOME, {m: values[blind][:3] for m, values in subjects.theta.items()})
    value, error = expected["image"]
    assert (np.abs(found["both"][blind][:3] - value) < 4 * error).all()
    np.testing.assert_allclose(found["ehr"][blind], prior, atol=0.02)


@pytest.mark.parametrize(
    "knobs",
    [{}, {"rho": -0.4, "spec": 1.4, "code_shift": 0.15}, {"bias_shift": -2.0}, {"noise_image": 2.0, "c_mean": 1.0},
     {"ehr_missing": 0.5}, {"w_u_ehr_factor": -10.0, "group_shift": 1.0}],
    ids=str,
)  # fmt: skip
def test_env_bayes_is_calibrated_at_every_site(knobs):
    world, site = World.named("li2025", 1), replace(INTERNAL, **knobs)
    subjects = world.sample(site, 0, 24_000)
    for view in VIEWS:
        score = oracle.env_bayes(world, site, subjects, view)
        fit = LogisticRegression(C=1e6).fit(score[:, None], subjects.y)
        assert fit.coef_[0, 0] == pytest.approx(1, abs=0.05)
        assert fit.intercept_[0] == pytest.approx(0, abs=0.1)


def test_code_shift_costs_env_bayes_nothing():
    world, unshifted = World.named("li2025", 1), replace(EXTERNAL, code_shift=0.0)
    shifted = oracle.env_bayes(world, EXTERNAL, world.sample(EXTERNAL, 0, 500), "both")
    plain = oracle.env_bayes(world, unshifted, world.sample(unshifted, 0, 500), "both")
    np.testing.assert_allclose(plain, shifted, atol=1e-8)


def test_wrong_or_late_labels_leave_env_bayes_the_best_order():
    world, site = World.named("li2025", 1), replace(INTERNAL, label_flip=0.2, follow_up_days=180)
    subjects = world.sample(site, 0, 8000)
    scores = oracle.scores(world, site, subjects)
    found = {name: auc(subjects.label, score) for name, score in scores.items()}
    assert auc(subjects.y, scores["env_bayes_both"]) > found["env_bayes_both"] + 0.1
    assert max(found, key=found.__getitem__) in ("env_bayes_both", "source_bayes_both")


def test_a_model_with_many_labels_nears_env_bayes_and_does_not_pass_it():
    world = World.named("li2025", 2)
    subjects = world.sample(INTERNAL, 0, 12_000)
    train, test = np.arange(12_000) < 8000, np.arange(12_000) >= 8000
    for view in ("image", "ehr"):
        t = subjects.t[view]
        model = LogisticRegression().fit(t[train], subjects.y[train])
        found = auc(subjects.y[test], model.decision_function(t[test]))
        best = auc(subjects.y[test], oracle.env_bayes(world, INTERNAL, subjects, view)[test])
        assert best - 0.01 < found < best + 0.01


def test_extreme_log_odds_stay_finite():
    world, site = World.named("li2025", 0), replace(INTERNAL, w_u_ehr_factor=100.0, rho=5.0)
    assert np.isfinite(oracle.env_bayes(world, site, world.sample(site, 0, 500), "both")).all()
