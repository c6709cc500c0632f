"""ICU stays follow their law, whatever the batch; arms are the same patients; the past does not know the future."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from mmjepa.refusal import Refusal
from synthetic.icu import _RANGES, NONE, POLICIES, STATES, Icu, IcuWorld, simulate, weighted
from synthetic.icu_filter import ParticleFilter

COLUMNS = ("index", "states", "treated", "labs", "death_h", "discharge_h", "onset_h")
LAW = Icu()


@pytest.fixture(scope="module")
def stays():
    return simulate(LAW, 0, 0, 2500)


def same(a, b):
    return all(getattr(a, name).tobytes() == getattr(b, name).tobytes() for name in COLUMNS)


@settings(max_examples=15, deadline=None)
@given(first=st.integers(0, 2400), count=st.integers(1, 40))
def test_a_stay_has_the_same_bytes_in_any_batch(stays, first, count):
    assert same(simulate(LAW, 0, first, count), stays.take(slice(first, first + count)))


def test_another_seed_gives_other_stays_and_another_world(stays):
    other = simulate(LAW, 1, 0, 50)
    assert not np.isclose(other.states, stays.states[:50]).any()
    assert not np.isclose(other.world.loading, stays.world.loading).any()


def test_the_state_moves_by_the_law_and_independent_normals(stays):
    noise = stays.states[:, 1:] - stays.states[:, :-1] * LAW.keep
    noise -= stays.on()[:, 1:, None] * np.array(LAW.drift) + stays.treated[:, :-1, None] * np.array(LAW.effect)
    noise = (noise / LAW.noise).reshape(-1, STATES)
    assert np.abs(np.corrcoef(noise.T) - np.eye(STATES)).max() < 0.015
    assert np.abs(noise.mean(0)).max() < 0.015
    assert np.abs(noise.std(0) - 1).max() < 0.01
    assert np.abs((noise**4).mean(0) - 3).max() < 0.1
    assert stays.states[:, 0].std(0) == pytest.approx(
        np.sqrt((0.6 * np.array(LAW.keep)) ** 2 + np.array(LAW.noise) ** 2), rel=0.05
    )


def test_treatment_is_given_by_the_policy_and_labs_are_drawn_by_the_state(stays):
    logit = 1.5 * (stays.states @ [0.8, 0.8, 0.4] - 1.8)
    expected = expit(logit)
    assert np.abs(((stays.treated - expected) * logit).mean()) < 0.01
    assert stays.treated.mean() == pytest.approx(expected.mean(), abs=0.003)
    inside = stays.inside()
    chance = expit(-1 + 0.35 * np.clip(stays.states.mean(2), -3, 3))[inside]
    drawn = (~np.isnan(stays.labs)).mean(2)[inside]
    assert np.polyfit(chance, drawn, 1) == pytest.approx([1, 0], abs=0.01)


def test_labs_are_the_loaded_state_and_noise(stays):
    noise = stays.labs - np.einsum("ntk,jk->ntj", stays.states, stays.world.loading)
    assert np.nanstd(noise, axis=(0, 1)) == pytest.approx(np.full(12, 0.8), abs=0.015)
    assert np.abs(np.nanmean(noise, axis=(0, 1))).max() < 0.02


def test_a_stay_ends_once_and_nothing_is_measured_after(stays):
    assert not ((stays.death_h != NONE) & (stays.discharge_h != NONE)).any()
    assert np.isnan(stays.labs[~stays.inside()]).all()
    ended = stays.end_h < LAW.hours
    assert stays.inside().sum(1)[ended].tolist() == (stays.end_h[ended] + 1).tolist()
    assert (stays.inside().sum(1)[~ended] == LAW.hours).all()


@pytest.mark.parametrize("law", [LAW, replace(LAW, death_bias=-1.0, discharge_bias=-1.0)])  # the second has many ties
def test_ends_come_at_the_hazards_of_those_still_there(law):
    stays = simulate(law, 2, 0, 6000)
    for rate, ends in ((law.death_rate, stays.death_h), (law.discharge_rate, stays.discharge_h)):
        hazard = -np.expm1(-rate(np.moveaxis(stays.states, -1, 0)))
        exposed = stays.inside()
        if rate == law.discharge_rate:  # who dies in an hour cannot leave in it
            exposed = exposed & (np.arange(law.hours) != stays.death_h[:, None])
        expected, found = hazard[exposed].sum(), (ends != NONE).sum()
        assert abs(found - expected) < 3 * np.sqrt(expected)


def test_onset_as_a_markov_state_is_the_same_law_as_an_hour_of_onset():
    hazard, hours = LAW.onset_hazard(), np.arange(LAW.hours)
    begun = 1 - np.cumprod(1 - hazard)
    assert begun == pytest.approx(0.25 * -np.expm1(-hours / 10), abs=1e-12)
    found = simulate(LAW, 3, 0, 8000).on().mean(0)
    assert np.abs(found - begun).max() < 4 * np.sqrt(0.25 * 0.75 / 8000)


@settings(max_examples=8, deadline=None)
@given(policy=st.sampled_from(["never", "always"]), switch_h=st.integers(0, 48))
def test_another_policy_from_an_hour_on_changes_nothing_before_it(stays, policy, switch_h):
    arm = simulate(LAW, 0, 0, 200, policy, switch_h)
    known = stays.take(slice(0, 200))
    assert (arm.states[:, : switch_h + 1] == known.states[:, : switch_h + 1]).all()
    assert (arm.treated[:, :switch_h] == known.treated[:, :switch_h]).all()
    over = known.end_h < switch_h
    assert (arm.end_h[over] == known.end_h[over]).all()
    assert (arm.end_h[~over] >= switch_h).all()
    assert np.array_equal(arm.labs[:, : switch_h + 1], known.labs[:, : switch_h + 1], equal_nan=True)
    assert (arm.treated[:, switch_h:] == (policy == "always")).all()


def test_arms_differ_by_the_effect_of_treatment_alone(stays):
    arm = simulate(LAW, 0, 0, 500, "always", 10)
    difference, expected = arm.states - stays.states[:500], np.zeros((500, STATES))
    extra = arm.treated.astype(float) - stays.treated[:500]
    for hour in range(1, LAW.hours):
        expected = expected * LAW.keep + extra[:, hour - 1, None] * np.array(LAW.effect)
        assert np.abs(difference[:, hour] - expected).max() < 1e-12


def test_a_knob_moves_what_it_is_about_and_nothing_else(stays):
    known = stays.take(slice(0, 300))

    def site(**knobs):
        return simulate(replace(LAW, **knobs), 0, 0, 300)

    assert same(site(lab_offset=0.0, treatment_factor=1.0, policy_strength=1.5, measured_slope=0.35), known)
    shifted = site(lab_offset=0.5)
    assert shifted.states.tobytes() == known.states.tobytes()
    assert np.nanmax(np.abs(shifted.labs - known.labs - 0.5 * IcuWorld.of(0).shift)) < 1e-5
    asked = site(measured_slope=0.0)
    assert asked.states.tobytes() == known.states.tobytes()
    assert asked.end_h.tolist() == known.end_h.tolist()
    both = ~np.isnan(asked.labs) & ~np.isnan(known.labs)
    assert (asked.labs[both] == known.labs[both]).all()
    assert both.sum() > 0.7 * (~np.isnan(known.labs)).sum()
    left = site(discharge_bias=-3.6)
    assert left.states.tobytes() == known.states.tobytes()
    assert (left.end_h <= known.end_h).all()
    assert (left.end_h < known.end_h).any()
    weak = site(treatment_factor=0.0)
    first = np.where(known.treated.any(1), known.treated.argmax(1), LAW.hours)
    same_until = np.arange(LAW.hours) <= first[:, None]
    assert (weak.states[same_until] == known.states[same_until]).all()
    fair = site(policy_strength=0.0)
    assert fair.treated.mean() == pytest.approx(0.5, abs=0.02)
    assert fair.states[:, 0].tobytes() == known.states[:, 0].tobytes()


def test_death_answers_treatment_strength_monotonely():
    deaths = [
        (simulate(replace(LAW, treatment_factor=factor), 4, 0, 3000).death_h != NONE).mean()
        for factor in (0, 0.5, 1, 2)
    ]
    assert all(more > less + 0.01 for more, less in pairwise(deaths))


def test_the_treated_die_more_though_treatment_saves():
    arms = {policy: simulate(LAW, 5, 0, 5000, policy, 20) for policy in POLICIES}
    seen = arms["observed"]
    there, treated = seen.end_h > 26, seen.treated[:, 20]
    died = {policy: arm.death_h != NONE for policy, arm in arms.items()}
    assert died["observed"][there & treated].mean() > died["observed"][there & ~treated].mean() + 0.3
    assert died["always"].mean() < died["observed"].mean() - 0.02 < died["never"].mean() - 0.04
    alive = seen.end_h >= 20
    worse = died["always"][alive] & ~died["never"][alive] & (arms["never"].discharge_h[alive] == NONE)
    assert not worse.any()  # same noise: treatment never kills


def test_weighted_is_the_product_with_the_weights():
    state = np.random.default_rng(0).standard_normal((3, 4, 5))
    assert weighted(state, (1.0, -2.0, 0.5)) == pytest.approx(np.tensordot([1, -2, 0.5], state, 1))


@pytest.mark.parametrize(
    "knobs",
    [
        {"deteriorating": 1.5},
        {"hours": 0},
        {"start_sd": -1.0},
        {"noise": (0.1, 0.0, 0.1)},
        {"death_bias": np.nan},
        {"drift": (0.1, 0.2)},
    ],
)
def test_a_law_out_of_range_is_refused_by_name(knobs):
    with pytest.raises(Refusal, match=next(iter(knobs))) as caught:
        Icu(**knobs)
    assert caught.value.code == "SYNTHETIC_RANGE"


def test_unknown_policies_and_empty_cohorts_are_refused():
    with pytest.raises(Refusal, match="SYNTHETIC_UNKNOWN"):
        simulate(LAW, 0, 0, 1, "sometimes")
    for first, count, switch_h in ((0, 0, 0), (-1, 1, 0), (0, 1, 49)):
        with pytest.raises(Refusal, match="SYNTHETIC_RANGE"):
            simulate(LAW, 0, first, count, "never", switch_h)


@pytest.mark.parametrize("limit", [0, 1])
@pytest.mark.parametrize("name", sorted(_RANGES))
def test_the_law_holds_at_the_limits_of_each_knob_and_is_refused_beyond(name, limit):
    default, bound = getattr(LAW, name), _RANGES[name][limit]

    def law(value):
        return replace(LAW, **{name: (value,) * 3 if isinstance(default, tuple) else value})

    with pytest.raises(Refusal, match=name):
        law(bound + (1 if limit else -1))
    with np.errstate(all="raise", under="ignore"):
        stays = simulate(law(bound), 0, 0, 8)
        there = stays.take(stays.end_h > 0)
        risk = ParticleFilter(stays.law, stays.world, 16, 0).risk(there, 0, min(12, stays.law.hours - 1))
    assert np.isfinite(stays.states).all()
    assert ((risk >= 0) & (risk <= 1 + 1e-6)).all()
