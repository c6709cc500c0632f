"""What a MEDS root may be, and what is refused."""

import errno
import json
import os
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmjepa.ehr.meds_io import ingest_meds, open_root
from mmjepa.ehr.shards import check_indices, index_shard, read_pieces
from mmjepa.refusal import Refusal

NOON = datetime(2020, 1, 1, 12)
HOUR = timedelta(hours=1)
GOOD = {
    "subject_id": [77001, 77001, 77001, 77002],
    "time": [None, NOON, NOON + HOUR, NOON],
    "code": ["GENDER//F", "LAB//A", "LAB//B", "LAB//A"],
    "numeric_value": [None, 1.5, None, 2.0],
}
TYPES = {"subject_id": pa.int64(), "time": pa.timestamp("us"), "code": pa.string(), "numeric_value": pa.float32()}
TYPES |= {"available_time": pa.timestamp("us"), "image_id": pa.string(), "text_value": pa.large_string()}
TYPES |= {"hadm_id": pa.string()}


def write(path, columns, types=TYPES):
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: pa.array(values, types.get(name)) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), path)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "ehr"
    write(root / "data" / "0.parquet", GOOD)
    write(
        root / "metadata" / "codes.parquet",
        {"code": ["LAB//A", "LAB//B", "GENDER//F"], "description": ["Alpha", None, " "]},
    )
    write(root / "metadata" / "subject_splits.parquet", {"subject_id": [77002, 77001], "split": ["train", "train"]})
    (root / "metadata" / "dataset.json").write_text(json.dumps({"dataset_name": "tiny"}))
    return root


def pieces(root):
    meds = open_root(root)
    indices = [index_shard(path) for path in meds.shards]
    check_indices(meds, indices)
    return [piece for index in indices for piece in read_pieces(meds, index)]


def refused(code, root):
    with pytest.raises(Refusal) as caught:
        pieces(root)
    assert caught.value.code == code
    assert "7700" not in str(caught.value), "a subject id is named"
    return str(caught.value)


def test_a_good_root_is_read(root):
    meds = open_root(root)
    (shard,) = pieces(root)
    assert meds.codes == ("GENDER//F", "LAB//A", "LAB//B")
    assert meds.descriptions == {"LAB//A": "Alpha"}
    assert meds.splits["train"].tolist() == [77001, 77002]
    assert shard.static.tolist() == [True, False, False, False]
    assert shard.subjects.tolist() == [77001, 77002]
    assert shard.ends.tolist() == [0, 3, 4]
    np.testing.assert_array_equal(shard.values, np.array([np.nan, 1.5, np.nan, 2.0], np.float32))
    assert [meds.codes[code] for code in shard.codes] == GOOD["code"]


@pytest.mark.parametrize("gone", ["", "data", "metadata/codes.parquet"])
def test_a_folder_that_is_no_root_is_missing(root, gone):
    (root / gone).rename(root.parent / "moved")
    assert "ehr" in refused("MEDS_MISSING", root)


def test_no_shard_and_no_row_are_empty(root):
    write(root / "data" / "0.parquet", {name: [] for name in GOOD})
    refused("MEDS_EMPTY", root)
    (root / "data" / "0.parquet").unlink()
    refused("MEDS_EMPTY", root)


@pytest.mark.parametrize(
    ("code", "change", "word"),
    [
        ("MEDS_UNSORTED", {"time": [None, NOON + HOUR, NOON, NOON]}, "row 2"),
        ("MEDS_UNSORTED", {"time": [NOON + HOUR, None, NOON, NOON]}, "row 2"),
        ("MEDS_UNSORTED", {"subject_id": [77001, 77002, 77002, 77001]}, "row 3"),
        ("MEDS_CODE_UNLISTED", {"code": ["GENDER//F", "LAB//A", "LAB//C", "LAB//A"]}, "'LAB//C' (row 2"),
        ("MEDS_SCHEMA", {"code": ["GENDER//F", None, "LAB//B", "LAB//A"]}, "code"),
        ("MEDS_SCHEMA", {"subject_id": [77001, None, 77001, 77002]}, "subject_id"),
        ("MEDS_SCHEMA", {"numeric_value": None}, None),
        ("MEDS_SCHEMA", {"available_time": [NOON, None, None, None]}, "row 0"),
        ("MEDS_SCHEMA", {"hadm_id": ["1", "A12", None, None]}, "hadm_id"),
    ],
)
def test_bad_rows_are_refused_by_row_number(root, code, change, word):
    columns = {name: values for name, values in (GOOD | change).items() if values is not None}
    write(root / "data" / "0.parquet", columns)
    if word is None:  # a column that MEDS lets a file omit
        assert np.isnan(pieces(root)[0].values).all()
    else:
        message = refused(code, root)
        assert word in message
        assert "0.parquet" in message


@pytest.mark.parametrize("column", ["time", "available_time"])
def test_a_time_zone_is_refused_instead_of_moved(root, column):
    zoned = GOOD | {column: [None, *(time and time.replace(tzinfo=UTC) for time in GOOD["time"][1:])]}
    write(root / "data" / "0.parquet", zoned, TYPES | {column: pa.timestamp("us", "America/New_York")})
    assert column in refused("MEDS_TIMEZONE", root)


def test_a_column_of_another_type_is_refused(root):
    write(root / "data" / "0.parquet", GOOD | {"time": [None, "a", "b", "c"]}, TYPES | {"time": pa.string()})
    assert "time" in refused("MEDS_SCHEMA", root)


def test_what_pandas_writes_is_read(root):
    frame = pd.DataFrame(GOOD).astype({"numeric_value": np.float64, "time": "datetime64[us]"})
    frame.to_parquet(root / "data" / "0.parquet")
    assert pieces(root)[0].values[1] == 1.5


def test_a_subject_in_two_files_is_refused(root):
    write(root / "data" / "deeper" / "1.parquet", {name: values[3:] for name, values in GOOD.items()})
    assert "row 0 of" in refused("MEDS_SUBJECT_SPLIT_FILES", root)


@pytest.mark.parametrize("size", [0, 4, 200])
def test_a_truncated_shard_is_refused(root, size):
    file = root / "data" / "0.parquet"
    file.write_bytes(file.read_bytes()[:size])
    assert "0.parquet" in refused("MEDS_UNREADABLE", root)


def test_splits_follow_their_closed_schema(root):
    splits = {"subject_id": [77001, 77002], "split": ["train", "train"]}
    write(root / "metadata" / "subject_splits.parquet", splits | {"fold": [1, 2]})
    assert "fold" in refused("MEDS_SCHEMA", root)
    write(root / "metadata" / "subject_splits.parquet", splits | {"subject_id": [77001, 77001]})
    assert "twice" in refused("MEDS_SCHEMA", root)


@pytest.mark.parametrize(
    ("text", "code"), [("{", "MEDS_UNREADABLE"), ("[]", "MEDS_SCHEMA"), ('{"site_id_columns": 3}', "MEDS_SCHEMA")]
)
def test_broken_dataset_metadata_is_refused(root, text, code):
    (root / "metadata" / "dataset.json").write_text(text)
    assert "dataset.json" in refused(code, root)


def test_ingest_places_equal_bytes_and_counts_them(root, tmp_path):
    write(
        tmp_path / "labels" / "death" / "0.parquet",
        {"subject_id": [77001], "prediction_time": [NOON], "boolean_value": [True]},
        TYPES | {"prediction_time": pa.timestamp("us")},
    )
    (root / "truth").mkdir()
    counts = ingest_meds(tmp_path, tmp_path / "cohort")
    assert counts == {
        "rows": 4,
        "static_rows": 1,
        "subjects": 2,
        "codes": 3,
        "splits": {"train": 2},
        "values_not_finite": 0,
        "labels": {"death": 1},
        "notes": [],
    }
    placed = {
        path.relative_to(tmp_path / "cohort").as_posix(): path.read_bytes()
        for path in (tmp_path / "cohort").rglob("*.*")
    }
    assert sorted(placed) == [
        "ehr/data/0.parquet",
        "ehr/metadata/codes.parquet",
        "ehr/metadata/dataset.json",
        "ehr/metadata/subject_splits.parquet",
        "ehr/source.json",
        "labels/death/0.parquet",
        "labels/source.json",
    ]
    for made_here in ("ehr/source.json", "labels/source.json"):
        placed.pop(made_here)
    assert all((tmp_path / name).read_bytes() == data for name, data in placed.items())


def other_subject(**columns):
    return {name: values[3:] for name, values in GOOD.items()} | {"subject_id": [77003]} | columns


def test_a_linked_folder_of_shards_is_read_once_however_often_it_is_linked(root, tmp_path):
    write(tmp_path / "elsewhere" / "1.parquet", other_subject())
    for name in ("tuning", "again"):
        (root / "data" / name).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "back").symlink_to(root / "data", target_is_directory=True)
    assert [piece.subjects.tolist() for piece in pieces(root)] == [[77001, 77002], [77003]]


def test_a_link_that_leads_nowhere_is_refused(root):
    (root / "data" / "tuning").symlink_to(root / "gone", target_is_directory=True)
    refused("MEDS_UNREADABLE", root)


def test_a_folder_that_cannot_be_listed_is_refused(root, monkeypatch):
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("tuning"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    (root / "data" / "tuning").mkdir()
    monkeypatch.setattr(os, "scandir", closed)
    assert "Permission denied" in refused("MEDS_UNREADABLE", root)


def test_a_folder_of_parts_is_read_and_what_is_not_read_is_noted(root):
    write(root / "data" / "train.parquet" / "part-0.parquet", other_subject())
    assert len(pieces(root)) == 2
    assert open_root(root).notes == ()
    for name in ("._0.parquet", "train.parquet/_SUCCESS", "2.PARQUET"):
        (root / "data" / name).write_bytes(b"x")
    assert len(pieces(root)) == 2
    assert "3 entries" in open_root(root).notes[0]


def test_linked_shards_come_into_the_cohort_as_files(root, tmp_path):
    write(tmp_path / "blobs" / "x", other_subject())
    (root / "data" / "1.parquet").symlink_to("../../blobs/x")
    ingest_meds(root, tmp_path / "cohort")
    placed = tmp_path / "cohort" / "ehr"
    assert not (placed / "data" / "1.parquet").is_symlink()
    assert len(pieces(placed)) == 2


def test_a_source_that_is_written_again_leaves_the_cohort_as_it_was(root, tmp_path):
    ingest_meds(root, tmp_path / "cohort")
    with open(root / "data" / "0.parquet", "r+b") as file:  # over the old bytes, as pandas and cp do
        file.write(b"XXXX")
    assert len(pieces(tmp_path / "cohort" / "ehr")) == 1


def test_values_that_float32_cannot_hold_are_none_and_counted(root, tmp_path):
    wide = TYPES | {"numeric_value": pa.float64()}
    write(root / "data" / "0.parquet", GOOD | {"numeric_value": [None, 1e300, -np.inf, 2.0]}, wide)
    np.testing.assert_array_equal(pieces(root)[0].values, np.array([np.nan, np.nan, np.nan, 2.0], np.float32))
    assert ingest_meds(root, tmp_path / "cohort")["values_not_finite"] == 2


def test_a_root_without_any_value_is_noted(root, tmp_path):
    write(
        root / "data" / "0.parquet",
        {("value" if name == "numeric_value" else name): column for name, column in GOOD.items()},
    )
    (note,) = ingest_meds(root, tmp_path / "cohort")["notes"]
    assert "numeric_value" in note


def test_admissions_with_gaps_as_pandas_writes_them_are_read(root):
    numbers = TYPES | {"hadm_id": pa.float64()}
    write(root / "data" / "0.parquet", GOOD | {"hadm_id": [1.0, float("nan"), None, 4.0]}, numbers)
    assert pieces(root)[0].hadm_id.tolist() == [1, -1, -1, 4]
    write(root / "data" / "0.parquet", GOOD | {"hadm_id": [1.5, None, None, 4.0]}, numbers)
    refused("MEDS_SCHEMA", root)


def test_a_gap_in_subject_ids_is_refused(root):
    numbers = TYPES | {"subject_id": pa.float64()}
    write(root / "data" / "0.parquet", GOOD | {"subject_id": [77001.0, 77001.0, float("nan"), 77002.0]}, numbers)
    assert "row 2" in refused("MEDS_SCHEMA", root)


def test_splits_and_rows_that_do_not_meet_are_noted(root, tmp_path):
    splits = {"subject_id": [77001, 77005, 77006], "split": ["train", "train", "tuning"]}
    write(root / "metadata" / "subject_splits.parquet", splits)
    notes = ingest_meds(root, tmp_path / "cohort")["notes"]
    assert [note.split()[0] for note in notes] == ["2", "1"]
    assert "no row" in notes[0]
    assert "no split" in notes[1]


def test_ingest_leaves_nothing_behind_a_refusal_and_overwrites_nothing(root, tmp_path):
    write(root / "data" / "1.parquet", {name: values[3:] for name, values in GOOD.items()})
    with pytest.raises(Refusal, match="MEDS_SUBJECT_SPLIT_FILES"):
        ingest_meds(root, tmp_path / "cohort")
    assert not (tmp_path / "cohort").exists()
    (root / "data" / "1.parquet").unlink()
    ingest_meds(root, tmp_path / "cohort")
    with pytest.raises(Refusal, match="OUTPUT_EXISTS"):
        ingest_meds(root, tmp_path / "cohort")


@pytest.mark.real_data
def test_the_mimic_demo_is_a_good_root(data_folder):
    shards = pieces(data_folder / "mimic_iv_demo_meds")
    assert sum(len(shard.codes) for shard in shards) == 916_166
    assert sum(len(shard.subjects) for shard in shards) == 100
