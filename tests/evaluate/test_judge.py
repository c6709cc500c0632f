import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from mmjepa.evaluate.judge import Arm, evaluate_files, judge
from mmjepa.evaluate.probe import LinearProbe
from mmjepa.evaluate.tables import EmbeddingTable, ScoreTable, write_embeddings, write_scores
from mmjepa.refusal import Refusal

TIME = np.datetime64("2021-05-01", "us")


def site(n=600, seed=0, first=0, width=6, split=True, sign=1.0):
    """z = log-odds + noise in its first feature; the log-odds are the oracle."""
    random = np.random.default_rng(seed)
    eta = random.normal(size=n) * 1.5
    z = random.normal(size=(n, width))
    z[:, 0] = sign * eta + 0.5 * z[:, 0]
    ids, at = np.arange(first, first + n), np.full(n, TIME)
    names = np.array(["train", "train", "tuning", "held_out", "held_out"])[np.arange(n) % 5] if split else None
    labels = pd.DataFrame(
        {
            "subject_id": ids,
            "prediction_time": at,
            "value": pd.array(random.random(n) < 1 / (1 + np.exp(-eta)), dtype="boolean"),
        }
    )
    return EmbeddingTable(ids, at, z, names), labels, ScoreTable(ids, at, eta, "log_odds")


def arms_of(inside, outside):
    return [
        Arm("tuned", inside[0], outside[0], LinearProbe()),
        Arm("weak", inside[0], outside[0], LinearProbe(C=1e4)),
        Arm("oracle", inside[2], outside[2], oracle=True),
    ]


@pytest.fixture(scope="module")
def result():
    inside, outside = site(), site(seed=1, first=10_000, split=False)
    arms = arms_of(inside, outside)
    return judge(arms, inside[1], outside_labels=outside[1], train_limit=150, draws=300, reference="weak")


def code_of(call, *arguments, **keywords):
    with pytest.raises(Refusal) as caught:
        call(*arguments, **keywords)
    return caught.value.code


def test_the_result_is_plain_json_without_nan(result):
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_held_out_and_outside_rows_are_counted(result):
    inside, outside = result["sites"]["inside"], result["sites"]["outside"]
    assert (inside["rows"], inside["subjects"], inside["excluded"]) == (240, 240, {"other_split": 360})
    assert (outside["rows"], outside["excluded"]) == (600, {})
    assert result["train"]["subjects"] == 150
    assert result["train"]["labelled_subjects_available"] == 360


def test_every_measure_of_every_arm_has_an_interval_around_it(result):
    for where in result["sites"].values():
        for name in ("tuned", "weak", "oracle"):
            for measure in ("auroc", "auprc", "brier", "calibration_intercept", "calibration_slope"):
                found = where["arms"][name][measure]
                assert found["interval"][0] < found["value"] < found["interval"][1]


def test_the_number_is_that_of_a_probe_fitted_by_hand():
    table, labels, _ = site()
    found = judge([Arm("a", table)], labels, draws=20)["sites"]["inside"]["arms"]["a"]["auroc"]["value"]
    y, fit = labels["value"].to_numpy(bool), table.split != "held_out"
    probe = LinearProbe().fit(table.z[fit], y[fit], table.subject_id[fit])
    assert found == pytest.approx(roc_auc_score(y[~fit], probe.decision_function(table.z[~fit])))


def test_oracle_is_ready_scores_calibrated_and_outside_the_family(result):
    oracle = result["sites"]["outside"]["arms"]["oracle"]
    low, high = oracle["calibration_slope"]["interval"]
    assert low < 1 < high
    assert "q" not in oracle["auroc_difference"]
    assert "q" in result["sites"]["outside"]["arms"]["tuned"]["auroc_difference"]
    assert result["sites"]["inside"]["arms"]["weak"]["auroc_difference"] is None
    assert [arm["learner"] for arm in result["arms"]][2] == "ready scores, nothing fitted"


def test_held_out_labels_and_the_outside_site_change_no_probe():
    inside, outside = site(), site(seed=1, first=10_000, split=False)
    base = judge(arms_of(inside, outside), inside[1], outside_labels=outside[1], draws=20)
    flipped = inside[1].copy()
    held = inside[0].split == "held_out"
    flipped.loc[held, "value"] = ~flipped.loc[held, "value"]
    other = site(seed=9, first=50_000, split=False, sign=-1)
    again = judge(arms_of(inside, other), flipped, outside_labels=other[1], draws=20)
    assert base["arms"] == again["arms"]
    before, after = (run["sites"]["inside"]["arms"]["tuned"]["auroc"]["value"] for run in (base, again))
    assert before == pytest.approx(1 - after)
    assert again["sites"]["outside"]["arms"]["tuned"]["auroc"]["value"] < 0.5


def test_the_limited_subjects_are_the_same_for_every_arm_and_row_order_is_nothing():
    table, labels, scores = site()
    order = np.random.default_rng(0).permutation(len(table))
    moved = EmbeddingTable(table.subject_id[order], table.prediction_time[order], table.z[order], table.split[order])
    arms = [Arm("a", table), Arm("b", moved), Arm("oracle", scores, oracle=True)]
    found = judge(arms, labels.sample(frac=1, random_state=0), train_limit=40, draws=50)["sites"]["inside"]["arms"]
    assert found["a"]["auroc"]["value"] == pytest.approx(found["b"]["auroc"]["value"])
    assert found["b"]["auroc_difference"]["value"] == pytest.approx(0, abs=1e-9)


def test_only_rows_that_every_arm_has_are_judged_and_the_rest_is_counted():
    table, labels, scores = site()
    part = EmbeddingTable(table.subject_id[50:], table.prediction_time[50:], table.z[50:], table.split[50:])
    labels.loc[100, "value"] = pd.NA
    found = judge([Arm("whole", table), Arm("part", part)], labels, draws=20)["sites"]["inside"]
    assert found["excluded"]["labels_without_row:part"] == 50
    assert found["excluded"]["labels_without_value"] == 1
    assert found["rows"] + found["excluded"]["other_split"] == 549
    assert len(scores) == 600


def test_shuffled_labels_give_half():
    table, labels, _ = site(n=3000)
    values = labels["value"].to_numpy(bool)
    labels["value"] = pd.array(np.random.default_rng(5).permutation(values), dtype="boolean")
    found = judge([Arm("a", table)], labels, draws=200)["sites"]["inside"]["arms"]["a"]["auroc"]
    error = (found["interval"][1] - found["interval"][0]) / 3.92
    assert abs(found["value"] - 0.5) < 3 * error


def test_a_table_without_split_gets_one_by_subject_and_says_so():
    table, labels, _ = site(split=False)
    first = judge([Arm("a", table)], labels, draws=20)
    assert "drawn by subject" in first["split_rule"]
    assert 50 < first["sites"]["inside"]["rows"] < 130
    given = pd.Series(np.where(np.arange(600) < 300, "train", "held_out"), index=np.arange(600))
    assert judge([Arm("a", table)], labels, splits=given, draws=20)["sites"]["inside"]["rows"] == 300


def test_bad_requests_are_refused():
    table, labels, scores = site()
    one = labels.assign(value=pd.array([True] * 600, dtype="boolean"))
    late = labels.assign(prediction_time=TIME + np.timedelta64(1, "us"))
    assert code_of(judge, [Arm("a", table), Arm("a", table)], labels) == "JUDGE_ARMS"
    assert code_of(judge, [Arm("a", table)], labels, reference="b") == "JUDGE_ARMS"
    assert code_of(judge, [Arm("a", table)], labels, outside_labels=labels) == "JUDGE_ARMS"
    assert code_of(judge, [Arm("a", table, scores)], labels, outside_labels=labels, draws=5) == "JUDGE_ARMS"
    assert code_of(judge, [Arm("a", table)], one) == "PROBE_ONE_CLASS"
    assert code_of(judge, [Arm("a", table)], labels, draws=0) == "JUDGE_RANGE"
    assert code_of(judge, [Arm("a", table)], labels, train_limit=-3) == "JUDGE_RANGE"
    assert code_of(judge, [Arm("a", table)], late) == "JUDGE_EMPTY"
    moved = EmbeddingTable(table.subject_id, table.prediction_time, table.z, np.roll(table.split, 1))
    assert code_of(judge, [Arm("a", table), Arm("b", moved)], labels) == "SPLIT_OVERLAP"


def test_files_are_judged_as_tables_are(tmp_path):
    for name, (table, labels, scores) in {"in": site(), "out": site(seed=1, first=10_000, split=False)}.items():
        write_embeddings(tmp_path / f"{name}.parquet", table)
        write_scores(tmp_path / f"{name}-oracle.parquet", scores)
        (tmp_path / name).mkdir()
        labels.rename(columns={"value": "boolean_value"}).astype({"boolean_value": bool}).to_parquet(
            tmp_path / name / "0.parquet"
        )
    arguments = {"outside": tmp_path / "out.parquet", "outside_labels": tmp_path / "out", "draws": 50}
    oracles = {"oracle": tmp_path / "in-oracle.parquet", "outside_oracle": tmp_path / "out-oracle.parquet"}
    found = evaluate_files(
        tmp_path / "in.parquet", tmp_path / "in", **arguments, **oracles, out=tmp_path / "results.json"
    )
    assert [arm["name"] for arm in found["arms"]] == ["tuned", "weak", "oracle"]
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert found["collapse"]["width"] == 6
    assert (
        code_of(evaluate_files, tmp_path / "in.parquet", tmp_path / "in", outside=tmp_path / "x") == "EVALUATE_OUTSIDE"
    )
    again = {"out": tmp_path / "results.json"}
    assert code_of(evaluate_files, tmp_path / "in.parquet", tmp_path / "in", **again) == "OUTPUT_EXISTS"


def test_judging_needs_neither_torch_nor_any_data_or_model_room():
    probe = (
        "import sys, mmjepa.evaluate.judge, mmjepa.evaluate.rollout, mmjepa.evaluate.collapse;"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'monai')"
        " or m.startswith('mmjepa.') and m.split('.')[1] not in ('evaluate', 'files', 'keyed', 'refusal')])"
    )
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.strip() == "[]"
