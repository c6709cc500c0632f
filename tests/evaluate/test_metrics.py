import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score, roc_curve

from mmjepa.evaluate import metrics


def problem(seed, n=200, ties=True):
    random = np.random.default_rng(seed)
    score = random.normal(size=n)
    y = (random.random(n) < 1 / (1 + np.exp(-score))).astype(int)
    return y, np.round(score, 1) if ties else score


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), ties=st.booleans())
def test_every_metric_equals_scikit_learn_with_and_without_weights(seed, ties):
    y, score = problem(seed, ties=ties)
    weights = np.random.default_rng(seed).integers(0, 4, (3, len(y)))
    weights[:, [int(y.argmax()), int(y.argmin())]] = 1
    for w, auc, ap, brier in zip(
        weights,
        metrics.auroc(y, score, weights),
        metrics.average_precision(y, score, weights),
        metrics.brier(y, score, weights),
        strict=True,
    ):
        assert auc == pytest.approx(roc_auc_score(y, score, sample_weight=w), abs=1e-9)
        assert ap == pytest.approx(average_precision_score(y, score, sample_weight=w), abs=1e-9)
        assert brier == pytest.approx(brier_score_loss(y, 1 / (1 + np.exp(-score)), sample_weight=w), abs=1e-9)
    assert metrics.auroc(y, score)[0] == pytest.approx(roc_auc_score(y, score), abs=1e-9)


def test_equal_scores_give_half_and_a_perfect_order_gives_one():
    y = np.array([0, 1, 0, 1])
    assert metrics.auroc(y, np.zeros(4))[0] == 0.5
    assert metrics.auroc(y, y)[0] == 1
    assert metrics.average_precision(y, np.zeros(4))[0] == 0.5


def test_one_class_has_no_auroc():
    assert np.isnan(metrics.auroc(np.ones(3), np.arange(3))[0])


@pytest.mark.parametrize(("draws", "tolerance"), [(1, 1e-5), (20, 2e-3)])
def test_calibration_equals_logistic_regression_on_the_log_odds(draws, tolerance):
    y, score = problem(3, n=500)
    score = 2 * score + 1
    weights = np.random.default_rng(0).integers(0, 3, (draws, len(y)))
    intercept, slope = metrics.calibration(y, score, weights)
    for w, a, b in zip(weights, intercept, slope, strict=True):
        fit = LogisticRegression(C=np.inf, tol=1e-10).fit(score[:, None], y, sample_weight=w)
        assert b == pytest.approx(fit.coef_[0, 0], abs=tolerance)
        root = brentq(lambda x, w=w: (w * (y - expit(score + x))).sum(), -5, 5)
        assert a == pytest.approx(root, abs=tolerance)


def test_true_probabilities_are_calibrated_and_doubled_log_odds_have_half_the_slope():
    y, score = problem(1, n=200_000, ties=False)
    a, b = metrics.calibration(y, score)
    assert (a[0], b[0]) == pytest.approx((0, 1), abs=0.03)
    assert metrics.calibration(y, 2 * score)[1][0] == pytest.approx(b[0] / 2, rel=1e-6)


def test_separated_scores_have_no_slope():
    assert np.isnan(metrics.calibration(np.array([0, 0, 1, 1]), np.array([-2.0, -1, 1, 2]))[1][0])


def test_roc_points_are_those_of_scikit_learn_and_are_thinned():
    y, score = problem(5)
    false, true = metrics.roc_points(y, score, most=10_000)
    theirs = roc_curve(y, score, drop_intermediate=False)
    assert false == pytest.approx(theirs[0])
    assert true == pytest.approx(theirs[1])
    false, true = metrics.roc_points(y, score, most=7)
    assert len(false) == 7
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)


def test_calibration_groups_hold_every_row_once():
    y, score = problem(2, n=103)
    groups = metrics.calibration_groups(y, score)
    assert sum(group["rows"] for group in groups) == 103
    assert sum(group["rows"] * group["observed"] for group in groups) == pytest.approx(y.sum())
