"""A source folder under several knobs at once holds what the world says."""

from dataclasses import replace

import nibabel
import numpy as np
import pandas as pd
import pytest

import synthetic
from synthetic import oracle, truth
from synthetic.plan import Plan, people, pictures
from synthetic.presets import find_site

INTERNAL = find_site("li2025", "internal")
KNOBS = {"mispair": 0.3, "unpaired": 0.3, "ehr_missing": 0.3, "label_flip": 0.3, "follow_up_days": 150}
TURNED = replace(INTERNAL, **KNOBS)
PATIENTS, SCANS = 60, 2


def made(site, first=0, count=PATIENTS):
    plan = Plan("li2025", (site,), 0, "nifti", 32, SCANS, ())
    subjects = plan.sample(first, count)
    persons = people(plan, first, count, subjects)
    return plan, persons, subjects, pictures(plan, first, persons, subjects)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("knobs") / "source"
    synthetic.generate(out, patients=PATIENTS, scans=SCANS, site=TURNED)
    return out


@pytest.fixture(scope="module")
def rows(folder):
    return pd.concat([pd.read_parquet(path) for path in sorted((folder / "ehr" / "data").rglob("*.parquet"))])


def test_labels_stand_at_the_last_ct_as_the_site_records_them_and_cancer_is_coded_in_those_who_have_it(folder, rows):
    _, persons, subjects, _ = made(TURNED)
    label = pd.read_parquet(folder / "labels" / "malignancy" / "0.parquet").set_index("subject_id")
    last = rows[rows["code"] == "CT//CHEST"].groupby("subject_id")["time"].max()
    assert (label["prediction_time"].reindex(last.index) == last).all()
    assert (label["boolean_value"].reindex(persons["subject_id"]) == subjects.label).all()
    sick = set(rows.loc[rows["code"] == "DIAGNOSIS//LUNG_CANCER", "subject_id"])
    assert sick == set(persons["subject_id"][subjects.y])
    assert (subjects.y & ~subjects.label).any()
    assert (~subjects.y & subjects.label).any()


def test_the_unpaired_have_no_image_and_those_without_a_record_nothing_but_images(folder, rows):
    _, persons, subjects, _ = made(TURNED)
    scans = rows[rows["code"] == "CT//CHEST"]
    assert set(scans["subject_id"]) == set(persons["subject_id"][~persons["unpaired"]])
    assert scans["image_id"].is_unique
    assert len(scans) == len(list((folder / "images").glob("*.nii"))) == SCANS * (~persons["unpaired"]).sum()
    blind = rows[rows["subject_id"].isin(persons["subject_id"][~subjects.seen_ehr])]
    assert set(blind["code"]) <= {"CT//CHEST", "SITE//internal", "DIAGNOSIS//LUNG_CANCER"}


def test_the_noise_of_a_repeated_scan_is_fresh(folder):
    listing = pd.read_csv(folder / "images" / "images.csv").sort_values("time")
    for _, files in list(listing.groupby("patient_id")["file"])[:10]:
        first, second = (np.asarray(nibabel.load(folder / "images" / name).dataobj, float) for name in files)
        assert (first - second)[0].std() > 5  # a face of the patch, where no nodule reaches


def test_growth_follows_the_outcome_and_not_the_recorded_label():
    _, _, _, plain = made(INTERNAL)
    _, _, subjects, flipped = made(replace(INTERNAL, label_flip=0.5))
    assert (subjects.label != subjects.y).any()
    for a, b in zip(plain, flipped, strict=True):
        pd.testing.assert_frame_equal(a, b)


def test_the_truth_of_a_range_is_part_of_the_whole():
    whole, persons, subjects, shown = made(TURNED)
    some = made(TURNED, 20, 30)
    pairs = (
        (truth.latents(whole, 0, persons, subjects, shown), truth.latents(some[0], 20, *some[1:])),
        (truth.scores(whole, persons, subjects, shown), truth.scores(*some)),
    )
    for all_of, part in pairs:
        assert all((np.asarray(part[name]) == np.asarray(all_of[name])[20:50]).all() for name in all_of)


def test_c_blind_on_disk_is_blind():
    plan, persons, subjects, shown = made(INTERNAL)
    found = truth.scores(replace(plan, scans=1), persons, subjects, shown[:1])["c_blind_both"]
    assert (found == oracle.c_blind(plan.world, INTERNAL, subjects, "both")).all()
