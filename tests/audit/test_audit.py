"""Every check of the audit fires on its planted fault and stays silent on a clean cohort."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from mmjepa.audit import audit, future_swap, prefix_invariance
from mmjepa.audit.events import NEVER, Events, Stays
from mmjepa.audit.scan import Rows, grouped_auroc, record_size, scan
from mmjepa.refusal import Refusal

HOUR = pd.Timedelta(hours=1)
START = pd.Timestamp("2150-03-01 08:30")
N = 160


def clean_events(seed: int = 0) -> pd.DataFrame:
    """One stay a subject: admission, codes and labs for 96 h, discharge with diagnoses known then. Half of them die later."""
    draw = np.random.default_rng(seed)
    rows = []
    for subject in range(1, N + 1):
        begin, severity = START + int(draw.integers(10_000)) * HOUR, draw.normal()
        rows.append((subject, begin, begin, "HOSPITAL_ADMISSION//EMERGENCY", np.nan))
        for _ in range(40):
            at = begin + float(draw.uniform(0.1, 95)) * HOUR
            code = int(draw.integers(25))
            value = severity * (code < 8) + 2 * draw.normal() if code < 20 else np.nan
            rows.append(
                (
                    subject,
                    at,
                    at + float(draw.uniform(0, 0.9)) * HOUR,
                    f"{'LAB' if code < 20 else 'DRUG'}//{code}",
                    value,
                )
            )
        end = begin + 96 * HOUR
        rows.append((subject, end, end, "HOSPITAL_DISCHARGE//HOME", np.nan))
        rows.append((subject, end, end + HOUR, f"DIAGNOSIS//{draw.integers(30)}", np.nan))
        if draw.random() < 1 / (1 + np.exp(-severity)):
            rows.append((subject, end + 500 * HOUR, end + 500 * HOUR, "MEDS_DEATH", np.nan))
    return pd.DataFrame(rows, columns=["subject_id", "time", "available_time", "code", "numeric_value"])


def clean_labels(events: pd.DataFrame) -> pd.DataFrame:
    """Death, asked 48 h after the admission; rows in random order."""
    begin = events[events["code"].str.startswith("HOSPITAL_ADMISSION")].set_index("subject_id")["time"]
    dead = begin.index.isin(events.loc[events["code"] == "MEDS_DEATH", "subject_id"])
    labels = pd.DataFrame(
        {"subject_id": begin.index, "prediction_time": begin.to_numpy() + 48 * HOUR, "boolean_value": dead}
    )
    return labels.sample(frac=1, random_state=0)


def clean_splits() -> pd.DataFrame:
    return pd.DataFrame({"subject_id": range(1, N + 1), "split": ["train", "tuning", "held_out", "train"] * (N // 4)})


def write(
    folder: Path,
    events: pd.DataFrame,
    labels: pd.DataFrame | None = None,
    splits: pd.DataFrame | None = None,
    files: int = 1,
) -> Path:
    """A cohort folder; rows go to the files in equal pieces of subjects."""
    for part in ("data", "metadata"):
        (folder / "ehr" / part).mkdir(parents=True)
    events = events.sort_values(["subject_id", "time"], kind="stable", na_position="first")
    events = events.astype({"numeric_value": "float32"})
    for i in range(files):
        piece = events[events["subject_id"] % files == i]
        piece.to_parquet(folder / f"ehr/data/{i}.parquet", index=False)
    pd.DataFrame({"code": sorted(set(events["code"]))}).to_parquet(folder / "ehr/metadata/codes.parquet", index=False)
    (clean_splits() if splits is None else splits).to_parquet(
        folder / "ehr/metadata/subject_splits.parquet", index=False
    )
    if labels is not None:
        (folder / "labels/death").mkdir(parents=True)
        labels.to_parquet(folder / "labels/death/0.parquet", index=False)
    return folder


def image_index(image_id: list[str], subject_id: list[int], **columns) -> pd.DataFrame:
    """An image index of 32-voxel crops, all taken at START unless told."""
    shape = {f"shape_{axis}": 32 for axis in "xyz"} | {f"spacing_{axis}": 1.0 for axis in "xyz"}
    table = {"image_id": image_id, "subject_id": subject_id, "time": START, "source_hash": image_id}
    return pd.DataFrame(table | shape | columns)


def findings(result: dict) -> dict[str, dict]:
    return {finding["check"]: finding for finding in result["findings"]}


def add(events: pd.DataFrame, rows: list[tuple], code: str) -> pd.DataFrame:
    """rows: (subject, time, available)."""
    new = pd.DataFrame(rows, columns=["subject_id", "time", "available_time"]).assign(code=code, numeric_value=np.nan)
    return pd.concat([events, new], ignore_index=True)


@pytest.fixture(scope="module")
def events() -> pd.DataFrame:
    return clean_events()


@pytest.fixture(scope="module")
def labels(events) -> pd.DataFrame:
    return clean_labels(events)


@pytest.mark.parametrize("seed", range(5))
def test_a_clean_cohort_fails_nothing(tmp_path, seed):
    events = clean_events(seed)
    result = audit(write(tmp_path / "cohort", events, clean_labels(events), files=2))
    assert result["fail"] == 0, [f for f in result["findings"] if f["verdict"] == "fail"]
    checks = findings(result)
    assert {check for check, found in checks.items() if found["verdict"] == "pass"} >= {
        "1", "1b", "1c", "4", "4b", "4c", "5", "6b", "6c", "7", "7b", "7c", "7d", "8", "9", "9b", "12", "13"
    }  # fmt: skip
    assert checks["6"]["verdict"] == "warn"


def test_a_subject_in_two_splits_fails(tmp_path, events, labels):
    splits = pd.concat([clean_splits(), pd.DataFrame({"subject_id": [1], "split": ["held_out"]})])
    result = audit(write(tmp_path / "cohort", events, labels, splits))
    assert (findings(result)["1"]["verdict"], findings(result)["1"]["count"], result["verdict"]) == ("fail", 1, "fail")


def test_a_subject_in_two_files_fails(tmp_path, events, labels):
    folder = write(tmp_path / "cohort", events, labels)
    events[events["subject_id"] == 3].astype({"numeric_value": "float32"}).to_parquet(folder / "ehr/data/more.parquet")
    assert findings(audit(folder))["1b"]["count"] == 1


def test_a_copied_subject_in_another_split_fails_and_in_the_same_split_does_not(tmp_path, events, labels):
    def copied(source: int, target: int) -> pd.DataFrame:
        twin = events[events["subject_id"] == source].assign(subject_id=target)
        return pd.concat(
            [
                events[events["subject_id"] != target],
                twin.assign(time=twin["time"] + HOUR, available_time=twin["available_time"] + HOUR),
            ]
        )

    assert findings(audit(write(tmp_path / "across", copied(1, 2))))["1c"]["count"] == 2
    assert findings(audit(write(tmp_path / "within", copied(1, 5))))["1c"]["count"] == 0


def test_one_image_of_two_subjects_fails(tmp_path, events):
    folder = write(tmp_path / "cohort", events)
    (folder / "ct").mkdir()
    image_index(list("abc"), [1, 2, 2], source_hash=list("xxy")).to_parquet(folder / "ct/index.parquet")
    assert findings(audit(folder))["1d"]["count"] == 1


def test_a_label_of_a_stranger_or_after_death_fails_and_outside_the_record_warns(tmp_path, events, labels):
    bad = labels.copy()
    dead = bad.index[bad["boolean_value"]][:2]
    bad.loc[dead, "prediction_time"] += pd.Timedelta(days=1000)
    alive = bad.index[~bad["boolean_value"]][:3]
    bad.loc[alive[0], "subject_id"] = 10_000
    bad.loc[alive[1:], "prediction_time"] -= pd.Timedelta(days=1000)
    found = findings(audit(write(tmp_path / "cohort", events, bad)))
    assert [(found[c]["verdict"], found[c]["count"]) for c in ("4", "4b", "4c")] == [
        ("fail", 1),
        ("fail", 2),
        ("warn", 4),
    ]


def test_a_code_that_is_the_label_fails_either_way_round(tmp_path, events, labels):
    for name, chosen in (("present", labels["boolean_value"]), ("absent", ~labels["boolean_value"])):
        rows = [
            (s, t - HOUR, t - HOUR)
            for s, t in labels.loc[chosen, ["subject_id", "prediction_time"]].itertuples(index=False)
        ]
        result = audit(write(tmp_path / name, add(events, rows, "FLAG//1"), labels))
        assert "FLAG//1" in findings(result)["5"]["sentence"]
        assert (findings(result)["5"]["count"], result["verdict"]) == (1, "fail")


@pytest.mark.parametrize(("code", "checks"), [("FLAG//1", {"4d", "5", "9", "9b"}), ("MEDS_DEATH", {"7c", "7d"})])
def test_a_row_without_a_time_is_visible_always_and_fails_where_it_tells(tmp_path, events, labels, code, checks):
    positive = labels.loc[labels["boolean_value"], "subject_id"]
    others = events[events["code"] != "MEDS_DEATH"]  # else 4d would find the label told by what follows it
    static = add(others, [(s, pd.NaT, pd.NaT) for s in positive], code)
    found = findings(audit(write(tmp_path / "cohort", static, labels)))
    assert checks <= {check for check, finding in found.items() if finding["verdict"] in ("fail", "warn")}
    assert found["7d"]["count"] == (len(positive) if code == "MEDS_DEATH" else 0)


def test_a_value_without_a_time_that_marks_true_labels_fails_and_one_that_does_not_passes(tmp_path, events, labels):
    age = labels["subject_id"] % 60 + 20.0
    for name, value in (("marks", age.where(~labels["boolean_value"], 200.0)), ("not", age)):
        rows = labels[["subject_id"]].assign(time=pd.NaT, available_time=pd.NaT, code="AGE", numeric_value=value)
        found = findings(audit(write(tmp_path / name, pd.concat([events, rows]), labels)))
        assert found["9"]["verdict"] == ("fail" if name == "marks" else "pass")
        assert found["5"]["verdict"] == found["7d"]["verdict"] == "pass"


def test_a_prediction_up_to_a_day_after_the_last_event_is_inside_the_record(tmp_path, events, labels):
    last = events.groupby("subject_id")["available_time"].max()
    for hours, count in ((23, 0), (25, N)):
        late = labels.assign(prediction_time=labels["subject_id"].map(last).to_numpy() + hours * HOUR)
        assert findings(audit(write(tmp_path / f"{hours}", events, late)))["4c"]["count"] == count


def test_labels_cut_after_their_declaration_and_unknown_outcome_codes_fail_a_whole_audit(tmp_path, events, labels):
    folder = write(tmp_path / "cohort", events, labels.head(44))
    says = {"outcome_codes": ["NOPE"], "flow": [{"step": "all", "subjects": N, "positives": 60}]}
    (folder / "labels" / "death" / "task.json").write_text(json.dumps(says))
    found = findings(audit(folder))
    assert [found[check]["verdict"] for check in ("4h", "11d", "4d")] == ["fail", "fail", "not-applicable"]
    assert "declare" not in found["11"]["sentence"].replace("declared", "")


def test_a_code_that_is_the_label_but_known_only_later_passes(tmp_path, events, labels):
    rows = [
        (s, t - HOUR, t + HOUR)
        for s, t in labels.loc[labels["boolean_value"], ["subject_id", "prediction_time"]].itertuples(index=False)
    ]
    found = findings(audit(write(tmp_path / "cohort", add(events, rows, "FLAG//1"), labels)))
    assert found["5"]["verdict"] == found["9"]["verdict"] == "pass"


def test_a_diagnosis_visible_during_its_stay_fails(tmp_path, events, labels):
    rows = [
        (s, t - 2 * HOUR, t - 2 * HOUR)
        for s, t in labels[["subject_id", "prediction_time"]].head(7).itertuples(index=False)
    ]
    found = findings(audit(write(tmp_path / "cohort", add(events, rows, "DRG//1"), labels)))
    assert (found["6b"]["count"], found["6b"]["verdict"]) == (7, "fail")
    assert (found["6c"]["count"], found["6c"]["verdict"]) == (7, "fail")


def test_predicting_at_the_discharge_sees_its_diagnoses_and_fails(tmp_path, events, labels):
    at_discharge = labels.assign(prediction_time=labels["prediction_time"] + 48 * HOUR)
    seen_at_once = events.assign(available_time=events["time"])
    assert findings(audit(write(tmp_path / "late", seen_at_once, at_discharge)))["6c"]["count"] == N
    assert findings(audit(write(tmp_path / "early", seen_at_once, labels)))["6c"]["count"] == 0


def test_a_discharge_that_says_died_warns_and_fails_where_a_prediction_sees_it(tmp_path, events, labels):
    ends = events["code"].str.startswith("HOSPITAL_DISCHARGE") & events["subject_id"].isin([1, 2, 3])
    died = events.assign(code=events["code"].where(~ends, "HOSPITAL_DISCHARGE//DIED"))
    found = findings(audit(write(tmp_path / "unseen", died, labels)))
    assert [(found[c]["verdict"], found[c]["count"]) for c in ("7", "7c")] == [("warn", 3), ("pass", 0)]
    late = labels.assign(prediction_time=labels["prediction_time"] + 48 * HOUR)
    assert (findings(audit(write(tmp_path / "seen", died, late)))["7c"]["count"]) == 3


def test_a_discharge_visible_before_its_time_fails(tmp_path, events):
    ends = events["code"].str.startswith("HOSPITAL_DISCHARGE")
    early = events.assign(available_time=events["available_time"].where(~ends, events["available_time"] - 90 * HOUR))
    found = findings(audit(write(tmp_path / "cohort", early)))
    assert found["7b"]["count"] == found["13"]["count"] == N


def test_an_event_after_death_fails(tmp_path, events):
    rows = [
        (s, t + HOUR, t + HOUR)
        for s, t in events.loc[events["code"] == "MEDS_DEATH", ["subject_id", "time"]].head(4).itertuples(index=False)
    ]
    found = findings(audit(write(tmp_path / "cohort", add(events, rows, "LAB//0"))))
    assert (found["8"]["verdict"], found["8"]["count"]) == ("fail", 4)


def test_a_death_at_midnight_is_a_date_and_lasts_the_day(tmp_path, events):
    died = events["code"] == "MEDS_DEATH"
    dates = events.assign(
        time=events["time"].where(~died, events["time"].dt.normalize()), available_time=events["available_time"]
    )
    rows = [
        (s, t + 5 * HOUR, t + 5 * HOUR)
        for s, t in dates.loc[died, ["subject_id", "time"]].head(4).itertuples(index=False)
    ]
    found = findings(audit(write(tmp_path / "cohort", add(dates, rows, "LAB//0"))))
    assert (found["8b"]["count"], found["8"]["count"]) == (int(died.sum()), 0)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_that_separates_the_classes_fails(tmp_path, events, labels, sign):
    draw = np.random.default_rng(1)
    rows = [
        (s, t - HOUR, t - HOUR, "LAB//LEAK", sign * y + 0.2 * draw.normal())
        for s, t, y in labels.itertuples(index=False)
    ]
    leak = pd.concat(
        [events, pd.DataFrame(rows, columns=["subject_id", "time", "available_time", "code", "numeric_value"])]
    )
    found = findings(audit(write(tmp_path / "cohort", leak, labels)))
    assert (found["9"]["verdict"], found["9"]["count"]) == ("fail", 1)
    assert "LAB//LEAK" in found["9"]["sentence"]


def test_a_record_whose_length_tells_warns(tmp_path, events, labels):
    rows = [(s, t - k * HOUR / 9, t) for s, t, y in labels.itertuples(index=False) for k in range(1, 25 if y else 5)]
    found = findings(audit(write(tmp_path / "cohort", add(events, rows, "LAB//0"), labels)))
    assert found["10"]["verdict"] == "warn"


def test_rows_sorted_by_the_label_fail_and_so_do_subjects_numbered_by_it(tmp_path, events, labels):
    found = findings(audit(write(tmp_path / "order", events, labels.sort_values("boolean_value"))))
    assert (found["12"]["verdict"], found["12"]["count"]) == ("fail", 1)
    rank = labels.sort_values("boolean_value")["subject_id"].tolist()
    number = {subject: i for i, subject in enumerate(rank, start=1)}
    renumbered = [table.assign(subject_id=table["subject_id"].map(number)) for table in (events, labels)]
    assert findings(audit(write(tmp_path / "number", *renumbered)))["12"]["count"] == 1


def test_an_event_available_before_it_happened_fails(tmp_path, events):
    early = events.copy()
    early.loc[early["code"] == "LAB//3", "available_time"] -= 2 * HOUR
    found = findings(audit(write(tmp_path / "cohort", early)))["13"]
    assert (found["verdict"], found["count"]) == ("fail", int((early["code"] == "LAB//3").sum()))


def test_tables_and_declarations_given_to_a_whole_audit_reach_their_checks(tmp_path, events, labels):
    folder = write(tmp_path / "cohort", events, labels)
    key = labels[["subject_id", "prediction_time"]]
    y = labels["boolean_value"].to_numpy()
    noise = np.random.default_rng(0).normal(size=len(y))
    key.assign(score=y + 0.1 * noise).to_parquet(tmp_path / "scores.parquet")
    key.assign(y=y, env_bayes_both=y + noise).to_parquet(tmp_path / "oracle.parquet")
    (folder / "labels" / "death" / "task.json").write_text('{"window_days": [-1, 30]}')
    tables = {"scores_file": tmp_path / "scores.parquet", "oracle_file": tmp_path / "oracle.parquet"}
    found = findings(audit(folder, **tables))
    assert (found["16"]["verdict"], found["4f"]["verdict"]) == ("fail", "fail")
    assert "the model 1.00" in found["10"]["sentence"]


def test_a_run_given_to_a_whole_audit_is_asked(ct_ehr_run, ct_ehr_cohort):
    found = findings(audit(ct_ehr_cohort, run=ct_ehr_run))
    assert (found["2"]["verdict"], found["14b"]["verdict"]) == ("pass", "pass")


def test_a_task_that_does_not_exist_is_refused(tmp_path, events, labels):
    with pytest.raises(Refusal, match="LABELS_MISSING"):
        audit(write(tmp_path / "cohort", events, labels), ["relapse"])


def test_a_cohort_without_splits_labels_or_stays_is_read_and_says_what_it_could_not_check(tmp_path):
    rows = [(s, START + k * HOUR, START + k * HOUR, "LAB//0", 1.0) for s in (1, 2) for k in range(3)]
    folder = write(
        tmp_path / "cohort",
        pd.DataFrame(rows, columns=["subject_id", "time", "available_time", "code", "numeric_value"]),
    )
    (folder / "ehr/metadata/subject_splits.parquet").unlink()
    result = audit(folder)
    assert result["verdict"] == "pass"
    assert {f["check"] for f in result["findings"] if f["verdict"] == "not-applicable"} == {
        "1", "2-3", "4-12", "6", "7", "8", "14", "15", "15b", "16"
    }  # fmt: skip


def test_grouped_auroc_counts_a_subject_once_a_class():
    rows = Rows(np.array([0, 0, 0, 1, 2, 3]), np.zeros(6, np.int64), np.array([1.0, 1, 1, 1, 0, 0]))
    auroc, _ = grouped_auroc(np.array([[9.0, 1], [9, 1], [9, 1], [0, 9], [1, 2], [2, 2]]), rows)
    assert auroc.tolist() == [0.5, 0.5]  # rows alone would say .75 and .25; sums a subject 1 in the second


def test_a_stay_holds_both_its_ends():
    stays = Stays(np.array([0, 0, 1]), np.array([10, 50, 20]), np.array([30, NEVER, 30]))
    times = np.array([9, 10, 30, 31, 49, 50, 1000, 10, 20])
    inside, start, end = stays.current(np.array([0, 0, 0, 0, 0, 0, 0, 1, 1]), times)
    assert inside.tolist() == [False, True, True, False, False, True, True, False, True]
    assert start[inside].tolist() == [10, 10, 50, 50, 20]
    assert end[inside].tolist() == [30, 30, NEVER, NEVER, 30]


def test_the_diagnoses_of_a_stay_that_ends_as_the_next_one_begins_are_not_early(tmp_path, events):
    end = events.loc[events["code"].str.startswith("HOSPITAL_DISCHARGE") & (events["subject_id"] == 1), "time"].iloc[0]
    later = end + 50 * HOUR
    adjoining = add(events, [(1, end, end)], "HOSPITAL_ADMISSION//EMERGENCY")
    adjoining = add(adjoining, [(1, later, later)], "HOSPITAL_DISCHARGE//HOME")
    adjoining = add(adjoining, [(1, end, end)], "DRG//1")
    found = findings(audit(write(tmp_path / "cohort", adjoining)))
    assert (found["6"]["count"], found["6b"]["count"]) == (N + 1, 0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_the_scan_equals_brute_force_over_what_is_available(seed):
    draw = np.random.default_rng(seed)
    n, people, hour = 300, 30, 3_600_000_000
    subject = np.sort(draw.integers(people, size=n))
    values = np.where(draw.random(n) < 0.5, draw.normal(size=n).round(1), np.nan).astype(np.float32)
    available = draw.permutation(n) * hour
    events = Events(
        np.arange(people),
        subject,
        available,
        available,
        draw.integers(4, size=n).astype(np.int32),
        values,
        np.array(list("abcd"), object),
    )
    rows = Rows(np.arange(people), draw.integers(n, size=people) * hour, (np.arange(people) % 2).astype(float))
    found = scan(events, rows).set_index(["code", "kind"])["auroc"]
    size = np.expm1(record_size(events, rows))
    for code, name in enumerate("abcd"):
        seen = [
            (subject == s) & (available <= t) & (events.codes == code)
            for s, t in zip(rows.subject, rows.t_us, strict=True)
        ]
        present = np.array([mask.any() for mask in seen])
        if present.any() and not present.all():
            assert found[name, "presence"] == pytest.approx(roc_auc_score(rows.y, present))
        measured = [np.flatnonzero(mask & ~np.isnan(values)) for mask in seen]
        has = np.array([len(mask) > 0 for mask in measured])
        if (name, "value") in found.index:
            last = [values[mask[np.argmax(available[mask])]] for mask in measured if len(mask)]
            assert found[name, "value"] == pytest.approx(roc_auc_score(rows.y[has], last))
        else:
            assert min(has[rows.y == 1].sum(), has[rows.y == 0].sum()) < 10
    for i, t in enumerate(rows.t_us):
        mask = (subject == i) & (available <= t)
        gaps = (t - available[mask]) / hour if mask.any() else np.zeros(1)
        wanted = [
            mask.sum(),
            len(set(events.codes[mask])),
            (mask & (available > t - 24 * hour)).sum(),
            gaps.max(),
            gaps.min(),
        ]
        assert size[i] == pytest.approx(wanted)


def last_value(events: pd.DataFrame, t: pd.Timestamp) -> np.ndarray:
    seen = events[events["time"] <= t]
    return np.array([seen["numeric_value"].sum(), len(seen)])


def peeking(events: pd.DataFrame, t: pd.Timestamp) -> np.ndarray:
    """Looks at ``time`` where ``available_time`` decides."""
    return np.array([events.loc[events["available_time"] <= t + 6 * HOUR, "numeric_value"].sum()])


def honest(events: pd.DataFrame, t: pd.Timestamp) -> np.ndarray:
    seen = events[events["available_time"] <= t]
    return np.array([seen["numeric_value"].sum(), len(seen)])


@pytest.fixture(scope="module")
def records(events, labels) -> tuple[list[pd.DataFrame], list[pd.Timestamp]]:
    ordered = events.sort_values(["subject_id", "time"])
    t = labels.set_index("subject_id")["prediction_time"]
    return [ordered[ordered["subject_id"] == s].reset_index(drop=True) for s in range(1, 31)], [
        t[s] for s in range(1, 31)
    ]


def will_die(events: pd.DataFrame, t: pd.Timestamp) -> float:
    return float((events.loc[events["time"] > t, "code"] == "MEDS_DEATH").any())


@pytest.mark.parametrize(("model", "verdict"), [(honest, "pass"), (last_value, "fail"), (peeking, "fail")])
def test_prefix_invariance_and_future_swap_tell_an_honest_model_from_a_peeking_one(records, model, verdict):
    assert prefix_invariance(model, *records).verdict == verdict
    assert future_swap(model, will_die, *records).verdict == verdict


def test_a_swap_that_moves_no_label_is_not_a_pass(records):
    assert future_swap(honest, lambda events, t: 0.0, *records).verdict == "not-applicable"
    assert (
        future_swap(honest, lambda events, t: float(events["subject_id"].iloc[0]), *records).verdict == "not-applicable"
    )
    pasts = [record[record["available_time"] <= t] for record, t in zip(*records, strict=True)]
    assert prefix_invariance(honest, pasts, records[1]).verdict == "not-applicable"


@pytest.mark.real_data
def test_the_known_facts_of_the_mimic_demo_are_found(data_folder):
    found = findings(audit(data_folder / "mimic_iv_demo_meds"))
    assert {check: found[check]["count"] for check in ("6", "7", "8", "8b")} == {"6": 4960, "7": 15, "8": 626, "8b": 16}
    assert "4,960 of 4,960" in found["6"]["sentence"]
    assert "4 stand over an hour" in found["7"]["sentence"]
    assert "15 subjects" in found["8"]["sentence"]
    assert "16 of 31" in found["8b"]["sentence"]


@pytest.mark.real_data
def test_the_counts_of_the_mimic_demo_follow_rows_renamed_deleted_and_doubled(data_folder, tmp_path):
    source = data_folder / "mimic_iv_demo_meds"
    shutil.copytree(source / "metadata", tmp_path / "metadata")
    rows = pd.concat([pd.read_parquet(path) for path in sorted((source / "data").rglob("*.parquet"))])
    rows = rows.reset_index(drop=True)
    death_us = rows["subject_id"].map(rows[rows["code"] == "MEDS_DEATH"].set_index("subject_id")["time"])
    midnight = (rows["code"] == "MEDS_DEATH") & (rows["time"] == rows["time"].dt.normalize())
    late = (rows["time"] > death_us) & (death_us != death_us.dt.normalize())
    died = rows.index[rows["code"].str.startswith("HOSPITAL_DISCHARGE//DIED")]
    deleted = rows["code"].str.startswith("DRG")
    rows.loc[died[:6], "code"] = "HOSPITAL_DISCHARGE//HOME"
    rows.loc[rows.index[midnight][:5], "time"] += HOUR
    changed = pd.concat([rows[~deleted], rows[late]]).sort_values(["subject_id", "time"], na_position="first")
    (tmp_path / "data").mkdir()
    changed.to_parquet(tmp_path / "data" / "0.parquet", index=False)
    found = findings(audit(tmp_path))
    assert {check: found[check]["count"] for check in ("6", "7", "8", "8b")} == {
        "6": 4960 - int(deleted.sum()),
        "7": 9,
        "8": 2 * 626,
        "8b": 11,
    }
    assert 0 < deleted.sum() < 4960


@pytest.mark.parametrize(
    "file", ["ct/index.parquet", "ehr/metadata/subject_splits.parquet", "ehr/data/train/0.parquet"]
)
def test_a_file_cut_short_is_refused(file, ct_ehr_cohort, tmp_path):
    shutil.copytree(ct_ehr_cohort, tmp_path / "cohort")
    path = tmp_path / "cohort" / file
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Refusal):
        audit(tmp_path / "cohort", [])
