import numpy as np
import pytest

from mmjepa.evaluate.rollout import rollout_metrics
from mmjepa.refusal import Refusal

PHI, SIZE, HOURS, WIDTH, START = 0.97, 4000, 60, 4, 5


@pytest.fixture(scope="module")
def world():
    """Stationary AR(1), variance 1: the optimal forecast is phi^h z."""
    random = np.random.default_rng(0)
    z = np.empty((SIZE, HOURS, WIDTH))
    z[:, 0] = random.normal(size=(SIZE, WIDTH))
    for t in range(1, HOURS):
        z[:, t] = PHI * z[:, t - 1] + np.sqrt(1 - PHI**2) * random.normal(size=(SIZE, WIDTH))
    zhat = z[:, [START]] * PHI ** np.arange(1, 49)[None, :, None]
    return z, zhat


def measure(z, zhat, **keywords):
    keywords = {"start": START, "draws": 200, **keywords}
    return rollout_metrics(z, zhat, np.arange(len(z)), np.zeros(z.shape[1:]), **keywords)


def pick(result, forecast, h, cohort="shrinking"):
    table = result.table
    return table[(table.forecast == forecast) & (table.h == h) & (table.cohort == cohort)].iloc[0]


def test_the_optimal_forecast_of_an_ar1_world_has_its_closed_form_errors(world):
    result = measure(*world)
    mean_absolute = WIDTH * np.sqrt(2 / np.pi)
    for h in (1, 6, 48):
        model, copy = pick(result, "model", h), pick(result, "copy_forward", h)
        assert pytest.approx(mean_absolute * np.sqrt(1 - PHI ** (2 * h)), rel=0.02) == model.D
        assert pytest.approx(mean_absolute * np.sqrt(2 - 2 * PHI**h), rel=0.02) == copy.D
        assert pytest.approx(mean_absolute, rel=0.02) == pick(result, "climatology", h).D
        assert model.skill == pytest.approx(1 - np.sqrt(1 - PHI ** (2 * h)), abs=0.02)
        assert model.mase == pytest.approx(model.D / copy.D)
        assert model.normalised == pytest.approx(model.D / mean_absolute, rel=0.02)
        assert model.D_low < model.D < model.D_high


def test_drift_alone_prefers_the_forecast_that_forecasts_nothing(world):
    drift = measure(*world).summary["drift"]["shrinking"]
    assert drift["model"]["value"] == pytest.approx(300, abs=15)
    assert drift["copy_forward"]["value"] == pytest.approx(406, abs=20)
    assert drift["climatology"]["value"] == pytest.approx(0, abs=4)
    low, high = drift["model"]["interval"]
    assert low < drift["model"]["value"] < high


def test_the_identity_predictor_is_copy_forward(world):
    z, zhat = world
    result = measure(z, np.repeat(z[:, [START]], 48, axis=1))
    model = result.table[result.table.forecast == "model"]
    assert model.mase.to_numpy() == pytest.approx(1)
    assert model.mase_low.to_numpy() == pytest.approx(1)
    assert zhat.shape[1] == result.summary["horizon"]


def test_a_perfect_forecast_has_no_error_and_full_skill(world):
    z, _ = world
    result = measure(z, z[:, START + 1 : START + 49])
    model = result.table[result.table.forecast == "model"]
    assert (model.D == 0).all()
    assert (model.skill == 1).all()
    assert "model" not in result.summary["drift"]["shrinking"]  # 0 / 0


def test_linear_extrapolation_is_exact_on_a_line():
    z = np.arange(12.0)[None, :, None] * np.ones((3, 1, 2)) + np.arange(3)[:, None, None]
    result = measure(z, np.zeros((3, 4, 2)))
    assert pick(result, "linear", 4).D == 0
    assert pick(result, "copy_forward", 4).D == 8


def test_the_hour_of_a_prediction_is_start_plus_h():
    z = np.zeros((2, 12, 1))
    z[:, START + 3] = 1
    zhat = np.zeros((2, 5, 1))
    zhat[:, 2] = 1
    assert (measure(z, zhat).table.query("forecast == 'model'").D == 0).all()


def test_cohorts_shrink_or_stay_fixed_and_are_counted():
    z, zhat = np.random.default_rng(0).normal(size=(6, 12, 2)), np.zeros((6, 4, 2))
    lengths = np.array([5, 7, 8, 12, 12, 12])
    subject = np.array([1, 1, 2, 3, 3, 4])
    result = rollout_metrics(z, zhat, subject, np.zeros((12, 2)), start=START, lengths=lengths, draws=50)
    assert result.summary["shrinking_windows"] == [5, 4, 3, 3]
    assert result.summary["fixed_windows"] == [3, 3, 3, 3]
    assert pick(result, "model", 1).subjects == 4
    assert pick(result, "model", 1, "fixed").subjects == 2
    expected = np.abs(z[3:, START + 1]).sum(axis=1).mean()
    assert pytest.approx(expected) == pick(result, "model", 1, "fixed").D


def test_nan_beyond_the_stay_equals_a_length(world):
    z, zhat = (part[:20].copy() for part in world)
    lengths = np.arange(20) * 2 + 8
    masked = np.where((np.arange(HOURS) < lengths[:, None])[..., None], z, np.nan)
    a, b = measure(z, zhat, lengths=lengths), measure(masked, zhat)
    assert a.table.equals(b.table)
    assert a.summary == b.summary


def test_input_that_does_not_fit_is_refused(world):
    z, zhat = (part[:4] for part in world)
    cases = [
        (z[:, :, :2], zhat, {}, "ROLLOUT_SHAPE"),
        (z, zhat, {"start": 0}, "ROLLOUT_SHAPE"),
        (z, np.full_like(zhat, np.nan), {}, "ROLLOUT_SHAPE"),
        (z, zhat, {"lengths": np.full(4, 3)}, "ROLLOUT_EMPTY"),
    ]
    for truth, forecast, keywords, code in cases:
        with pytest.raises(Refusal) as caught:
            measure(truth, forecast, **keywords)
        assert caught.value.code == code
