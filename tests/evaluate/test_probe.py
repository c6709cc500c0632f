import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmjepa.evaluate.probe import FOLDS, PENALTIES, LinearProbe, subject_folds
from mmjepa.refusal import Refusal


def problem(n=120, width=20, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, width)) * random.uniform(0.1, 30, width) + random.normal(size=width) * 10
    standard = (x - x.mean(axis=0)) / x.std(axis=0)
    y = (random.random(n) < 1 / (1 + np.exp(-standard[:, 0] - 0.8 * standard[:, 1]))).astype(int)
    return x, y


def theirs(penalty):
    return make_pipeline(StandardScaler(), LogisticRegression(C=penalty, tol=1e-10, max_iter=100_000))


@pytest.mark.parametrize("width", [20, 300])
@pytest.mark.parametrize("penalty", [1e-8, 1e-3, 1.0, 1e4])
def test_the_solution_is_that_of_scikit_learn(width, penalty):
    x, y = problem(width=width)
    ours = LinearProbe(C=penalty).fit(x, y).decision_function(x)
    expected = theirs(penalty).fit(x, y).decision_function(x)
    assert ours == pytest.approx(expected, abs=1e-3 * np.abs(expected).max())


def test_the_penalty_with_the_best_grouped_log_loss_is_chosen():
    x, y = problem()
    groups = np.arange(120) // 2
    probe = LinearProbe(seed=3).fit(x, y, groups)
    fold = subject_folds(groups, y, FOLDS, 3)
    losses = []
    for penalty in PENALTIES:
        p = np.empty(len(y))
        for k in range(FOLDS):
            p[fold == k] = theirs(penalty).fit(x[fold != k], y[fold != k]).predict_proba(x[fold == k])[:, 1]
        losses.append(log_loss(y, p))
    assert probe.cv_log_loss_ == pytest.approx(losses, rel=1e-3)
    assert PENALTIES[int(np.argmin(losses))] == probe.C_


def test_folds_keep_a_subject_together_and_share_the_positives():
    groups = np.repeat(np.arange(50), 4)
    y = groups < 10
    fold = subject_folds(groups, y, 5, 0)
    assert all(len(set(fold[groups == g])) == 1 for g in range(50))
    assert [len(set(groups[y & (fold == k)])) for k in range(5)] == [2] * 5


def test_the_order_of_rows_does_not_matter():
    x, y = problem()
    order = np.random.default_rng(1).permutation(len(y))
    groups = np.arange(len(y))
    a, b = LinearProbe().fit(x, y, groups), LinearProbe().fit(x[order], y[order], groups[order])
    assert a.C_ == b.C_
    assert a.coef_ == pytest.approx(b.coef_, rel=1e-4, abs=1e-7)


def test_constant_and_repeated_features_are_harmless():
    x, y = problem()
    twice = np.column_stack([x, x[:, :3], np.full(len(x), 7.0)])
    probe = LinearProbe(C=1.0).fit(twice, y)
    assert probe.coef_[0, -1] == 0
    assert np.isfinite(probe.decision_function(twice)).all()


def test_noise_alone_gets_the_prevalence():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(400, 50)), (np.arange(400) % 4 == 0).astype(int)
    p = LinearProbe().fit(x, y).predict_proba(random.normal(size=(100, 50)))[:, 1]
    assert p == pytest.approx(0.25, abs=0.1)


def test_it_is_a_scikit_learn_estimator_and_says_what_it_is():
    x, y = problem()
    probe = clone(LinearProbe(C=1e4, seed=2))
    assert probe.get_params() == {"C": 1e4, "seed": 2}
    assert "almost no penalty" in probe.learner
    assert "tuned" in LinearProbe().learner
    names = np.array(["no", "yes"])[y]
    assert set(probe.fit(x, names).predict(x)) <= {"no", "yes"}
    assert probe.predict_proba(x).sum(axis=1) == pytest.approx(1)


def test_too_little_to_learn_from_is_refused():
    x, y = problem()
    for bad in (np.zeros(120, int), (np.arange(120) == 5).astype(int)):
        with pytest.raises(Refusal) as caught:
            LinearProbe().fit(x, bad)
        assert caught.value.code == "PROBE_ONE_CLASS"
    with pytest.raises(Refusal) as caught:
        LinearProbe(C=1.0).fit(x, y).predict(x[:, :5])
    assert caught.value.code == "PROBE_WIDTH"
