"""Rendered CT patches."""

import numpy as np
import pytest

from synthetic import ct
from synthetic.draws import generator, uniforms
from synthetic.world import World

NAMES = World.named("li2025", 0).loaded("image")
NEUTRAL = np.full((1, 3), 0.5)


def row(protocol=NEUTRAL, **at):
    t = np.zeros((1, len(NAMES)))
    for name, value in at.items():
        t[0, NAMES.index(name)] = value
    return ct.parameters(t, NAMES, protocol).to_dict("records")[0]


def test_links_give_the_stated_values_at_zero_and_stay_in_range():
    middle = row()
    assert middle["diameter_mm"] == pytest.approx(9)
    assert (middle["spiculation"], middle["emphysema"], middle["vessels"], middle["elongation"]) == (0.5, 0.25, 4, 1.2)
    assert (row(u_image2=9)["diameter_mm"], row(u_image2=-9)["diameter_mm"]) == (22, 4)
    assert (row(n_image6=-9)["vessels"], row(n_image6=9)["vessels"]) == (2, 6)


def test_a_patch_is_int16_hu_of_lung_with_a_nodule_in_the_middle():
    patch = ct.render(row(s2=-3), 0, 0)
    assert patch.dtype == np.int16
    assert patch.shape == (32, 32, 32)
    assert -1000 < np.median(patch) < -800
    assert patch[14:18, 14:18, 14:18].mean() > -150


def test_anatomy_is_fixed_and_noise_is_fresh_per_scan():
    first, again, second = (ct.render(row(), 0, 7, scan).astype(int) for scan in (0, 0, 1))
    assert (first == again).all()
    assert 15 < (first - second).std() / np.sqrt(2) < 35
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("diameter_mm", [6, 9, 14, 20])
def test_the_nodule_has_the_stated_size(diameter_mm):
    quiet = row() | {
        "diameter_mm": diameter_mm,
        "vessels": 0,
        "spiculation": 0,
        "lobulation": 0,
        "noise_factor": 0,
        "ground_glass": 0,
    }
    quiet |= {"texture_hu": 0, "emphysema": 0, "elongation": 1.0, "kernel": "sharp", "thickness_mm": 1.0}
    voxels = (ct.render(quiet, 0, 1) > -430).sum()
    assert 2 * (voxels * 3 / (4 * np.pi)) ** (1 / 3) == pytest.approx(diameter_mm, abs=0.6)


def test_the_care_pathway_leaves_the_nodule_alone():
    fixed = {"noise_factor": 0, "vessels": 0, "thickness_mm": 1.0}
    without, with_contrast = (row(c1=c, protocol=np.full((1, 3), 0.4)) | fixed for c in (-3, 3))
    assert (without["contrast"], with_contrast["contrast"]) == (False, True)
    assert (ct.render(without, 0, 3) == ct.render(with_contrast, 0, 3)).all()


def test_contrast_raises_the_vessels_by_150_hu():
    still = row() | {"noise_factor": 0, "vessels": 6, "vessel_factor": 2.0, "diameter_mm": 4}
    plain, bright = (ct.render(still | {"contrast": on}, 0, 5).astype(int) for on in (False, True))
    assert 140 < (bright - plain).max() < 165
    assert (bright - plain).min() > -15
    assert plain.max() < 60


def test_contrast_and_thin_slices_follow_the_pathway():
    many = ct.parameters(
        np.zeros((2000, len(NAMES))) + 2.0 * (np.array(NAMES) == "c1"), NAMES, uniforms(0, "p", 0, 2000, 3)
    )
    assert many["contrast"].mean() == pytest.approx(0.953, abs=0.02)
    assert (many["thickness_mm"] == 1).mean() == pytest.approx(0.953, abs=0.02)
    assert many["kernel"].value_counts(normalize=True)["standard"] == pytest.approx(0.5, abs=0.05)
