"""ICU stays on disk."""

import hashlib
from pathlib import Path

import meds
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from mmjepa.cohort import Cohort
from mmjepa.ehr.stays import derive_stays
from mmjepa.ingest import ingest
from mmjepa.refusal import Refusal
from synthetic import icu_source
from synthetic.icu import NONE, Icu, simulate
from synthetic.presets import find_site

SITE = find_site("li2025", "internal")
STAYS = 120


def generate(out: Path, law: Icu | None = None, workers: int = 1, patients: int = STAYS, first: int = 0) -> dict:
    law = law or Icu()
    return icu_source.generate(out, patients=patients, site=SITE, law=law, seed=3, workers=workers, first=first)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("icu") / "source"
    generate(out)
    return out


@pytest.fixture(scope="module")
def stays():
    return simulate(Icu(), 3, 0, STAYS)


def contents(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_folder_is_valid_meds_with_labels(folder):
    for path in (folder / "ehr" / "data").rglob("*.parquet"):
        meds.DataSchema.validate(pq.read_table(path))
    meds.CodeMetadataSchema.validate(pq.read_table(folder / "ehr" / meds.code_metadata_filepath))
    meds.SubjectSplitSchema.validate(pq.read_table(folder / "ehr" / meds.subject_splits_filepath))
    for task in ("icu_death_by_25h", "icu_death_by_48h"):
        meds.LabelSchema.validate(pq.read_table(folder / "labels" / task / "0.parquet"))


def test_stays_that_all_end_early_are_written_without_labels(tmp_path):
    generate(tmp_path / "short", Icu(discharge_bias=30.0), patients=3)
    assert pd.read_parquet(tmp_path / "short" / "truth" / "stays.parquet")["subject_id"].nunique() == 3
    for task in ("icu_death_by_25h", "icu_death_by_48h"):
        table = pq.read_table(tmp_path / "short" / "labels" / task / "0.parquet")
        meds.LabelSchema.validate(table)
        assert table.num_rows == 0


def test_every_stay_is_found_again_with_its_hours_and_its_end(folder, stays, tmp_path):
    ingest(folder, tmp_path / "cohort")
    found, _ = derive_stays(Cohort.open(tmp_path / "cohort").events())
    first = SITE.offset + icu_source._OFFSET + 1
    row = found["subject_id"].to_numpy() - first
    long_enough = np.flatnonzero(stays.end_h >= 6)
    assert set(long_enough) <= set(row)
    assert (found["hours"].to_numpy() == np.minimum(stays.end_h[row] + 1, stays.law.hours)).all()


def test_labels_are_deaths_in_the_hours_after_the_prediction_time(folder, stays):
    first = SITE.offset + icu_source._OFFSET + 1
    rows = pd.concat([pd.read_parquet(p) for p in (folder / "ehr" / "data").rglob("*.parquet")])
    death = rows[rows["code"] == "MEDS_DEATH"].set_index("subject_id")["time"]
    for task, hours in (("icu_death_by_25h", 12), ("icu_death_by_48h", 23)):
        label = pd.read_parquet(folder / "labels" / task / "0.parquet").set_index("subject_id")
        assert (stays.end_h[label.index - first] > (12 if hours == 12 else 24)).all()
        died = death.reindex(label.index)
        inside = (died > label["prediction_time"]) & (died <= label["prediction_time"] + pd.Timedelta(hours=hours))
        assert (inside == label["boolean_value"]).all()
        oracle = pd.read_parquet(folder / "truth" / f"oracle_{task}.parquet")
        assert (oracle["subject_id"] == label.index).all()
        assert oracle["risk"].between(0, 1).all()


def test_the_truth_holds_every_policys_arm_of_the_same_patients(folder, stays):
    states = pd.read_parquet(folder / "truth" / "states.parquet")
    arms = {
        name: arm.drop(columns="policy").reset_index(drop=True) for name, arm in states.groupby("policy", sort=False)
    }
    assert set(arms) == {"observed", "never", "always"}
    observed = arms["observed"][["state_1", "state_2", "state_3"]].to_numpy()
    assert (observed == stays.states.reshape(-1, 3)).all()
    assert not arms["never"]["treated"].any()
    assert arms["always"]["treated"].all()
    first_hour = arms["observed"]["hour"] == 0
    for name in ("never", "always"):
        assert (arms[name][first_hour]["state_1"] == arms["observed"][first_hour]["state_1"]).all()
    ends = pd.read_parquet(folder / "truth" / "stays.parquet")
    died = ends.assign(died=ends["death_h"] != NONE).groupby("policy")["died"].mean()
    assert died["always"] <= died["observed"] <= died["never"]


def test_bytes_do_not_depend_on_workers_or_shards_beyond_their_number(folder, tmp_path, monkeypatch):
    generate(tmp_path / "two", workers=2)
    assert contents(tmp_path / "two") == contents(folder)
    monkeypatch.setattr(icu_source, "SHARD", 50)
    generate(tmp_path / "small")
    for name in ("truth/states.parquet", "truth/oracle_icu_death_by_25h.parquet", "labels/icu_death_by_25h/0.parquet"):
        key = ["policy", "subject_id", "hour"] if "states" in name else ["subject_id"]
        a, b = (pd.read_parquet(x / name).sort_values(key, ignore_index=True) for x in (tmp_path / "small", folder))
        pd.testing.assert_frame_equal(a, b)


def test_a_folder_that_begins_later_holds_the_same_stays(folder, tmp_path):
    generate(tmp_path / "part", patients=30, first=70)
    name = "truth/oracle_icu_death_by_25h.parquet"
    part, whole = (pd.read_parquet(x / name).set_index("subject_id") for x in (tmp_path / "part", folder))
    pd.testing.assert_frame_equal(part, whole.loc[part.index])


def test_wrong_numbers_are_refused_before_anything_is_written(tmp_path):
    for wrong in ({"patients": 0}, {"workers": 0}, {"first": -1}, {"law": Icu(hours=24)}):
        with pytest.raises(Refusal, match="SYNTHETIC_RANGE"):
            generate(tmp_path / "x", **wrong)
    assert not list(tmp_path.iterdir())
