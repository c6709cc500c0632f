"""EHRSHOT: events, the release's splits, labels as the benchmark scores them, few-shot lists; format-true made-up assets."""

import json

import pandas as pd
import pytest

from mmjepa.cohort import Cohort
from mmjepa.ingest import ingest

HEADER = ",patient_id,start,end,code,value,unit,visit_id,omop_table"
EVENTS = [
    "0,11,1950-02-01 00:00:00,,SNOMED/3950001,,,,person",
    "1,11,1950-02-01 00:00:00,,Gender/F,,,,person",
    "2,11,2015-03-04 10:00:00,2015-03-09 12:00:00,Visit/IP,,,77001,visit_occurrence",
    "3,11,2015-03-04 11:00:00,,LOINC/718-7,11.5,g/dL,77001,measurement",
    "4,11,2015-03-04 12:00:00,,LOINC/5778-6,Yellow,,77001,measurement",
    '5,11,2015-03-05 12:00:00,,LOINC/718-7,"1e1",g/dL,77001,measurement',
    "6,12,1970-02-01 00:00:00,,SNOMED/3950001,,,,person",
    "7,12,2016-01-01 23:59:00,,ICD10CM/I10,,,,condition_occurrence",
    "8,12,2017-01-01 00:00:00,,Death Type/OMOP generated,,,,death",
    "9,13,1990-02-01 00:00:00,,SNOMED/3950001,,,,person",
]
SPLITS = ["split,omop_person_id", "train,11", "val,12", "test,13"]
LABELS = "patient_id,prediction_time,label_type,value"
TASKS = {
    "guo_los": ["11,2015-03-04 23:59:00,boolean,True", "12,2016-01-01 23:59:00,boolean,False"],
    "lab_anemia": [
        "11,2015-03-04 10:59:00,categorical,2", "11,2015-03-05 11:59:00,categorical,0", "12,2016-01-01 11:59:00,categorical,1",
        "12,2016-01-01 11:59:00,categorical,1", "13,2016-01-01 11:59:00,categorical,1", "13,2016-01-01 11:59:00,categorical,3",
    ],
    "chexpert": ["11,2015-03-04 10:59:00,categorical,4097", "99,2015-03-04 10:59:00,categorical,0"],
}  # fmt: skip
SHOT = {
    "patient_ids_train_k": [11, 11], "label_times_train_k": ["2015-03-04T23:59:00"] * 2, "label_values_train_k": [1, 1],
    "patient_ids_val_k": [12], "label_times_val_k": ["2016-01-01T23:59:00"], "label_values_val_k": [0],
    "train_idxs": [0, 0], "val_idxs": [0],
}  # fmt: skip


def write(folder, events=EVENTS, splits=SPLITS, tasks=TASKS, shots=None, header=HEADER):
    for name in ("data", "splits", *(f"benchmark/{task}" for task in tasks)):
        (folder / name).mkdir(parents=True)
    (folder / "data" / "ehrshot.csv").write_text("\n".join([header, *events]) + "\n")
    (folder / "splits" / "person_id_map.csv").write_text("\n".join(splits) + "\n")
    for task, rows in tasks.items():
        (folder / "benchmark" / task / "labeled_patients.csv").write_text("\n".join([LABELS, *rows]) + "\n")
    shots = {"guo_los": {"1": {"0": SHOT, "1": SHOT}, "-1": {"0": SHOT}}} if shots is None else shots
    (folder / "benchmark" / "guo_los" / "all_shots_data.json").write_text(json.dumps(shots))
    return folder


def test_events_keep_codes_and_values_and_a_visits_end_is_a_row_of_its_own(tmp_path, convert):
    code, result, seen = convert("ehrshot", write(tmp_path / "assets"), tmp_path / "out")
    assert code == 0, seen
    assert (result["subjects"], result["rows"], result["static_rows"]) == (3, 11, 0)
    events = pd.concat([pd.read_parquet(path) for path in (tmp_path / "out" / "ehr" / "data").glob("*.parquet")])
    cells = events[["subject_id", "time", "code", "numeric_value", "text_value", "unit", "visit_id"]].astype(str)
    assert [" ".join(row) for row in cells.fillna("nan").to_numpy()][2:9] == [
        "11 2015-03-04 10:00:00 Visit/IP nan nan nan 77001",
        "11 2015-03-04 11:00:00 LOINC/718-7 11.5 nan g/dL 77001",
        "11 2015-03-04 12:00:00 LOINC/5778-6 nan Yellow nan 77001",
        "11 2015-03-05 12:00:00 LOINC/718-7 10.0 nan g/dL 77001",
        "11 2015-03-09 12:00:00 VISIT_END//Visit/IP nan nan nan 77001",
        "12 1970-02-01 00:00:00 MEDS_BIRTH nan nan nan nan",
        "12 2016-01-01 23:59:00 ICD10CM/I10 nan nan nan nan",
    ]
    assert list(events["code"])[9:] == ["MEDS_DEATH", "MEDS_BIRTH"]


def test_labels_are_the_releases_at_its_times_and_splits_are_its_own(tmp_path, convert):
    result = convert("ehrshot", write(tmp_path / "assets"), tmp_path / "out")[1]
    assert result["left_out"] == {"labels_that_differ": 1, "labels_without_split": 1}
    ingest(tmp_path / "out", tmp_path / "cohort")
    cohort = Cohort.open(tmp_path / "cohort")
    labels = {task: list(cohort.labels(task).itertuples(index=False, name=None)) for task in cohort.tasks}
    assert len(labels) == 1 + 2 + 14
    times = [pd.Timestamp(text) for text in ("2015-03-04 10:59", "2015-03-05 11:59", "2016-01-01 11:59")]
    assert labels["lab_anemia_level"] == [(11, times[0], 2), (11, times[1], 0), (12, times[2], 1)]
    assert labels["lab_anemia"] == [(11, times[0], True), (11, times[1], False), (12, times[2], True)]
    found = {task for task, rows in labels.items() if task.startswith("chexpert_") and rows[0][2]}
    assert found == {
        "chexpert_enlarged_cardiomediastinum",
        "chexpert_support_devices",
    }  # the second and the last of 14 bits
    assert [row[2] for row in labels["guo_los"]] == [True, False]
    splits = {name: list(ids) for name, ids in cohort.events().splits.items()}
    assert splits == {"train": [11], "tuning": [12], "held_out": [13]}


def test_few_shot_lists_keep_every_draw(tmp_path, convert):
    convert("ehrshot", write(tmp_path / "assets"), tmp_path / "out")
    drawn = pd.read_parquet(tmp_path / "out" / "few_shot" / "guo_los.parquet")
    assert len(drawn) == 6  # k = -1, which is all labels, is not repeated
    assert list(drawn[drawn["replicate"] == 1].astype(str).itertuples(index=False, name=None)) == [
        ("11", "2015-03-04 23:59:00", "True", "1", "1", "train"), ("11", "2015-03-04 23:59:00", "True", "1", "1", "train"),
        ("12", "2016-01-01 23:59:00", "False", "1", "1", "tuning"),
    ]  # fmt: skip


def replaced(task, *rows):
    return {"tasks": TASKS | {task: list(rows)}}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"splits": [*SPLITS, "test,11"]}, "EHRSHOT_SPLIT"),
        ({"splits": ["split,omop_person_id", "train,11", "dev,12", "test,13"]}, "EHRSHOT_SPLIT"),
        ({"splits": SPLITS[:3]}, "EHRSHOT_SPLIT"),
        ({"events": ["0,11,soon,,LOINC/1,,,,measurement"]}, "SOURCE_VALUE"),
        ({"events": ["0,11,2015-01-01,,,,,,measurement"]}, "SOURCE_VALUE"),
        ({"events": []}, "MEDS_EMPTY"),
        ({"header": HEADER.replace("code", "event")}, "SOURCE_COLUMNS"),
        (replaced("guo_los", "11,2015-03-04 23:59:00,boolean,yes"), "SOURCE_VALUE"),
        (replaced("guo_los", "11,2015-03-04 23:59:00,categorical,1"), "EHRSHOT_TASK"),
        (replaced("lab_anemia", "11,2015-03-04 23:59:00,categorical,4"), "SOURCE_VALUE"),
        (replaced("lab_anemia", "11,,categorical,1"), "SOURCE_VALUE"),
        (replaced("chexpert", "11,2015-03-04 23:59:00,categorical,16384"), "SOURCE_VALUE"),
        ({"shots": {"guo_los": {"1": {"0": SHOT | {"label_values_val_k": []}}}}}, "SOURCE_VALUE"),
    ],
)
def test_assets_that_cannot_be_right_are_refused_and_leave_nothing(tmp_path, convert, change, code):
    exit_code, result, seen = convert("ehrshot", write(tmp_path / "assets", **change), tmp_path / "out")
    assert (exit_code, result.get("refused", {}).get("code")) == (2, code)
    assert "77001" not in seen
    assert [path.name for path in tmp_path.iterdir()] == ["assets"]


@pytest.mark.parametrize("name", ["data/ehrshot.csv", "splits/person_id_map.csv", "benchmark"])
def test_assets_without_a_part_are_refused(tmp_path, convert, name):
    source = write(tmp_path / "assets")
    (source / name).rename(tmp_path / "away")
    assert convert("ehrshot", source, tmp_path / "out")[1]["refused"]["code"] == "SOURCE_FILE_MISSING"
