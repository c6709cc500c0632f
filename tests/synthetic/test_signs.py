"""Radiological signs in CT patches."""

from functools import cache

import numpy as np
import pytest

from synthetic import concepts, ct, signs
from synthetic.presets import find_site
from synthetic.world import World

NAMES = World.named("li2025", 0).loaded("image")
AT_NODULE, ELSEWHERE = signs.NAMES[:12], signs.NAMES[12:]


def parameters(*seen, **change):
    """A 12 mm nodule, thin slices and no noise."""
    t = np.zeros((1, len(NAMES)))
    has = np.isin(signs.NAMES, seen)[None]
    row = ct.parameters(t, NAMES, np.full((1, 3), 0.4), find_site("li2025", "internal"), has).to_dict("records")[0]
    return row | {"noise_factor": 0.0, "diameter_mm": 12.0, "thickness_mm": 1.0, "spiculation": 0.1} | change


@cache
def patch(seen, subject, size, other):
    return ct.render(parameters(*seen, **dict(other)), 0, subject, size=size).astype(int)


def change(name, subject=0, size=32, **other):
    """HU that a sign adds to a patch."""
    plain, shown = (patch(seen, subject, size, tuple(other.items())) for seen in ((), (name,)))
    return shown - plain


def distance_mm(size=32):
    axis = np.arange(size) - (size - 1) / 2
    return np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)


def test_there_is_a_sign_for_every_concept_that_images_show():
    assert len(set(signs.NAMES)) == len(signs.NAMES) == len(concepts.IN_IMAGE)
    for column, name in enumerate(signs.NAMES):
        has = np.arange(24)[None] == column
        one = ct.parameters(
            np.zeros((1, len(NAMES))), NAMES, np.full((1, 3), 0.5), find_site("li2025", "internal"), has
        )
        assert one["signs"][0] == (name,)


@pytest.mark.parametrize("name", signs.NAMES)
def test_a_sign_is_seen_in_every_subject_at_any_size_and_by_any_scanner(name):
    for subject in range(6):
        assert (np.abs(change(name, subject)) > 60).sum() >= 15
    for size, other in ((64, {}), (32, {"voxel_mm": 0.7}), (32, {"kernel": "smooth", "thickness_mm": 2.5})):
        assert (np.abs(change(name, 1, size, **other)) > 40).sum() >= 15


@pytest.mark.parametrize("name", AT_NODULE)
def test_signs_of_the_nodule_lie_on_it_or_beside_it(name):
    for subject in range(3):
        near = distance_mm() < (21 if name in ("pleural_tag", "feeding_vessel") else 17)
        hit = np.abs(change(name, subject)) > 60
        assert hit[near].sum() > 0.95 * hit.sum()
        assert hit[distance_mm() < 12].any()


@pytest.mark.parametrize("name", [n for n in ELSEWHERE if n not in ("wire", "atelectasis", "bronchiectasis")])
def test_the_other_signs_leave_the_nodule_alone(name):
    for subject in range(6):
        assert np.abs(change(name, subject)[distance_mm() < 4]).max() <= 25


HU = {
    **dict.fromkeys(("central_calcification", "eccentric_calcification", "popcorn_calcification"), (100, 500)),
    **dict.fromkeys(("granuloma", "pleural_plaque"), (200, 700)),
    **dict.fromkeys(("surgical_clip", "wire"), (700, 3071)),
    **dict.fromkeys(("consolidation", "atelectasis", "lymph_node", "satellite_nodule", "pleural_effusion"), (-150, 90)),
    "halo": (-700, -500),
    **dict.fromkeys(("feeding_vessel", "bronchiectasis"), (-550, 90)),
    **dict.fromkeys(("pleural_tag", "septal_line", "honeycombing"), (-750, 50)),
}
DARK = {
    **dict.fromkeys(("cavity", "cyst", "bulla"), (-1010, -800)),
    **dict.fromkeys(("air_bronchogram", "bubble_lucency"), (-950, -350)),
    "fat": (-200, 0),
}


@pytest.mark.parametrize("name", signs.NAMES)
def test_signs_have_plausible_densities(name):
    for subject in range(4):
        bare = {"vessels": 0, "ground_glass": 0.0}
        delta, shown = change(name, subject, **bare), patch((name,), subject, 32, tuple(bare.items()))
        if name in HU:
            low, high = HU[name]
            # what the blur spares
            lit = delta > 0.8 * delta.max()
        else:
            low, high = DARK[name]
            lit = delta < 0.8 * delta.min()
        assert low <= np.median(shown[lit]) <= high


def test_signs_do_not_move_each_other_or_the_anatomy():
    cyst, both = (patch(seen, 2, 32, ()) for seen in (("cyst",), ("central_calcification", "cyst")))
    added = change("central_calcification", 2)
    assert np.abs(both - cyst - added).max() <= 2  # four times rounded
    first, again = (ct.render(parameters("wire"), 0, 2, scan) for scan in (0, 1))
    assert (first == again).all()


def test_places_vary_between_subjects():
    centres = []
    for subject in range(12):
        hit = np.argwhere(change("granuloma", subject) > 200)
        centres.append(hit.mean(0))
    assert len(np.unique(np.sign(np.array(centres) - 15.5), axis=0)) >= 5


def test_signs_of_the_nodule_grow_with_it():
    small, large = ((change("cavity", 3, diameter_mm=d) < -300).sum() for d in (9.0, 18.0))
    assert large == pytest.approx(8 * small, rel=0.4)
