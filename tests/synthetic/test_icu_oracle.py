"""The oracle's numbers are those of the law, its risks are calibrated, and no forecast beats the floor."""

import numpy as np
import pytest
from scipy.special import expit

from mmjepa.refusal import Refusal
from synthetic import oracle
from synthetic.icu import Icu, simulate
from synthetic.icu_oracle import (
    SHIFTS,
    auc,
    difference,
    floor_absolute,
    forecast_table,
    icu_shift_table,
    icu_table,
    known_course,
    mean,
    ratio,
    risk_table,
    slope,
    spread,
    world_table,
)

LAW = Icu()


def value(table):
    return {name: number["value"] for name, number in table.items()}


def test_the_world_is_as_it_was_measured():
    found = value(world_table(LAW, 12_000, 0))
    rates = {
        "death": 0.146,
        "death_deteriorating": 0.54,
        "death_stable": 0.013,
        "discharged": 0.37,
        "in_at_end": 0.48,
        "hours_treated": 0.184,
        "labs_measured": 0.282,
        "death_never_from_0": 0.216,
        "death_always_from_0": 0.055,
        "death_never_from_24": 0.208,
        "death_always_from_24": 0.121,
    }
    for name, rate in rates.items():
        assert found[name] == pytest.approx(rate, abs=0.01), name
    sizes = {
        "moved_ratio_in_unit": 3.30,
        "moved_ratio_all": 3.45,
        "distance_never_from_0": 0.51,
        "distance_always_from_0": 1.93,
        "distance_never_from_24": 0.41,
        "distance_always_from_24": 1.27,
    }
    for name, size in sizes.items():
        assert found[name] == pytest.approx(size, abs=0.1 if "ratio" in name else 0.03), name
    assert found["naive_severity"] == pytest.approx(0.285, abs=0.03)
    assert found["naive_death"] == pytest.approx(0.41, abs=0.03)


def test_the_best_observer_of_the_record_is_calibrated_and_nears_one_who_knows_the_state():
    stays = simulate(LAW, 12, 0, 4000)
    record, state = risk_table(stays, LAW, 128, 12), risk_table(stays, LAW, 32, 12, know_state=True)
    for window, seen, known in (("13_24", 0.865, 0.889), ("25_47", 0.935, 0.946)):
        for table, expected in ((record, seen), (state, known)):
            # 4,000 stays know an AUC to +-.03 and +-.014
            assert table[f"auc_{window}"]["low"] < expected < table[f"auc_{window}"]["high"]
            assert table[f"prevalence_{window}"]["low"] < table[f"risk_{window}"]["value"]
            assert table[f"prevalence_{window}"]["high"] > table[f"risk_{window}"]["value"]
        assert state[f"auc_{window}"]["value"] > record[f"auc_{window}"]["value"]
        assert record[f"slope_{window}"]["high"] > 0.95 > 0.8 < record[f"slope_{window}"]["value"] < 1.15
    assert record["auc_25_47"]["value"] == pytest.approx(0.939, abs=0.01)


def test_no_forecast_beats_the_floor_and_knowledge_helps():
    found = value(forecast_table(simulate(LAW, 1, 0, 500), 64, 1))
    for h in (1, 6, 12, 24, 35):
        assert found[f"known_{h}h"] == pytest.approx(floor_absolute(LAW, h), rel=0.06)
        assert found[f"known_{h}h"] <= found[f"onset_unknown_{h}h"] < found[f"record_{h}h"]
        assert found[f"onset_unknown_{h}h"] <= found[f"copy_{h}h"]
        assert found[f"record_{h}h"] < found[f"climatology_{h}h"]
    for h in (12, 24, 35):  # treatment on record tells of onset
        assert found[f"record_and_choices_{h}h"] < found[f"record_{h}h"] - 0.02


def test_the_floor_is_the_spread_of_what_the_law_simulates():
    stays = simulate(LAW, 2, 0, 4000)
    for ahead in (1, 12, 30):
        (error,) = np.moveaxis(stays.states[:, [5 + ahead]] - known_course(stays, 5, (5 + ahead,)), 1, 0)
        assert np.abs(error.mean(0)).max() < 4 * spread(LAW, ahead).max() / np.sqrt(4000)
        assert error.std(0) == pytest.approx(spread(LAW, ahead), rel=0.04)
        assert np.abs(error).sum(1).mean() == pytest.approx(floor_absolute(LAW, ahead), rel=0.03)
    root = [np.sqrt((spread(LAW, ahead) ** 2).sum()) for ahead in (1, 6, 12, 24, 48)]
    assert root == pytest.approx([0.112, 0.250, 0.320, 0.382, 0.421], abs=0.0015)


def test_auc_has_the_value_of_the_other_oracles_and_the_spread_of_resamples():
    rng = np.random.default_rng(0)
    y = rng.random(600) < 0.2
    score = np.round(rng.standard_normal(600) + y, 1)  # with ties
    found = auc(y, score)
    assert found["value"] == pytest.approx(oracle.auc(y, score), abs=1e-12)
    again = [oracle.auc(y[rows], score[rows]) for rows in (rng.integers(0, 600, 600) for _ in range(600))]
    assert (found["high"] - found["low"]) / 3.92 == pytest.approx(np.std(again), rel=0.12)


def test_a_calibrated_risk_has_slope_one_and_an_overconfident_one_less():
    rng = np.random.default_rng(1)
    log_odds = 1.5 * rng.standard_normal(20_000) - 2
    y = rng.random(20_000) < expit(log_odds)
    fair, bold = slope(y, expit(log_odds)), slope(y, expit(2 * log_odds))
    assert fair["low"] < 1 < fair["high"]
    assert bold["value"] == pytest.approx(fair["value"] / 2, abs=1e-6)
    assert fair["high"] - fair["low"] < 0.1


@pytest.mark.parametrize(("what", "truth"), [(mean, 0.75), (difference, 0.5), (ratio, 2.0)])
def test_intervals_cover_the_truth_about_19_times_in_20(what, truth):
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        of = rng.random(300) < 0.5
        x = rng.exponential(np.where(of, 1.0, 0.5))
        number = what(x) if what is mean else what(x, of)
        covered += number["low"] < truth < number["high"]
    assert 0.91 < covered / 400 < 0.985


def test_an_observer_with_the_wrong_law_is_wrong_in_the_direction_of_the_shift():
    table = {name: value(row) for name, row in icu_shift_table(500, 32, 3).items()}
    assert list(table) == ["internal", *(f"{knob}={value:g}" for knob, value in SHIFTS)]
    same = table["internal"]
    assert same["env_risk_25_47"] == same["source_risk_25_47"]
    untreated = table["treatment_factor=0"]
    assert untreated["death"] > same["death"] + 0.04
    assert untreated["source_risk_25_47"] < untreated["env_risk_25_47"] - 0.02
    assert table["measured_slope=0"]["death"] == same["death"] == table["lab_offset=0.5"]["death"]
    assert table["lab_offset=0.5"]["env_risk_25_47"] == pytest.approx(same["env_risk_25_47"], abs=1e-3)
    assert abs(table["lab_offset=0.5"]["source_risk_25_47"] - same["source_risk_25_47"]) > 3e-3
    assert table["discharge_bias=-3.6"]["death"] < same["death"]


def test_tables_are_plain_numbers_with_intervals_and_the_same_each_time():
    table = icu_table(500, 500, 8, 4)
    assert table == icu_table(500, 500, 8, 4)
    assert set(table) == {"world", "record", "state", "forecast", "floor"}
    for part in ("world", "record", "state", "forecast"):
        for number in table[part].values():
            assert number["low"] <= number["value"] <= number["high"]
            assert {type(x) for x in number.values()} == {float}


@pytest.mark.parametrize(("stays", "particles", "law"), [(499, 16, LAW), (500, 16, Icu(hours=40)), (500, 15, LAW)])
def test_tables_too_small_to_fill_are_refused(stays, particles, law):
    for make in (lambda: icu_table(stays, stays, particles, 0, law), lambda: icu_shift_table(stays, particles, 0, law)):
        with pytest.raises(Refusal, match="SYNTHETIC_RANGE"):
            make()
