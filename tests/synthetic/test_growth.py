"""Nodules over time against brute force, and tumours under treatment against the published recursion."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import log_expit, log_ndtr, logsumexp
from scipy.stats import kstest, norm, truncnorm

from mmjepa.refusal import Refusal
from synthetic.draws import normals, uniforms
from synthetic.growth import (
    CAP_MM,
    DAYS,
    DEATH_CM,
    LOG_VDT,
    NOISE,
    courses,
    diameter_cm,
    diameters,
    first_diameter_cm,
    growth_log_odds,
    log_vdt,
    scan_days,
    tumour_rates,
    volume_cm3,
)
from synthetic.icu import POLICIES
from synthetic.oracle import auc, env_bayes
from synthetic.presets import find_site
from synthetic.world import World

PER_VDT = np.log(2) / 3
LETHAL_CM3 = volume_cm3(DEATH_CM)


@pytest.fixture(scope="module")
def case():
    """The world's subjects with their nodules at three scans, and the two-modality optimum without growth."""
    world, site = World.named("li2025", 0), find_site("li2025", "internal")
    subjects = world.sample(site, 0, 20_000)
    t = subjects.t["image"][:, world.loaded("image").index("u_image2")]
    d0_mm = np.clip(np.exp(np.log(9) + 0.35 * t), 4, 22)
    d_mm, days = diameters(d0_mm, subjects.y, 0, 0, 3), scan_days(0, 0, 20_000, 3)
    return subjects, d0_mm, d_mm, days, env_bayes(world, site, subjects, "both")


def arms(confounding, count=2000, seed=0):
    return {policy: courses(seed, 0, count, confounding, policy) for policy in POLICIES}


@pytest.fixture(scope="module")
def treated():
    return arms(confounding=5.0)


# Growth


def test_scans_fall_within_a_fifth_of_their_day_and_the_first_on_day_zero():
    days = scan_days(0, 0, 2000, 3)
    assert (days[:, 0] == 0).all()
    assert (np.diff(days, axis=1) > 0).all()
    for column, nominal in ((1, 90), (2, 365)):
        assert 0.8 * nominal < days[:, column].min() < 0.81 * nominal
        assert 1.19 * nominal < days[:, column].max() < 1.2 * nominal


def test_one_scan_shows_the_first_diameter_byte_for_byte_and_fewer_scans_are_the_first_of_more(case):
    subjects, d0_mm, d_mm, days, _ = case
    assert diameters(d0_mm, subjects.y, 0, 0, 1)[:, 0].tobytes() == d0_mm.tobytes()
    for scans in (1, 2):
        assert diameters(d0_mm, subjects.y, 0, 0, scans).tobytes() == d_mm[:, :scans].tobytes()
        assert scan_days(0, 0, len(d_mm), scans).tobytes() == days[:, :scans].tobytes()


@settings(max_examples=30, deadline=None)
@given(first=st.integers(0, 90), count=st.integers(1, 10), scans=st.integers(1, 3))
def test_a_range_of_subjects_holds_the_bytes_of_the_whole(case, first, count, scans):
    subjects, d0_mm, _, _, _ = case
    part, to = slice(first, first + count), first + count
    whole, days = diameters(d0_mm[:100], subjects.y[:100], 0, 0, scans), scan_days(0, 0, 100, scans)
    assert diameters(d0_mm[part], subjects.y[part], 0, first, scans).tobytes() == whole[part].tobytes()
    assert scan_days(0, first, count, scans).tobytes() == days[first:to].tobytes()
    odds = growth_log_odds(np.log(whole), days)
    assert growth_log_odds(np.log(whole[part]), days[part]).tobytes() == odds[part].tobytes()


def test_doubling_times_follow_their_law_and_diameters_follow_them():
    n = 40_000
    for y, (mean, sd) in LOG_VDT.items():
        label = np.full(n, y)
        assert kstest(log_vdt(label, 1, 0), norm(mean, sd).cdf).pvalue > 0.001
        d_mm, days = diameters(np.full(n, 4.0), label, 1, 0, 3), scan_days(1, 0, n, 3)
        noise = np.log(d_mm[:, 1:] / 4) - PER_VDT * days[:, 1:] / np.exp(log_vdt(label, 1, 0))[:, None]
        free = (d_mm[:, 1:] < CAP_MM).all(1)
        assert free.mean() > 0.99
        assert kstest(noise[free].ravel(), norm(0, NOISE).cdf).pvalue > 0.001


def test_growth_depends_on_the_label_alone_and_stops_at_the_cap(case):
    subjects, d0_mm, d_mm, _, _ = case
    assert d_mm[:, 1:].max() == CAP_MM
    other = diameters(d0_mm * 1.1, subjects.y, 0, 0, 3)
    free = (other < CAP_MM).all(1)
    np.testing.assert_allclose((other / other[:, :1])[free], (d_mm / d_mm[:, :1])[free], rtol=1e-12)
    assert diameters(np.array([30.0]), np.array([True]), 0, 0, 2).tolist() == [[30.0, CAP_MM]]


def test_the_log_odds_equal_a_quadrature_of_20001_fixed_nodes(case):
    _, d0_mm, d_mm, days, _ = case
    fastest, capped = np.argsort(d0_mm / d_mm[:, 2])[:40], np.nonzero((d_mm == CAP_MM).any(1))[0][:40]
    for scans in (2, 3):
        for i in {*range(40), *fastest, *capped}:
            evidence = []
            for mean, sd in (LOG_VDT[True], LOG_VDT[False]):
                x = np.linspace(-9, 9, 20_001)
                total = -0.5 * x**2
                for j in range(1, scans):
                    z = (np.log(d_mm[i, j] / d0_mm[i]) - PER_VDT * days[i, j] * np.exp(-mean - sd * x)) / NOISE
                    total += log_ndtr(-z) if d_mm[i, j] == CAP_MM else -0.5 * z**2
                evidence.append(logsumexp(total))
            odds = growth_log_odds(np.log(d_mm[[i], :scans]), days[[i], :scans])[0]
            assert odds == pytest.approx(evidence[0] - evidence[1], abs=1e-9)


@pytest.mark.parametrize(
    "d_mm", [(9, 9.3, 9.7), (9, 9.9, 12.5), (9, 9.1, 8.9), (18, 20.5, CAP_MM), (22, CAP_MM, CAP_MM)]
)
def test_the_log_odds_equal_brute_force_monte_carlo(d_mm):
    """Nodules grown forwards; share of each label's that come within a small box of what was seen."""
    rng, days, n, half = np.random.default_rng(0), np.array([85.0, 380.0]), 3_000_000, 0.02
    seen = np.log(d_mm)
    near, expected = {}, growth_log_odds(seen[None], np.array([[0, *days]]))[0]
    for y, (mean, sd) in LOG_VDT.items():
        vdt = np.exp(mean + sd * rng.standard_normal(n))
        hit = np.ones(n, bool)
        for j in (1, 2):
            later = seen[0] + PER_VDT * days[j - 1] / vdt + NOISE * rng.standard_normal(n)
            hit &= later >= np.log(CAP_MM) if d_mm[j] == CAP_MM else np.abs(later - seen[j]) < half
        near[y] = hit.sum()
    error = np.sqrt(1 / near[True] + 1 / near[False])
    assert error < 0.05
    assert np.log(near[True] / near[False]) == pytest.approx(expected, abs=4 * error + 0.02)  # .02: width of the box


def test_one_scan_tells_nothing_of_growth_and_growth_tells_what_was_measured(case):
    subjects, _, d_mm, days, odds = case
    assert (growth_log_odds(np.log(d_mm[:, :1]), days[:, :1]) == 0).all()
    grown = {k: growth_log_odds(np.log(d_mm[:, :k]), days[:, :k]) for k in (2, 3)}
    assert auc(subjects.y, grown[2]) == pytest.approx(0.779, abs=0.01)
    assert auc(subjects.y, grown[3]) == pytest.approx(0.927, abs=0.01)
    assert auc(subjects.y, odds + grown[2]) == pytest.approx(0.963, abs=0.005)
    assert auc(subjects.y, odds + grown[3]) == pytest.approx(0.985, abs=0.005)


@pytest.mark.parametrize("scans", [2, 3])
def test_growth_added_to_the_optimum_without_it_is_a_true_log_odds(case, scans):
    subjects, _, d_mm, days, odds = case
    total = odds + growth_log_odds(np.log(d_mm[:, :scans]), days[:, :scans])

    def loss(line):
        score = line[0] + line[1] * total
        return -log_expit(np.where(subjects.y, score, -score)).mean()

    offset, slope = minimize(loss, [0.0, 1.0]).x
    assert slope == pytest.approx(1, abs=0.05)
    assert offset == pytest.approx(0, abs=0.08)


@pytest.mark.parametrize("scans", [0, 4, 1.5])
def test_other_numbers_of_scans_are_refused(scans):
    with pytest.raises(Refusal, match="scans="):
        scan_days(0, 0, 1, scans)


# Treatment


@pytest.mark.parametrize("strength", [0.0, 4.0])
def test_a_course_equals_the_published_recursion_in_plain_python(strength):
    n, seed = 60, 3
    got = courses(seed, 0, n, strength)
    (growth_rate, alpha, chemo_effect), d0 = tumour_rates(seed, 0, n), first_diameter_cm(seed, 0, n)
    shock = 0.01 * normals(seed, "treated/noise", 0, n, DAYS)
    coin, ray, luck = (uniforms(seed, f"treated/{name}", 0, n, DAYS) for name in ("chemo", "radio", "cure"))
    for i in range(n):
        v, dose, gray = [np.pi / 6 * d0[i] ** 3], 0.0, 0.0
        for day in range(1, DAYS):
            last = v[-1]
            if last == 0 or last >= LETHAL_CM3:
                v.append(last)
                assert got.chemo[i, day] + got.radio[i, day] + got.propensity[i, day] == 0
                continue
            lost = chemo_effect[i] * dose + alpha[i] * gray + alpha[i] / 10 * gray**2
            new = last * (1 + growth_rate[i] * np.log(np.pi / 6 * 30**3 / last) - lost + shock[i, day])
            seen = np.mean([(6 * x / np.pi) ** (1 / 3) for x in v[-15:]])
            new = min(max(new, 0), LETHAL_CM3)
            v.append(0.0 if luck[i, day] < np.exp(-new * 5.8e8) else new)
            chance = 1 / (1 + np.exp(-strength / 13 * (seen - 6.5))) if 0 < v[-1] < LETHAL_CM3 else 0
            assert got.propensity[i, day] == pytest.approx(chance, rel=1e-9)
            assert (got.chemo[i, day], got.radio[i, day]) == (coin[i, day] < chance, ray[i, day] < chance)
            dose, gray = dose / 2 + 5 * got.chemo[i, day], 2.0 * got.radio[i, day]
        np.testing.assert_allclose(got.volume_cm3[i], v, rtol=1e-9)


@settings(max_examples=15, deadline=None)
@given(first=st.integers(0, 60), count=st.integers(1, 9), policy=st.sampled_from(POLICIES))
def test_a_course_does_not_depend_on_who_is_simulated_with_it(treated, first, count, policy):
    part, whole = courses(0, first, count, 5.0, policy), treated[policy]
    for name in ("volume_cm3", "chemo", "radio", "propensity"):
        assert getattr(part, name).tobytes() == getattr(whole, name)[first : first + count].tobytes()


def test_treatment_shrinks_every_tumour_and_none_ever_grows_beyond_its_untreated_arm(treated):
    never, observed, always = (treated[policy].volume_cm3 for policy in ("never", "observed", "always"))
    assert (observed <= never).all()
    assert (always <= never).all()
    assert ((always < never) | (never == LETHAL_CM3))[:, 2:].all()
    assert (always[:, -1] < never[:, -1]).mean() > 0.998
    assert (observed[:, -1] < never[:, -1]).mean() > 0.98
    assert never[:, 0].tobytes() == always[:, 0].tobytes() == observed[:, 0].tobytes()
    assert not treated["never"].chemo.any()
    assert not treated["never"].radio.any()


def test_the_treated_look_worse_though_treatment_helps_and_more_so_the_stronger_the_confounding():
    areas = []
    for strength in (0.0, 2.0, 5.0, 10.0):
        observed = courses(0, 0, 2000, strength)
        ongoing = observed.propensity[:, 1:] > 0
        size, given_chemo = observed.volume_cm3[:, :-1][ongoing], observed.chemo[:, 1:][ongoing]
        areas.append(auc(given_chemo, size))
    assert areas[0] == pytest.approx(0.5, abs=0.01)
    assert (np.diff(areas) > 0.02).all()


def test_without_confounding_a_coin_decides():
    observed = courses(0, 0, 2000, 0.0)
    assert set(np.unique(observed.propensity)) == {0.0, 0.5}
    ongoing = observed.propensity > 0
    for given_treatment in (observed.chemo, observed.radio):
        assert given_treatment[ongoing].mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(ongoing.sum()))
        assert not given_treatment[~ongoing].any()


def test_death_and_cure_are_final(treated):
    for arm in treated.values():
        volume = arm.volume_cm3
        for final in (0.0, LETHAL_CM3):
            reached = volume == final
            assert (reached[:, 1:] >= reached[:, :-1]).all()
            assert not ((arm.chemo | arm.radio) & reached).any()
    assert (treated["never"].volume_cm3[:, -1] == LETHAL_CM3).mean() == pytest.approx(0.105, abs=0.025)
    assert (treated["always"].volume_cm3[:, -1] == 0).mean() > 0.8


def test_rates_are_the_correlated_gaussians_given_that_they_are_positive():
    growth_rate, alpha, chemo_effect = tumour_rates(0, 0, 20_000)
    assert min(growth_rate.min(), alpha.min(), chemo_effect.min()) > 0
    cross = 0.87 * 0.00723 * 0.168
    law = np.random.default_rng(0).multivariate_normal(
        [7e-5, 0.0398], [[0.00723**2, cross], [cross, 0.168**2]], 100_000
    )
    law = law[(law > 0).all(1)]
    assert kstest(growth_rate, law[:, 0]).pvalue > 0.001
    assert kstest(alpha, law[:, 1]).pvalue > 0.001
    assert np.corrcoef(growth_rate, alpha)[0, 1] == pytest.approx(np.corrcoef(law.T)[0, 1], abs=0.02)
    assert kstest(chemo_effect, norm(0.028, 0.0007).cdf).pvalue > 0.001


def test_first_diameters_mix_the_truncated_stages_by_their_share():
    stages = (
        (1432, 1.72, 4.70, 5),
        (128, 1.96, 1.63, 13),
        (1306, 1.91, 9.4, 13),
        (7248, 2.76, 6.87, 13),
        (12840, 3.86, 8.82, 13),
    )
    total = sum(stage[0] for stage in stages)

    def law(x):
        low = np.log(0.3)
        return sum(
            share / total * truncnorm((low - mean) / sd, (np.log(high) - mean) / sd, mean, sd).cdf(np.log(x))
            for share, mean, sd, high in stages
        )

    d0_cm = first_diameter_cm(0, 0, 20_000)
    assert kstest(d0_cm, law).pvalue > 0.001
    np.testing.assert_allclose(diameter_cm(volume_cm3(d0_cm)), d0_cm, rtol=1e-12)


def test_unknown_policies_and_impossible_confounding_are_refused():
    with pytest.raises(Refusal, match="sometimes"):
        courses(0, 0, 1, 1.0, "sometimes")
    for strength in (-1.0, float("nan")):
        with pytest.raises(Refusal, match="below 0"):
            courses(0, 0, 1, strength)
