"""Where things lie in a cohort, and what its labels may be."""

import os
import subprocess
import sys
from datetime import datetime

import numpy as np
import pandas as pd
import pytest

from mmjepa.cohort import Cohort
from mmjepa.ehr.meds_io import ingest_meds
from mmjepa.refusal import Refusal

NOON = datetime(2020, 1, 1, 12)


def write_root(root, value=1.0):
    (root / "data").mkdir(parents=True, exist_ok=True)
    (root / "metadata").mkdir(exist_ok=True)
    events = pd.DataFrame(
        {"subject_id": [1, 1, 2], "time": [NOON] * 3, "code": ["LAB"] * 3, "numeric_value": [value] * 3}
    )
    events.astype({"numeric_value": np.float32}).to_parquet(root / "data" / "0.parquet")
    pd.DataFrame({"code": ["LAB"]}).to_parquet(root / "metadata" / "codes.parquet")
    return root


def write_labels(folder, task="death", file="0.parquet", **columns):
    (folder / task).mkdir(parents=True, exist_ok=True)
    frame = {"subject_id": [1, 2], "prediction_time": [NOON] * 2, "boolean_value": [True, False]} | columns
    pd.DataFrame({name: values for name, values in frame.items() if values is not None}).to_parquet(
        folder / task / file
    )


def refused(code, call, *arguments):
    with pytest.raises(Refusal) as caught:
        call(*arguments)
    assert caught.value.code == code
    return caught.value


def test_importing_cohort_loads_no_heavy_library():
    heavy = "import sys, mmjepa.cohort; print({'pandas', 'pyarrow', 'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", heavy], text=True).strip() == "set()"


def test_cohort_folder_and_bare_root_open_alike(tmp_path):
    bare = Cohort.open(write_root(tmp_path / "root"))
    whole = Cohort.open(write_root(tmp_path / "cohort" / "ehr").parent)
    assert (bare.meds_root, whole.meds_root) == (tmp_path / "root", tmp_path / "cohort" / "ehr")
    assert bare.fingerprint == whole.fingerprint
    assert not whole.has_images


def test_bare_root_is_left_as_it_is(tmp_path):
    cohort = Cohort.open(write_root(tmp_path))
    assert cohort.events().folder is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "metadata"]


def test_store_is_built_once_and_built_again_when_the_source_changes(tmp_path):
    root = write_root(tmp_path / "ehr")
    first = Cohort.open(tmp_path).events()
    assert first.folder == tmp_path / "store"
    built = os.stat(tmp_path / "store").st_ino
    assert Cohort.open(tmp_path).events().fingerprint == first.fingerprint
    assert os.stat(tmp_path / "store").st_ino == built
    os.utime(root / "data" / "0.parquet", ns=(5, 5))  # copied elsewhere: other times, equal bytes
    Cohort.open(tmp_path).events()
    assert os.stat(tmp_path / "store").st_ino == built
    write_root(root, value=2.0)
    second = Cohort.open(tmp_path).events()
    assert second.fingerprint != first.fingerprint
    assert second.values.tolist() == [2.0] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ehr", "store"]


def test_image_index_is_part_of_the_fingerprint(tmp_path):
    write_root(tmp_path / "ehr")
    without = Cohort.open(tmp_path).fingerprint
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct" / "index.parquet").write_bytes(b"index")
    cohort = Cohort.open(tmp_path)
    assert cohort.has_images
    assert cohort.fingerprint != without


@pytest.mark.parametrize(
    ("manifest", "paired"), [('{"paired": true}', True), ('{"paired": false}', False), (None, False)]
)
def test_numbered_images_are_known_as_such(tmp_path, manifest, paired):
    write_root(tmp_path / "ehr")
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct" / "index.parquet").write_bytes(b"index")
    if manifest:
        (tmp_path / "ct" / "manifest.json").write_text(manifest)
    assert Cohort.open(tmp_path).images_paired is paired


def test_missing_and_empty_cohorts_are_refused(tmp_path):
    assert "nowhere" in refused("COHORT_MISSING", Cohort.open, tmp_path / "nowhere").message
    refused("COHORT_EMPTY", Cohort.open, tmp_path)


def test_labels_come_sorted_with_one_value_column(tmp_path):
    write_root(tmp_path / "ehr")
    write_labels(tmp_path / "labels", file="b.parquet", subject_id=[9, 3])
    write_labels(tmp_path / "labels", file="a.parquet")
    write_labels(tmp_path / "labels", file="survival.parquet", time_to_event_days=[1.0, 2.0])
    cohort = Cohort.open(tmp_path)
    frame = cohort.labels("death")
    assert cohort.tasks == ["death"]
    assert frame.columns.tolist() == ["subject_id", "prediction_time", "value"]
    assert frame["subject_id"].tolist() == [1, 2, 3, 9]
    assert frame["value"].tolist() == [True, False, False, True]
    assert str(frame["prediction_time"].dtype) == "datetime64[us]"


def test_an_unknown_task_is_refused_with_the_tasks_that_exist(tmp_path):
    write_root(tmp_path / "ehr")
    write_labels(tmp_path / "labels")
    assert "death" in refused("LABELS_MISSING", Cohort.open(tmp_path).labels, "dead").hint


@pytest.mark.parametrize(
    ("code", "columns"),
    [
        ("LABELS_SCHEMA", {"time_to_event_days": [1.0, 2.0]}),
        ("LABELS_SCHEMA", {"boolean_value": None}),
        ("LABELS_SCHEMA", {"integer_value": [1, 2]}),
        ("LABELS_SCHEMA", {"boolean_value": [True, None]}),
        ("LABELS_SCHEMA", {"boolean_value": None, "float_value": np.array([1, np.nan], np.float32)}),
        ("LABELS_DUPLICATE", {"subject_id": [1, 1]}),
        ("LABELS_TIMEZONE", {"prediction_time": pd.to_datetime([NOON] * 2).tz_localize("America/New_York")}),
        (
            "LABELS_EMPTY",
            {
                "subject_id": np.empty(0, int),
                "prediction_time": np.empty(0, "M8[us]"),
                "boolean_value": np.empty(0, bool),
            },
        ),
    ],
)
def test_labels_outside_the_closed_schema_are_refused_and_not_ingested(tmp_path, code, columns):
    write_root(tmp_path / "source" / "ehr")
    write_labels(tmp_path / "source" / "labels", **columns)
    refused(code, ingest_meds, tmp_path / "source", tmp_path / "cohort")
    assert not (tmp_path / "cohort").exists()


def test_truncated_labels_are_refused(tmp_path):
    write_root(tmp_path / "ehr")
    write_labels(tmp_path / "labels")
    file = tmp_path / "labels" / "death" / "0.parquet"
    file.write_bytes(file.read_bytes()[:100])
    assert "0.parquet" in refused("LABELS_UNREADABLE", Cohort.open(tmp_path).labels, "death").message
