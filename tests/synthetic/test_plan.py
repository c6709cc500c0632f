"""Who the subjects of a source folder are."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from synthetic import plan as plans
from synthetic.plan import Plan, image_id, people, pictures, scan_second
from synthetic.presets import find_site
from synthetic.world import Subjects

INTERNAL, EXTERNAL = find_site("li2025", "internal"), find_site("li2025", "external")
EAST = replace(INTERNAL, name="east", offset=30_000_000, mispair=0.4, unpaired=0.2)


def made(*sites, scans=1, first=0, count=2000) -> tuple[Plan, Subjects, pd.DataFrame]:
    plan = Plan("li2025", sites, 0, "nifti", 32, scans, ())
    subjects = plan.sample(first, count)
    return plan, subjects, people(plan, first, count, subjects)


def test_splits_are_seventy_fifteen_fifteen_and_ids_unique():
    plan, _, persons = made(INTERNAL, EXTERNAL, count=4000)
    share = persons["split"].value_counts(normalize=True)
    assert share.to_dict() == pytest.approx({"train": 0.7, "tuning": 0.15, "held_out": 0.15}, abs=0.02)
    assert persons["patient_id"].is_unique
    assert persons["subject_id"].is_unique
    ids = [image_id(plan, plan.sites[site], i, 0) for i, site in enumerate(persons["site"])]
    assert len(set(ids)) == len(ids)


def test_patients_of_sites_with_one_initial_keep_ids_of_their_own():
    plan = Plan("li2025", (EAST, replace(EAST, name="eden", offset=40_000_000)), 1933, "nifti", 32, 1, ())
    assert people(plan, 0, 2000, plan.sample(0, 2000))["patient_id"].is_unique


def test_a_cohort_of_two_sites_deals_subjects_evenly_and_keeps_each_sites_own_law():
    plan, subjects, persons = made(INTERNAL, EXTERNAL)
    at_external = persons["site"].to_numpy() == 1
    assert at_external.mean() == pytest.approx(0.5, abs=0.04)
    for site, mine in ((INTERNAL, ~at_external), (EXTERNAL, at_external)):
        alone = plan.world.sample(site, 0, 2000)
        assert (subjects.z[mine] == alone.z[mine]).all()
        assert all((subjects.theta[m][mine] == alone.theta[m][mine]).all() for m in subjects.theta)
        assert (persons["subject_id"][mine] // 10_000_000 == site.offset // 10_000_000).all()


@pytest.mark.parametrize(("first", "count"), [(0, 1), (13, 40), (199, 1)])
def test_a_range_of_people_and_pictures_is_part_of_the_whole(first, count):
    plan, subjects, whole = made(INTERNAL, EAST, scans=3, count=200)
    _, few, part = made(INTERNAL, EAST, scans=3, first=first, count=count)
    pd.testing.assert_frame_equal(part, whole.iloc[first : first + count].reset_index(drop=True))
    for all_of, some in zip(pictures(plan, 0, whole, subjects), pictures(plan, first, part, few), strict=True):
        pd.testing.assert_frame_equal(some, all_of.iloc[first : first + count].reset_index(drop=True))


def test_a_mispaired_image_shows_a_stranger_and_only_in_the_train_split():
    plan, subjects, persons = made(EAST)
    hit = persons["mispaired"].to_numpy()
    train = (persons["split"] == "train").to_numpy()
    assert not hit[~train].any()
    assert hit[train].mean() == pytest.approx(0.4, abs=0.04)
    assert persons["unpaired"][train].mean() == pytest.approx(0.2, abs=0.04)
    assert not persons["unpaired"][~train].any()
    shown = pictures(plan, 0, persons, subjects)[0]
    honest = pictures(plan, 0, persons.assign(mispaired=False), subjects)[0]
    assert (shown["body"][hit] >= plans._STRANGER).all()
    same = (shown["diameter_mm"] == honest["diameter_mm"]).to_numpy()
    assert (same == ~hit).all()
    assert abs(np.corrcoef(shown["diameter_mm"][hit], honest["diameter_mm"][hit])[0, 1]) < 0.1


def test_a_stranger_comes_from_the_same_site():
    wide = replace(EAST, mispair=1.0, spec=10.0)
    plan, subjects, persons = made(replace(INTERNAL, mispair=1.0), wide)
    margin = np.log(1 / pictures(plan, 0, persons, subjects)[0]["spiculation"] - 1)[persons["mispaired"]]
    assert margin[persons["site"] == 0].std() == pytest.approx(1, abs=0.1)
    assert margin[persons["site"] == 1].std() > 5


def test_repeated_scans_follow_in_time_and_begin_with_the_single_scans_image():
    plan, subjects, persons = made(INTERNAL, scans=3)
    once, _, single = made(INTERNAL, scans=1)
    pd.testing.assert_frame_equal(pictures(plan, 0, persons, subjects)[0], pictures(once, 0, single, subjects)[0])
    person = persons.to_dict("records")[0]
    seconds = [scan_second(person, k) for k in range(3)]
    assert seconds[0] == person["index_s"]
    assert 72 * 86400 <= seconds[1] - seconds[0] <= 108 * 86400
    assert 292 * 86400 <= seconds[2] - seconds[0] <= 438 * 86400
