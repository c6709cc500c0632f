"""The truth of a source folder."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit

from synthetic import oracle, truth
from synthetic.plan import Plan, people, pictures
from synthetic.presets import find_site

INTERNAL, EXTERNAL = find_site("li2025", "internal"), find_site("li2025", "external")
COUNT = 4000


def made(*sites, scans=1, leaks=()):
    plan = Plan("li2025", sites, 0, "nifti", 32, scans, leaks)
    subjects = plan.sample(0, COUNT)
    persons = people(plan, 0, COUNT, subjects)
    return plan, persons, subjects, pictures(plan, 0, persons, subjects)


def test_each_subject_is_judged_under_the_law_of_its_own_site():
    plan, persons, subjects, shown = made(INTERNAL, EXTERNAL)
    found = truth.scores(plan, persons, subjects, shown)
    for which, site in enumerate(plan.sites):
        mine = persons["site"].to_numpy() == which
        expected = oracle.env_bayes(plan.world, site, subjects, "both")
        assert (found["env_bayes_both"][mine] == expected[mine]).all()
        assert (found["env_bayes_both"][~mine] != expected[~mine]).any()


def test_the_oracle_tells_of_labels_as_each_site_records_them():
    plan, persons, subjects, shown = made(INTERNAL, replace(EXTERNAL, follow_up_days=60, label_flip=0.05))
    found, which = truth.scores(plan, persons, subjects, shown), persons["site"].to_numpy()
    known = found["env_bayes_both"]
    for site in (0, 1):
        mine = which == site
        assert expit(known[mine]).mean() == pytest.approx(subjects.label[mine].mean(), abs=0.02)
        plain = oracle.env_bayes(plan.world, plan.sites[site], subjects, "both")[mine]
        assert oracle.auc(subjects.label[mine], plain) == pytest.approx(oracle.auc(subjects.label[mine], known[mine]))
    ignorant = np.where(which == 1, oracle.env_bayes(plan.world, EXTERNAL, subjects, "both"), known)
    assert oracle.auc(subjects.label, known) > oracle.auc(subjects.label, ignorant) + 0.05


def test_later_scans_tell_more_than_the_first_and_the_bound_stays_calibrated():
    gains = []
    for scans in (1, 2, 3):
        plan, persons, subjects, shown = made(INTERNAL, scans=scans)
        found = truth.scores(plan, persons, subjects, shown)
        gains.append(oracle.auc(subjects.y, found["env_bayes_both"]))
        assert expit(found["env_bayes_both"]).mean() == pytest.approx(subjects.y.mean(), abs=0.015)
        assert oracle.auc(subjects.y, found["env_bayes_ehr"]) < gains[0]
    assert gains[0] + 0.005 < gains[1] < gains[2] - 0.005


def test_a_subject_with_somebody_elses_images_is_judged_by_the_right_ones():
    honest, wrong = (truth.scores(*made(site, scans=3)) for site in (INTERNAL, replace(INTERNAL, mispair=0.5)))
    for name in set(honest) - {"mayo", "brock"}:
        assert (honest[name] == wrong[name]).all()


def test_a_label_at_the_first_scan_is_judged_by_the_first_scan():
    late, early = made(INTERNAL, scans=3), made(INTERNAL, scans=3, leaks=("later_crop",))
    once = truth.scores(*made(INTERNAL))
    assert (truth.scores(*early)["env_bayes_both"] == once["env_bayes_both"]).all()
    assert (truth.scores(*late)["env_bayes_both"] != once["env_bayes_both"]).any()


def test_reference_scores_know_something_and_less_than_the_oracle():
    plan, persons, subjects, shown = made(INTERNAL)
    found = truth.scores(plan, persons, subjects, shown)
    best = oracle.auc(subjects.y, found["env_bayes_both"])
    for name in ("mayo", "brock"):
        assert 0.6 < oracle.auc(subjects.y, found[name]) < best - 0.1


def test_latents_hold_what_was_drawn_and_what_is_shown():
    plan, persons, subjects, shown = made(replace(INTERNAL, mispair=0.5, ehr_missing=0.2), scans=2)
    found = truth.latents(plan, 0, persons, subjects, shown)
    assert (found["s2"] == subjects.z[:, plan.world.block["s"]][:, 1]).all()
    assert (found["seen_ehr"] == subjects.seen_ehr).all()
    assert (found["ct_diameter_mm"] == shown[0]["diameter_mm"]).all()
    assert (found["ct_diameter_mm_1"] == shown[1]["diameter_mm"]).all()
    own = found["t_image_u_image2"]
    hit = found["mispaired"]
    fit = np.clip(np.exp(np.log(9) + 0.35 * own), 4, 22)
    assert np.allclose(fit[~hit], found["ct_diameter_mm"][~hit])
    assert not np.allclose(fit[hit], found["ct_diameter_mm"][hit])
