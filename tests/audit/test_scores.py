"""A model that beats the best possible, or not even the size of the record, is told so."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from mmjepa.audit.labels import record_size_tells
from mmjepa.audit.scan import Rows
from mmjepa.audit.scores import above_the_oracle, auroc_draws, read_oracle, read_scores
from mmjepa.refusal import Refusal

N, HOUR_US = 300, 3_600_000_000
T = pd.Timestamp("2100-01-01")


def tables(noise: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The oracle knows the log-odds; the model knows the label through ``noise``."""
    draw = np.random.default_rng(0)
    odds = 2 * draw.normal(size=N)
    y = draw.random(N) < 1 / (1 + np.exp(-odds))
    key = pd.DataFrame({"subject_id": range(N), "prediction_time": T})
    score = np.where(noise < 0, odds - noise * draw.normal(size=N), y + noise * draw.normal(size=N))
    return key.assign(score=score), key.assign(y=y, best=odds)


@pytest.mark.parametrize(("noise", "verdict"), [(0.3, "fail"), (-0.2, "pass"), (-5, "pass")])
def test_only_a_model_above_the_oracle_by_three_errors_fails(noise, verdict):
    found = above_the_oracle(*tables(noise))
    assert found.verdict == verdict, found.sentence


def test_tables_that_share_too_few_rows_are_not_compared():
    scores, oracle = tables(-1)
    assert above_the_oracle(scores.assign(subject_id=scores["subject_id"] + N - 5), oracle).verdict == "not-applicable"


def test_a_table_without_its_columns_is_refused(tmp_path):
    pd.DataFrame({"subject_id": [1], "prediction_time": [T], "y": [True]}).to_parquet(tmp_path / "t.parquet")
    for read in (read_scores, read_oracle):
        with pytest.raises(Refusal, match="SCORES_TABLE"):
            read(tmp_path / "t.parquet")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_the_auroc_of_a_draw_is_that_of_the_drawn_rows(seed):
    draw = np.random.default_rng(seed)
    score, y = draw.integers(6, size=40).astype(float), np.arange(40) % 3 == 0
    value, draws = auroc_draws(score[None], y, np.arange(40))
    assert value[0] == pytest.approx(roc_auc_score(y, score))
    assert abs(np.nanmean(draws) - value[0]) < 0.05


def sized(events_of, extra: int) -> tuple:
    """Records of 5 to 14 events; those of true labels have up to ``extra`` more."""
    draw = np.random.default_rng(2)
    y = draw.random(N) < 0.4
    counts = draw.integers(5, 15, size=N) + y * draw.integers(0, extra + 1, size=N)
    rows = [(s, float(h), f"LAB//{draw.integers(5)}", 1.0) for s in range(N) for h in draw.uniform(1, 99, counts[s])]
    return events_of(rows, N), Rows(np.arange(N), np.full(N, 100 * HOUR_US), y.astype(float))


@pytest.mark.parametrize(("extra", "verdict"), [(0, "pass"), (5, "pass"), (20, "warn")])
def test_record_size_warns_only_where_its_own_interval_is_above_060(events_of, extra, verdict):
    assert record_size_tells(*sized(events_of, extra)).verdict == verdict


@pytest.mark.parametrize(("noise", "verdict"), [(2.0, "fail"), (0.5, "fail"), (0.1, "warn")])
def test_record_size_fails_where_a_model_is_no_better(events_of, noise, verdict):
    events, rows = sized(events_of, 20)
    key = {"subject_id": rows.subject, "prediction_time": rows.t_us.astype("datetime64[us]")}
    score = rows.y + noise * np.random.default_rng(5).normal(size=N)
    found = record_size_tells(events, rows, pd.DataFrame(key).assign(score=score))
    assert found.verdict == verdict, found.sentence
