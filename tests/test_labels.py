"""What stands in label files is read as meant, cast in words, or refused; never quietly something else."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmjepa.files import write_json
from mmjepa.ingest import ingest
from mmjepa.labels import check_labels, place_labels, read_labels, read_survival, same_labels
from mmjepa.refusal import Refusal

NOON = pd.Timestamp("2020-01-01 12:00")
TIMES = pa.array([NOON] * 3, pa.timestamp("us"))


def write(folder, file="0.parquet", task="t", drop=(), **columns):
    """Labels of subjects 1, 2, 3 with the given columns."""
    (folder / task).mkdir(parents=True, exist_ok=True)
    every = {"subject_id": pa.array([1, 2, 3]), "prediction_time": TIMES, **columns}
    pq.write_table(pa.table({name: array for name, array in every.items() if name not in drop}), folder / task / file)


def write_survival(folder, task="t", **changes):
    rows = {
        "subject_id": [1, 2, 3],
        "prediction_time": [NOON] * 3,
        "time_to_event_days": [0.0, 2.5, 9.0],
        "event": [0, 1, 2],
    }
    (folder / task).mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows | changes).to_parquet(folder / task / "survival.parquet")


def refused(code, call, *arguments):
    with pytest.raises(Refusal) as info:
        call(*arguments)
    assert info.value.code == code
    return info.value


@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.uint8()])
def test_counts_in_boolean_value_are_true_from_one_up_and_the_cast_is_told(tmp_path, kind):
    write(tmp_path, boolean_value=pa.array([0, 1, 2], kind))
    frame = read_labels(tmp_path, "t")
    assert frame["value"].tolist() == [False, True, True]
    assert frame["value"].dtype == bool
    assert frame.attrs["casts"] == {"counts made true from 1 up": 3, "of them above 1": 1}


def test_true_and_false_are_not_cast(tmp_path):
    write(tmp_path, boolean_value=pa.array([True, False, True]))
    assert read_labels(tmp_path, "t").attrs["casts"] == {}


def test_the_result_of_aces_in_python_is_read(tmp_path):
    summary = pa.array([{"window_name": "w"}] * 3)
    columns = {"index_timestamp": TIMES, "label": pa.array([0, 3, 1]), "trigger": TIMES, "w.end_summary": summary}
    write(tmp_path, drop=["prediction_time"], **columns)
    frame = read_labels(tmp_path, "t")
    assert frame.columns.tolist() == ["subject_id", "prediction_time", "value"]
    assert frame["value"].tolist() == [False, True, True]


def test_value_columns_without_any_value_are_left_out_as_the_aces_command_writes_them(tmp_path):
    empty = {"integer_value": pa.nulls(3, pa.int64()), "categorical_value": pa.nulls(3, pa.string())}
    write(tmp_path, boolean_value=pa.array([True, False, True]), **empty)
    frame = read_labels(tmp_path, "t")
    assert frame["value"].tolist() == [True, False, True]
    assert "without any value" in next(iter(frame.attrs["casts"]))


@pytest.mark.parametrize(
    "columns",
    [
        {"boolean_value": pa.array([0, -1, 1])},
        {"boolean_value": pa.array([0.0, 0.5, 1.0])},
        {"boolean_value": pa.array([1.0, None, 0.0])},
        {"boolean_value": pa.array([1, None, 0])},
        {"boolean_value": pa.array(["true", "false", "true"])},
        {"boolean_value": pa.array([True, None, False])},
        {"boolean_value": pa.nulls(3, pa.bool_())},
        {"boolean_value": pa.array([True, False, True]), "integer_value": pa.array([1, 2, 3])},
        {"boolean_value": pa.array([True, False, True]), "note": pa.array(["a", "b", "c"])},
        {"float_value": pa.array([1.0, np.nan, 2.0], pa.float32())},
    ],
)
def test_values_that_would_be_guessed_at_are_refused(tmp_path, columns):
    write(tmp_path, **columns)
    refused("LABELS_SCHEMA", read_labels, tmp_path, "t")


def test_an_index_that_pandas_wrote_along_is_named_with_the_cure(tmp_path):
    times = pd.to_datetime(["2020-01-01"] * 3).as_unit("us")
    frame = pd.DataFrame({"subject_id": [1, 2, 3], "prediction_time": times, "boolean_value": [True, False, True]})
    (tmp_path / "t").mkdir()
    frame.set_index(pd.Index([4, 9, 1])).to_parquet(tmp_path / "t" / "0.parquet")
    with pytest.raises(Refusal, match=r"LABELS_SCHEMA.*index=False"):
        read_labels(tmp_path, "t")
    frame[:2].to_parquet(tmp_path / "t" / "0.parquet", index=False)
    assert len(read_labels(tmp_path, "t")) == 2


def test_whole_numbers_in_integer_value_stay_numbers(tmp_path):
    write(tmp_path, integer_value=pa.array([0, 2, 5]))
    frame = read_labels(tmp_path, "t")
    assert frame["value"].tolist() == [0, 2, 5]
    assert frame.attrs["casts"] == {}


def test_ingest_writes_cast_labels_as_booleans_and_says_so(tmp_path):
    source = tmp_path / "source"
    for part in ("data", "metadata"):
        (source / "ehr" / part).mkdir(parents=True)
    frame = pd.DataFrame({"subject_id": [1, 2, 3], "time": [NOON] * 3, "code": ["A"] * 3})
    frame.astype({"time": "datetime64[us]"}).to_parquet(source / "ehr" / "data" / "0.parquet")
    pd.DataFrame({"code": ["A"]}).to_parquet(source / "ehr" / "metadata" / "codes.parquet")
    write(source / "labels", boolean_value=pa.array([0, 1, 2]))
    write(source / "labels", task="plain", boolean_value=pa.array([True, False, True]))
    write_survival(source / "labels")
    write_json(source / "labels" / "t" / "task.json", {"window_days": [0, 7]})
    result = ingest(source, tmp_path / "cohort")["ehr"]
    assert result["labels"] == {"plain": 3, "t": 3}
    assert result["label_casts"] == {"t": {"counts made true from 1 up": 3, "of them above 1": 1}}
    stored = tmp_path / "cohort" / "labels" / "t"
    assert pq.read_table(stored / "0.parquet").schema.field("boolean_value").type == pa.bool_()
    assert sorted(path.name for path in stored.iterdir()) == ["0.parquet", "survival.parquet", "task.json"]
    assert ingest(source, tmp_path / "cohort")["ehr"]["unchanged"]
    write(source / "labels", boolean_value=pa.array([0, 0, 2]))
    refused("OUTPUT_EXISTS", ingest, source, tmp_path / "cohort")


def test_labels_that_left_or_changed_are_not_the_same(tmp_path):
    write(tmp_path / "a", boolean_value=pa.array([True, False, True]))
    write_survival(tmp_path / "a")
    place_labels(check_labels(tmp_path / "a"), tmp_path / "a", tmp_path / "b")
    assert same_labels(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a" / "t" / "survival.parquet").unlink()
    write_survival(tmp_path / "a", event=[0, 0, 0])
    assert not same_labels(tmp_path / "a", tmp_path / "b")
    write(tmp_path / "a", task="more", boolean_value=pa.array([True, False, True]))
    assert not same_labels(tmp_path / "a", tmp_path / "b")


def test_a_task_or_its_times_removed_at_the_source_are_noticed_and_tasks_made_in_the_cohort_are_not(tmp_path):
    for task in ("t", "gone"):
        write(tmp_path / "a", task=task, boolean_value=pa.array([True, False, True]))
    write_survival(tmp_path / "a")
    place_labels(check_labels(tmp_path / "a"), tmp_path / "a", tmp_path / "b")
    write(tmp_path / "b", task="made_here", boolean_value=pa.array([True, False, True]))
    assert same_labels(tmp_path / "a", tmp_path / "b")
    survival = tmp_path / "a" / "t" / "survival.parquet"
    kept = survival.read_bytes()
    survival.unlink()
    assert not same_labels(tmp_path / "a", tmp_path / "b")
    survival.write_bytes(kept)
    assert same_labels(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a" / "gone" / "0.parquet").unlink()
    assert not same_labels(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a" / "t" / "0.parquet").unlink()
    assert not same_labels(tmp_path / "a", tmp_path / "b")


def test_times_to_an_event_are_read_with_their_causes(tmp_path):
    write_survival(tmp_path, subject_id=[3, 2, 1])
    frame = read_survival(tmp_path, "t")
    assert frame["subject_id"].tolist() == [1, 2, 3]
    assert frame["time_to_event_days"].tolist() == [9.0, 2.5, 0.0]
    assert frame["event"].tolist() == [2, 1, 0]
    assert str(frame["prediction_time"].dtype) == "datetime64[us]"


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("SURVIVAL_VALUE", {"time_to_event_days": [1.0, -0.1, 2.0]}),
        ("SURVIVAL_VALUE", {"time_to_event_days": [1.0, np.inf, 2.0]}),
        ("SURVIVAL_VALUE", {"event": [0, -1, 1]}),
        ("SURVIVAL_SCHEMA", {"time_to_event_days": [1.0, np.nan, 2.0]}),
        ("SURVIVAL_SCHEMA", {"time_to_event_days": ["1", "2", "3"]}),
        ("SURVIVAL_SCHEMA", {"event": [0.0, 1.0, 1.0]}),
        ("SURVIVAL_SCHEMA", {"event": [True, False, True]}),
        ("SURVIVAL_SCHEMA", {"prediction_time": ["2020", "2021", "2022"]}),
        ("SURVIVAL_SCHEMA", {"boolean_value": [True, False, True]}),
        ("SURVIVAL_TIMEZONE", {"prediction_time": [NOON.tz_localize("UTC")] * 3}),
        ("SURVIVAL_DUPLICATE", {"subject_id": [1, 1, 2]}),
    ],
)
def test_impossible_times_to_an_event_are_refused(tmp_path, code, changes):
    write_survival(tmp_path, **changes)
    refused(code, read_survival, tmp_path, "t")


def test_not_a_number_of_days_is_refused_as_well_as_missing(tmp_path):
    write_survival(tmp_path)
    table = pq.read_table(tmp_path / "t" / "survival.parquet")
    days = pa.array(np.array([1.0, np.nan, 2.0]))  # a NaN, where pandas would write a null
    pq.write_table(table.set_column(2, "time_to_event_days", days), tmp_path / "t" / "survival.parquet")
    refused("SURVIVAL_VALUE", read_survival, tmp_path, "t")


def test_a_label_without_a_time_is_refused_and_a_censored_time_without_a_label_is_not(tmp_path):
    write(tmp_path, boolean_value=pa.array([True, False, True]))
    write_survival(tmp_path, subject_id=[1, 2, 4])
    assert "1 labels" in refused("SURVIVAL_UNMATCHED", read_survival, tmp_path, "t").message
    (tmp_path / "t" / "0.parquet").unlink()
    assert len(read_survival(tmp_path, "t")) == 3
    refused("SURVIVAL_MISSING", read_survival, tmp_path, "other")
