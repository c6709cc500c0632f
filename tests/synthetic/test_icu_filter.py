"""The particle filter is the exact posterior: Kalman where that is exact, else brute force; the same in any batch."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm

from mmjepa.refusal import Refusal
from synthetic.icu import LABS, NONE, STATES, Icu, simulate
from synthetic.icu_filter import ParticleFilter, kalman, sufficient

LAW = Icu()
LINEAR = Icu(
    policy_strength=0.0, measured_slope=0.0, deteriorating=0.0, death_bias=-60.0, discharge_bias=-60.0, hours=24
)
TINY = Icu(
    hours=4, death_bias=-2.5, discharge_bias=-1.5, deteriorating=0.6, onset_h=2.0, drift=(0.5, 0.6, 0.4), lab_noise=1.5
)


@pytest.fixture(scope="module")
def there():
    stays = simulate(LAW, 0, 0, 150)
    return stays.take(stays.end_h > 12)


@pytest.fixture(scope="module")
def observer(there):
    return ParticleFilter(LAW, there.world, 32, 0)


def test_particles_answer_the_same_in_any_batch_and_order(there, observer):
    answers = (
        lambda stays: observer.risk(stays, 12, 20),
        lambda stays: observer.risk(stays, 12, 20, know_state=True),
        lambda stays: observer.forecast(stays, 12, (13, 18)),
        lambda stays: observer.means(stays, 5),
    )
    order = np.random.default_rng(0).permutation(len(there.index))
    for answer in answers:
        whole = answer(there)
        pieces = [answer(there.take(slice(a, b))) for a, b in ((0, 1), (1, 40), (40, None))]
        assert np.concatenate(pieces).tobytes() == whole.tobytes()
        assert answer(there.take(order)).tobytes() == whole[order].tobytes()


def test_what_comes_later_does_not_move_what_was_known(there, observer):
    later = simulate(LAW, 0, 0, 150, "always", 13).take(there.index)
    assert not (later.treated == there.treated).all()
    assert observer.risk(later, 12, 20).tobytes() == observer.risk(there, 12, 20).tobytes()
    assert observer.means(later, 12).tobytes() == observer.means(there, 12).tobytes()


@pytest.mark.parametrize("deteriorating", [0.0, 0.5])
def test_particles_agree_with_kalman_where_all_is_linear_and_gaussian(deteriorating):
    stays = simulate(replace(LINEAR, deteriorating=deteriorating), 1, 0, 64)
    exact, covariance = kalman(stays, 23)
    error = ParticleFilter(stays.law, stays.world, 1000, 1).means(stays, 23, know_onset=True) - exact
    z = error / np.sqrt(np.einsum("ntkk->ntk", covariance))
    assert np.abs(z.mean((0, 1))).max() < 0.05  # posterior sd; three times its Monte Carlo error
    assert np.sqrt((z**2).mean()) < 0.2


def test_kalman_is_as_wrong_as_it_says():
    stays = simulate(replace(LINEAR, deteriorating=0.5), 2, 0, 2000)
    mean, covariance = kalman(stays, 23)
    error = (stays.states - mean)[..., None]
    distance = (error * np.linalg.solve(covariance, error)).sum((2, 3))  # chi-square of 3 degrees of freedom
    assert distance.mean(0) == pytest.approx(np.full(24, 3.0), abs=5 * np.sqrt(6 / 2000))


def test_sufficient_statistics_are_the_log_likelihood_of_the_labs():
    stays = simulate(replace(LAW, lab_offset=0.7), 3, 0, 5)
    quadratic, linear, drawn = sufficient(stays.law, stays.world, stays.labs)
    Q = quadratic[..., [0, 3, 4, 3, 1, 5, 4, 5, 2]].reshape(5, 48, STATES, STATES)

    def log_likelihood(state):
        expected = stays.world.loading @ state + 0.7 * stays.world.shift
        return np.nansum(norm.logpdf(stays.labs, expected, 0.8), axis=2)

    for state in np.random.default_rng(0).standard_normal((4, STATES)):
        brief = -0.5 * np.einsum("i,ntij,j->nt", state, Q, state) + linear @ state
        assert brief == pytest.approx(log_likelihood(state) - log_likelihood(np.zeros(STATES)), abs=1e-4)
    assert (drawn == (~np.isnan(stays.labs)).sum(2)).all()


def brute_force(stays, row, seen_h, draws):
    """Posterior mean of the state and risk of later death by weighting prior trajectories, with its own equations."""
    law, rng = stays.law, np.random.default_rng(row)
    starts = -law.onset_h * np.log(rng.random(draws))
    onset = np.where(rng.random(draws) < law.deteriorating, starts, np.inf)
    state, log_weight = 0.6 * rng.standard_normal((draws, STATES)), np.zeros(draws)
    given, alive, risk = np.zeros(draws), np.ones(draws), np.zeros(draws)
    for hour in range(law.hours):
        state = state * [0.97, 0.95, 0.98] + (hour >= onset)[:, None] * np.array(law.drift)
        state += given[:, None] * np.array([-0.06, -0.08, -0.04]) + rng.standard_normal((draws, 3)) * [0.06, 0.08, 0.05]
        policy = expit(1.5 * (state @ [0.8, 0.8, 0.4] - 1.8))
        dies, leaves = np.exp(law.death_bias + state @ [1.1, 1.1, 0.9]), np.exp(law.discharge_bias - 0.8 * state.sum(1))
        if hour <= seen_h:
            labs = stays.labs[row, hour].astype(float)
            drawn, chance = ~np.isnan(labs), expit(-1 + 0.35 * np.clip(state.mean(1), -3, 3))
            for j in np.flatnonzero(drawn):
                log_weight += norm.logpdf(labs[j], state @ stays.world.loading[j], law.lab_noise)
            log_weight += drawn.sum() * np.log(chance) + (LABS - drawn.sum()) * np.log(1 - chance)
            log_weight += np.log(policy if stays.treated[row, hour] else 1 - policy) - dies - leaves
            given = np.full(draws, float(stays.treated[row, hour]))
        else:
            risk += alive * (1 - np.exp(-dies))
            alive *= np.exp(-dies - leaves)
            given = (rng.random(draws) < policy).astype(float)
        if hour == seen_h:
            then = state
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    return weight @ then, weight @ risk, 1 / (weight**2).sum()


def test_particles_agree_with_brute_force_on_a_tiny_world():
    stays = simulate(TINY, 4, 0, 60)
    stays = stays.take(stays.end_h > 1)
    stays = stays.take(slice(0, 12))
    observer = ParticleFilter(TINY, stays.world, 20_000, 4)
    means, risks = observer.means(stays, 1)[:, 1], observer.risk(stays, 1, 3)
    for row in range(len(stays.index)):
        mean, risk, effective = brute_force(stays, row, 1, 100_000)
        error = 5 * np.sqrt(1 / effective + 1 / 10_000)
        assert np.abs(means[row] - mean).max() < 0.45 * error
        assert abs(risks[row] - risk) < 0.25 * error
    assert risks.std() > 0.03  # there was something to agree on


def test_the_risk_of_one_who_knows_the_state_is_that_of_what_then_happens():
    stays = simulate(TINY, 5, 0, 4000)
    stays = stays.take(stays.end_h > 0)
    risk = ParticleFilter(TINY, stays.world, 64, 5).risk(stays, 0, 3, know_state=True)
    died = (stays.death_h != NONE).astype(float)
    for low, high in ((0, 0.3), (0.3, 0.7), (0.7, 1)):
        some = (risk >= np.quantile(risk, low)) & (risk <= np.quantile(risk, high))
        assert abs((died - risk)[some].mean()) < 3 * np.sqrt(0.25 / some.sum())


def test_a_known_onset_and_a_known_state_make_better_forecasts(there):
    observer = ParticleFilter(LAW, there.world, 200, 0)
    truth = there.states[:, (13, 18)]
    known, seen = (
        np.abs(observer.forecast(there, 12, (13, 18), know_state=know) - truth).sum(2).mean(0) for know in (True, False)
    )
    assert (known < seen - 0.1).all()
    blind, told = (
        np.abs(observer.means(there, 12, know_onset=know) - there.states[:, :13]).sum(2).mean()
        for know in (False, True)
    )
    assert told < blind


@pytest.mark.parametrize("particles", [0, 1, 33])
def test_an_odd_number_of_particles_is_refused(there, particles):
    with pytest.raises(Refusal, match="SYNTHETIC_RANGE"):
        ParticleFilter(LAW, there.world, particles, 0)
