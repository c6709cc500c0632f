"""INSPECT: labels and the release's splits at each scan, images and records as links."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from mmjepa.cohort import Cohort
from mmjepa.ingest import ingest

TASKS = [
    "pe_positive_nlp", "1_month_mortality", "6_month_mortality", "12_month_mortality", "1_month_readmission",
    "6_month_readmission", "12_month_readmission", "12_month_PH",
]  # fmt: skip
#: impression, image, person, time, split, PE, death within 12 months
SCANS = [
    ("11", "PE1a", "7001", "2015-03-04 12:30:00", "train", "TRUE", "FALSE"),
    ("12", "PE2b", "7001", "2016-03-04 12:30:00", "train", "FALSE", "Censored"),
    ("13", "PE3c.nii.gz", "7002", "2015-05-04 02:00:00", "test", "FALSE", "TRUE"),
    ("14", "PE4d", "7003", "", "valid", "FALSE", "TRUE"),
    ("15", "PE5e", "7004", "2015-05-04 02:00:00", "valid", "TRUE", "TRUE"),
]


def write_tables(source, scans=SCANS):
    mapping = [f"{i}\t{image}\t{person}\t{time}\t{time}" for i, image, person, time, *_ in scans]
    labels = [f"{i}\t{pe}\t" + "\t".join([death] * (len(TASKS) - 1)) for i, *_, pe, death in scans]
    splits = [f"{scan[0]}\t{scan[4]}" for scan in scans]
    tables = {
        "study_mapping": ("impression_id\timage_id\tperson_id\tprocedure_DATETIME\tnote_DATETIME", mapping),
        "labels": ("impression_id\t" + "\t".join(TASKS), labels),
        "splits": ("impression_id\tsplit", [*splits, splits[0]]),  # the release repeats rows
    }
    for name, (header, rows) in tables.items():
        (source / f"{name}_20250611.tsv").write_text("\n".join([header, *rows]) + "\n")


@pytest.fixture
def download(tmp_path):
    """Four volumes; the fifth scan has no file, the fourth no time."""
    source = tmp_path / "full"
    (source / "CTPA").mkdir(parents=True)
    for name in ("PE1a", "PE2b", "PE3c", "PE4d"):
        voxels = np.linspace(-1000, 400, 512).reshape(8, 8, 8).astype(np.int16)
        nib.Nifti1Image(voxels, np.eye(4)).to_filename(source / "CTPA" / f"{name}.nii.gz")
    write_tables(source)
    return source


def check_cohort(folder):
    cohort = Cohort.open(folder)
    keys = [(7001, pd.Timestamp("2015-03-04 12:30")), (7001, pd.Timestamp("2016-03-04 12:30"))]
    keys.append((7002, pd.Timestamp("2015-05-04 02:00")))
    rows = {task: list(cohort.labels(task).itertuples(index=False, name=None)) for task in cohort.tasks}
    assert rows.pop("pe_positive_nlp") == [(*keys[0], True), (*keys[1], False), (*keys[2], False)]
    assert rows == {task: [(*keys[0], False), (*keys[2], True)] for task in TASKS[1:]}
    index = pd.read_parquet(folder / "ct" / "index.parquet")
    assert sorted(zip(index["subject_id"], index["time"], strict=True)) == keys
    assert {name: list(ids) for name, ids in cohort.events().splits.items()} == {"train": [7001], "held_out": [7002]}


def test_the_cohort_has_labels_and_splits_at_every_scan_that_has_a_file_and_a_time(download, tmp_path, convert_apart):
    code, result, seen = convert_apart("inspect", download, tmp_path / "source")
    assert code == 0, seen
    assert "700" not in seen
    assert {name: n for name, n in result["left_out"].items() if n} == {
        "scans_without_file": 1,
        "scans_without_time": 1,
    }
    assert all(path.is_symlink() for path in (tmp_path / "source" / "images").glob("*.nii.gz"))
    assert ingest(tmp_path / "source", tmp_path / "cohort")["ct"]["accepted"] == 3
    check_cohort(tmp_path / "cohort")


def test_records_made_into_meds_are_linked_and_take_the_splits_of_the_release(download, tmp_path, convert):
    meds = tmp_path / "meds"
    for part in ("data", "metadata"):
        (meds / part).mkdir(parents=True)
    frame = pd.DataFrame({"subject_id": [7001, 7002], "time": pd.Timestamp("2010-01-01"), "code": "ICD10CM/I26"})
    frame.assign(numeric_value=np.float32("nan")).to_parquet(meds / "data" / "0.parquet", index=False)
    pd.DataFrame({"code": ["ICD10CM/I26"]}).to_parquet(meds / "metadata" / "codes.parquet", index=False)
    code, _, seen = convert("inspect", download, tmp_path / "source", "--meds", meds)
    assert code == 0, seen
    made = ingest(tmp_path / "source", tmp_path / "cohort")
    assert (made["ehr"]["rows"], made["subjects_with_both"]) == (2, 2)
    check_cohort(tmp_path / "cohort")
    assert sorted(path.name for path in (meds / "metadata").iterdir()) == ["codes.parquet"]


def replaced(place, value):
    return [(*SCANS[0][:place], value, *SCANS[0][place + 1 :]), *SCANS[1:]]


@pytest.mark.parametrize(
    ("scans", "code"),
    [
        (replaced(4, "dev"), "INSPECT_SPLIT"),
        (replaced(4, "test"), "INSPECT_SPLIT"),
        (replaced(5, "maybe"), "SOURCE_VALUE"),
        (replaced(3, "March 4"), "SOURCE_VALUE"),
        (replaced(2, "P7001"), "SOURCE_VALUE"),
        (replaced(1, "PE2b"), "SOURCE_DUPLICATE"),
        (replaced(0, "12"), "SOURCE_DUPLICATE"),
        (SCANS[4:], "CT_EMPTY"),
    ],
)
def test_tables_that_contradict_themselves_are_refused_and_leave_nothing(download, tmp_path, convert, scans, code):
    write_tables(download, scans)
    exit_code, result, seen = convert("inspect", download, tmp_path / "source")
    assert (exit_code, result["refused"]["code"]) == (2, code)
    assert "7001" not in seen
    assert not (tmp_path / "source").exists()


@pytest.mark.parametrize("name", ["study_mapping", "labels", "splits"])
def test_a_table_without_a_column_is_refused(download, tmp_path, convert, name):
    path = download / f"{name}_20250611.tsv"
    path.write_text(path.read_text().replace("impression_id", "id", 1))
    assert convert("inspect", download, tmp_path / "source")[1]["refused"]["code"] == "SOURCE_COLUMNS"
