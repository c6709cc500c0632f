import numpy as np
import pytest
from scipy.stats import false_discovery_control

from mmjepa.evaluate import metrics
from mmjepa.evaluate.bootstrap import SubjectBootstrap, benjamini_hochberg, difference, interval


def test_draws_take_whole_subjects_and_keep_both_strata():
    subject = np.repeat(np.arange(50), 3)
    y = (subject % 5 == 0) & (np.arange(150) % 3 == 1)
    bootstrap = SubjectBootstrap(subject, y, draws=100)
    for weights in bootstrap.weights():
        by_subject = weights.reshape(len(weights), 50, 3)
        assert (by_subject == by_subject[:, :, :1]).all()
        ever = np.arange(50) % 5 == 0
        assert (by_subject[:, ever, 0].sum(axis=1) == 10).all()
        assert (by_subject[:, ~ever, 0].sum(axis=1) == 40).all()


def test_each_subject_is_drawn_once_on_average_with_multinomial_spread():
    counts = SubjectBootstrap(np.arange(40), None, draws=4000, seed=1).counts
    assert np.abs(counts.mean(axis=0) - 1).max() < 5 * np.sqrt((1 - 1 / 40) / 4000)
    assert counts.var() == pytest.approx(1 - 1 / 40, abs=0.03)


def test_draws_depend_on_the_seed_and_not_on_the_order_of_rows():
    subject = np.arange(30)
    a = SubjectBootstrap(subject, subject % 3 == 0, seed=1, draws=10).counts
    assert (a == SubjectBootstrap(subject[::-1], subject[::-1] % 3 == 0, seed=1, draws=10).counts).all()
    assert (a != SubjectBootstrap(subject, subject % 3 == 0, seed=2, draws=10).counts).any()


def test_blocks_of_draws_do_not_change_the_result(monkeypatch):
    subject, y, score = np.arange(60), np.arange(60) % 2, np.sin(np.arange(60))
    bootstrap = SubjectBootstrap(subject, y, draws=50)
    whole = bootstrap(lambda w: (metrics.auroc(y, score, w),))
    monkeypatch.setattr("mmjepa.evaluate.bootstrap.CELLS", 130)
    assert (bootstrap(lambda w: (metrics.auroc(y, score, w),)) == whole).all()


def test_mean_interval_is_the_normal_one():
    x = np.random.default_rng(0).normal(size=400)
    drawn = SubjectBootstrap(np.arange(400), None, draws=4000)(lambda w: (w @ x / w.sum(axis=1),))
    low, high = interval(drawn[0])
    half = 1.96 * x.std() / 20
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.01)


def test_repeated_rows_of_a_subject_do_not_narrow_the_interval():
    random = np.random.default_rng(0)
    score, subject = random.normal(size=200), np.arange(200)
    y = (random.random(200) < 0.4).astype(int)

    def width(times):
        rows = np.repeat(subject, times)
        drawn = SubjectBootstrap(rows, y[rows], draws=1000)(lambda w: (metrics.auroc(y[rows], score[rows], w),))
        low, high = interval(drawn[0], logit=True)
        return high - low

    assert width(8) == pytest.approx(width(1), rel=1e-9)


def test_an_interval_needs_draws_with_a_value():
    assert interval(np.r_[np.full(10, np.nan), np.ones(90)]) is None
    assert interval(np.r_[np.full(4, np.nan), np.ones(96)]) == [1, 1]


def test_a_model_against_itself_differs_by_exactly_nothing():
    drawn = np.random.default_rng(0).random(500)
    found = difference(drawn, drawn, 0.0)
    assert (found["value"], found["interval"], found["p"]) == (0, [0, 0], 1)


def test_a_clear_difference_has_a_small_p_and_an_interval_off_zero():
    random = np.random.default_rng(0)
    found = difference(0.8 + 0.01 * random.normal(size=2000), np.full(2000, 0.7), 0.1)
    assert found["interval"][0] > 0
    assert found["p"] == pytest.approx(2 / 2001)
    assert found["detectable"] == pytest.approx(0.028, abs=0.002)


def test_q_values_are_those_of_scipy():
    p = np.random.default_rng(0).random(15) ** 3
    assert benjamini_hochberg(list(p)) == pytest.approx(false_discovery_control(p))
    assert benjamini_hochberg([]) == []
