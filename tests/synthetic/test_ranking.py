"""Areas under the ROC curve against independent statements of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from mmjepa.refusal import Refusal
from synthetic.ranking import auc, decorrelating_weights, paired_difference, summary, weighted_auc

CASES = settings(max_examples=40, deadline=None)


def case(n, levels, seed):
    draw = np.random.default_rng(seed)
    y = draw.random(n) < 0.4
    y[:2] = True, False
    return y, draw.integers(0, levels, n) / 3, draw.uniform(0.1, 5, n)


@CASES
@given(st.integers(2, 80), st.integers(1, 50), st.integers(0, 999))
def test_auc_and_its_weighted_form_are_the_usual_ones_with_ties(n, levels, seed):
    y, score, weight = case(n, levels, seed)
    assert auc(y, score) == pytest.approx(roc_auc_score(y, score))
    assert weighted_auc(y, score, weight) == pytest.approx(roc_auc_score(y, score, sample_weight=weight))


def test_one_outcome_alone_is_refused():
    for call in (
        lambda y: auc(y, y),
        lambda y: weighted_auc(y, y, y + 1.0),
        lambda y: weighted_auc(y, y, decorrelating_weights(y, y)),
    ):
        for y in (np.zeros(5, bool), np.ones(5, bool)):
            with pytest.raises(Refusal, match="both outcomes"):
                call(y)


def test_the_paired_difference_and_its_error_equal_the_bootstraps():
    draw = np.random.default_rng(0)
    y = draw.random(600) < 0.4
    a = y + draw.standard_normal(600)
    b = 0.6 * y + 0.7 * a + draw.standard_normal(600)
    difference, error = paired_difference(y, a, b)
    assert difference == pytest.approx(auc(y, a) - auc(y, b))
    found = []
    for _ in range(600):
        rows = draw.integers(0, 600, 600)
        found.append(auc(y[rows], a[rows]) - auc(y[rows], b[rows]))
    assert error == pytest.approx(np.std(found), rel=0.12)
    assert paired_difference(y, a, a) == (0.0, 0.0)


@pytest.mark.parametrize("tag", ["binary", "gaussian", "two columns"])
def test_under_the_weights_tag_and_label_are_independent(tag):
    draw = np.random.default_rng(1)
    y = draw.random(40_000) < 0.3
    tags = {
        "binary": draw.random(40_000) < np.where(y, 0.7, 0.4),
        "gaussian": 0.5 * y + draw.standard_normal(40_000),
        "two columns": np.column_stack(
            [0.3 * y + draw.standard_normal(40_000), draw.random(40_000) < np.where(y, 0.6, 0.4)]
        ),
    }
    found = tags[tag]
    weight = decorrelating_weights(y, found)
    assert auc(y, found.reshape(len(y), -1)[:, 0]) > 0.55
    columns = found.reshape(len(y), -1)
    for column in columns.T:
        assert weighted_auc(y, column, weight) == pytest.approx(0.5, abs=0.02)
    p = LogisticRegression(C=1e8).fit(columns, y).predict_proba(columns)[:, 1]
    raw = np.where(y, y.mean() / p, (1 - y.mean()) / (1 - p))
    np.testing.assert_allclose(weight, np.minimum(raw, np.percentile(raw, 99)), rtol=1e-3)


def test_what_does_not_lean_on_the_tag_keeps_its_auc():
    draw = np.random.default_rng(2)
    y = draw.random(40_000) < 0.4
    tag = draw.random(40_000) < np.where(y, 0.7, 0.3)
    biology = y + draw.standard_normal(40_000)
    assert weighted_auc(y, biology, decorrelating_weights(y, tag)) == pytest.approx(auc(y, biology), abs=0.01)
    assert weighted_auc(y, biology + 2 * tag, decorrelating_weights(y, tag)) < auc(y, biology + 2 * tag) - 0.05


def test_a_tag_that_gives_the_label_away_still_has_finite_weights():
    y = np.random.default_rng(0).random(500) < 0.5
    assert np.isfinite(decorrelating_weights(y, y.astype(float))).all()


def test_a_summary_of_one_seed_claims_no_spread():
    assert summary([0.7]) == {"mean": 0.7, "sd": None, "low": None, "high": None, "values": [0.7]}
    found = summary([0.6, 0.8])
    # Student's t with one degree of freedom
    assert (found["high"] - found["mean"]) == pytest.approx(12.706 * found["sd"] / np.sqrt(2), rel=1e-3)
