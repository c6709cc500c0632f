"""Rendered CT patches."""

from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import rfftn
from scipy.ndimage import gaussian_filter, uniform_filter1d

from synthetic import concepts, ct, scanner
from synthetic.draws import generator, uniforms
from synthetic.presets import Site, find_site
from synthetic.world import World

WORLD = World.named("li2025", 0)
NAMES = WORLD.loaded("image")
SITE = find_site("li2025", "internal")
NEUTRAL = np.full((1, 3), 0.5)
NO_SIGN = np.zeros((1, 24), bool)
ACQUISITION = {
    "noise_image": 2.0,
    "gain": 1.1,
    "hu_bias": 20.0,
    "cup_hu": 30.0,
    "kernel_mix": (0.0, 0.0, 1.0),
    "thick_mm": 4.0,
    "voxel_mm": 0.8,
}
SPHERE = {"vessels": 0, "spiculation": 0, "lobulation": 0, "noise_factor": 0, "ground_glass": 0, "texture_hu": 0}
SPHERE |= {"emphysema": 0, "elongation": 1.0, "kernel": "sharp", "thickness_mm": 1.0}


def row(protocol=NEUTRAL, site=SITE, **at):
    t = np.zeros((1, len(NAMES)))
    for name, value in at.items():
        t[0, NAMES.index(name)] = value
    return ct.parameters(t, NAMES, protocol, site, NO_SIGN).to_dict("records")[0]


def subjects(count):
    """Parameters and readouts of the internal site's first subjects."""
    t = WORLD.sample(SITE, 0, count).t["image"]
    return ct.parameters(t, NAMES, uniforms(0, "ct/protocol", 0, count, 3), SITE, np.zeros((count, 24), bool)), t


def noiseless(parameters, size=32):
    """HU before rounding and without noise."""
    return ct._measured(parameters | {"noise_factor": 0.0}, 0, 3, 0, size)


@pytest.mark.parametrize("far", [-400.0, 400.0])
def test_a_readout_of_mere_noise_still_makes_a_patch(far):
    patch = ct.render(row(**dict.fromkeys(NAMES, far)), 0, 0)
    assert patch.std() > 30


def test_links_give_the_stated_values_at_zero_and_stay_in_range():
    middle = row()
    assert middle["diameter_mm"] == pytest.approx(9)
    assert (middle["spiculation"], middle["emphysema"], middle["vessels"], middle["elongation"]) == (0.5, 0.25, 4, 1.2)
    assert (row(u_image2=9)["diameter_mm"], row(u_image2=-9)["diameter_mm"]) == (22, 4)
    assert (row(n_image6=-9)["vessels"], row(n_image6=9)["vessels"]) == (2, 6)


@pytest.mark.parametrize("size", ct.SIZES)
def test_a_patch_is_int16_hu_of_lung_with_a_nodule_in_the_middle(size):
    patch = ct.render(row(s2=-3), 0, 0, size=size)
    assert patch.dtype == np.int16
    assert patch.shape == (size, size, size)
    assert -1000 < np.median(patch) < -800
    middle = slice(size // 2 - 2, size // 2 + 2)
    assert patch[middle, middle, middle].mean() > -150


def test_images_depend_on_the_readout_and_the_acquisition_knobs_alone():
    people = WORLD.sample(SITE, 0, 3)
    changed = replace(people, z=people.z + 1, c=-people.c, eta=-people.eta, y=~people.y, label=~people.label)
    other = {f.name: getattr(SITE, f.name) for f in fields(Site)} | {
        "rho": -0.4, "c_mean": 2.0, "spec": 1.4, "bias_shift": 1.0, "w_u_ehr_factor": 2.0, "group_shift": 1.0,
        "label_flip": 0.1, "follow_up_days": 100, "code_shift": 0.5, "ehr_missing": 0.5, "vocabulary_split": 0.5,
        "vocabulary_merge": 0.5, "lab_unit": 0.5, "coding_delay_days": 9, "mispair": 0.5, "unpaired": 0.5,
    }  # fmt: skip
    assert {name for name, value in other.items() if value == getattr(SITE, name)} == {*ACQUISITION, "name", "offset"}
    frames = []
    for who, site in ((people, SITE), (changed, Site(**other))):
        seen = concepts.draw(who.t, 0, 0)[:, concepts.IN_IMAGE]
        frames.append(ct.parameters(who.t["image"], NAMES, uniforms(0, "ct/protocol", 0, 3, 3), site, seen))
    pd.testing.assert_frame_equal(*frames)
    for i, (a, b) in enumerate(zip(*(frame.to_dict("records") for frame in frames), strict=True)):
        assert (ct.render(a, 0, i) == ct.render(b, 0, i)).all()


def test_any_order_and_any_batch_give_the_same_bytes():
    whole, t = subjects(6)
    forth = [ct.render(r, 0, i) for i, r in enumerate(whole.to_dict("records"))]
    for i in reversed(range(6)):
        protocol = uniforms(0, "ct/protocol", i, 1, 3)
        alone = ct.parameters(t[i : i + 1], NAMES, protocol, SITE, NO_SIGN).to_dict("records")[0]
        assert (ct.render(alone, 0, i) == forth[i]).all()


def test_anatomy_is_fixed_and_noise_is_fresh_per_scan():
    first, again, second = (ct.render(row(), 0, 7, scan).astype(int) for scan in (0, 0, 1))
    assert (first == again).all()
    assert 15 < (first - second).std() / np.sqrt(2) < 35
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.9


def test_growth_changes_the_patch_near_the_nodule_alone():
    small, large = (noiseless(row() | {"diameter_mm": d}) for d in (8.0, 11.0))
    far = np.hypot(*np.meshgrid(*[np.arange(32) - 15.5] * 3, indexing="ij")[:2]) > 14  # the nodule, spicules and blur
    assert np.abs(large - small)[far].max() < 1
    assert (large - small).max() > 300


@pytest.mark.parametrize(
    ("diameter_mm", "size", "voxel_mm"),
    [(6, 32, 1), (9, 32, 1), (14, 32, 1), (26, 32, 1), (14, 32, 0.7), (20, 48, 1), (26, 64, 0.8)],
)
def test_the_nodule_has_the_stated_size(diameter_mm, size, voxel_mm):
    sphere = SPHERE | {"offset_x_mm": 0.3, "diameter_mm": diameter_mm, "voxel_mm": voxel_mm}
    volume_mm3 = (ct.render(row() | sphere, 0, 1, size=size) > -420).sum() * voxel_mm**2
    assert 2 * (volume_mm3 * 3 / (4 * np.pi)) ** (1 / 3) == pytest.approx(diameter_mm, abs=0.5)


@pytest.mark.parametrize("glass", [0.1, 0.3, 0.6, 1.0])
def test_a_nodules_mean_density_follows_its_share_of_ground_glass(glass):
    nodule = row() | SPHERE | {"diameter_mm": 20.0}
    lung, solid, seen = (noiseless(nodule | change) for change in ({"diameter_mm": 0.01}, {}, {"ground_glass": glass}))
    share = (seen - lung).sum() / (solid - lung).sum()  # blur keeps the sums
    assert -860 + 880 * share == pytest.approx(20 * (1 - glass) - 550 * glass, abs=6)
    part_solid = seen[16, 16, 16] > seen[16, 16, 24] + 50
    assert part_solid == (glass < 1)


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
    t = np.zeros((2000, len(NAMES))) + 2.0 * (np.array(NAMES) == "c1")
    many = ct.parameters(t, NAMES, uniforms(0, "p", 0, 2000, 3), SITE, np.zeros((2000, 24), bool))
    assert many["contrast"].mean() == pytest.approx(0.953, abs=0.02)
    assert (many["thickness_mm"] == 1).mean() == pytest.approx(0.953, abs=0.02)
    assert many["kernel"].value_counts(normalize=True)["standard"] == pytest.approx(0.5, abs=0.05)


def vessels(grid, subject):
    volume = np.zeros(grid.shape, np.float32)
    ct._add_vessels(volume, grid, {"vessels": 4, "vessel_factor": 1.0, "contrast": False}, generator(0, "v", subject))
    return grid.crop(volume)


def test_a_larger_patch_shows_the_same_nodule_and_adds_to_its_vessels():
    grids = scanner.grid(32, 1.0), scanner.grid(64, 1.0)
    nodules = [np.full(grid.shape, -860, np.float32) for grid in grids]
    for nodule, grid in zip(nodules, grids, strict=True):
        ct._add_nodule(nodule, grid, row(), generator(0, "n"))
    assert np.allclose(grids[0].crop(nodules[0]), grids[1].crop(nodules[1])[16:-16, 16:-16, 16:-16], atol=1e-3)
    for i in range(5):
        small, large = (vessels(grid, i) for grid in grids)
        assert (large[16:-16, 16:-16, 16:-16] > small - 0.5).all()
        assert large.sum() > 4 * small.sum()


def test_vessels_fill_the_same_share_of_a_patch_of_any_size():
    share = {size: np.mean([vessels(scanner.grid(size, 1.0), i) > 15 for i in range(30)]) for size in ct.SIZES}
    assert share[48] == pytest.approx(share[32], rel=0.2)
    assert share[64] == pytest.approx(share[32], rel=0.2)


# the scanner's knobs


@pytest.mark.parametrize("knob", ACQUISITION)
def test_a_neutral_knob_leaves_the_bytes_and_a_turned_one_does_not(knob):
    neutral = {f.name: f.default for f in fields(Site)}[knob]
    thick = np.array([[0.5, 0.9, 0.5]])
    same, other = (replace(SITE, **{knob: value}) for value in (neutral, ACQUISITION[knob]))
    reference = ct.render(row(thick), 0, 2)
    assert (ct.render(row(thick, same), 0, 2) == reference).all()
    assert (ct.render(row(thick, other), 0, 2) != reference).any()


@settings(max_examples=15, deadline=None)
@given(st.floats(0.5, 2), st.floats(-500, 500), st.floats(-500, 500), st.sampled_from([0.5, 1.0, 2.0]))
def test_gain_offset_and_cupping_are_exactly_as_stated(gain, hu_bias, cup_hu, voxel_mm):
    plain = row() | {"voxel_mm": voxel_mm}
    before = noiseless(plain).astype(float)
    axis = (np.arange(32) - 15.5) * voxel_mm
    square = (axis[:, None] ** 2 + axis**2)[:, :, None]
    expected = gain * (before + 1000) - 1000 + hu_bias + cup_hu * square / 16**2
    after = noiseless(plain | {"gain": gain, "hu_bias": hu_bias, "cup_hu": cup_hu})
    assert np.allclose(after, expected, atol=0.05)


def test_gain_offset_and_cupping_leave_the_noise_alone():
    turned = row() | {"gain": 1.5, "hu_bias": 30.0, "cup_hu": 50.0}
    noise = [ct._measured(r, 0, 3, 0, 32) - noiseless(r) for r in (row(), turned)]
    assert np.allclose(*noise, atol=0.01)


def test_noise_doubles_with_its_knob_and_thick_slices_blur_across_in_proportion():
    noise = [
        (ct._measured(row(site=replace(SITE, noise_image=k)), 0, 3, 0, 32) - noiseless(row())).std()
        for k in (0.5, 1, 2)
    ]
    assert np.array(noise) / noise[1] == pytest.approx([0.5, 1, 2], rel=1e-3)
    edges = []
    for thick in (1.0, 2.5, 4.0, 5.0):
        one = row(np.array([[0.5, 0.9, 0.5]]), replace(SITE, thick_mm=thick)) | SPHERE | {"diameter_mm": 14}
        across = noiseless(one | {"thickness_mm": thick})[16, 16]
        edges.append(((across > -700) & (across < -140)).sum())
    assert edges == sorted(edges)
    assert edges[-1] >= edges[0] + 4


def test_a_field_of_view_samples_the_same_nodule_at_its_spacing():
    area = {}
    for voxel_mm in (0.5, 0.8, 1.0, 1.6):
        sphere = row(site=replace(SITE, voxel_mm=voxel_mm)) | SPHERE | {"diameter_mm": 12}
        area[voxel_mm] = (noiseless(sphere)[:, :, 16] > -420).sum()
    assert list(area.values()) == sorted(area.values(), reverse=True)
    assert np.array(list(area.values())) * np.array(list(area)) ** 2 == pytest.approx(np.full(4, np.pi * 36), rel=0.08)


# the scanner itself, against its formulas


@pytest.mark.parametrize(("size", "voxel_mm"), [(32, 1.0), (64, 1.0), (32, 0.6)])
@pytest.mark.parametrize("power", [3.0, 3.5])
def test_random_fields_have_the_same_density_on_every_grid(power, size, voxel_mm):
    grid = scanner.grid(size, voxel_mm)
    found = np.stack([scanner.field(grid, generator(0, "f", i), power) for i in range(30)])
    f_xy, f_z = scanner._frequencies(grid)
    f = np.broadcast_to(np.hypot(f_xy, f_z), (grid.shape[0], grid.shape[1], grid.shape[2] // 2 + 1))
    density = (np.abs(rfftn(found, axes=(1, 2, 3))) ** 2).mean(0) * voxel_mm**2 / np.prod(grid.shape)
    reference = scanner.Grid(32)
    assert np.var([scanner.field(reference, generator(0, "g", i), power) for i in range(60)]) == pytest.approx(
        1, abs=0.06
    )
    # unit variance on the default grid fixes the constant: the sum of f^-power over its modes
    modes = np.hypot(scanner._frequencies(reference)[0], np.fft.fftfreq(reference.shape[2]))
    constant = np.prod(reference.shape) / (modes[modes > 0] ** -power).sum()
    for near, far in ((0.03, 0.06), (0.1, 0.2), (0.3, 0.5)):
        band = (f > near) & (f < far)
        assert (density[band] / (constant * f[band] ** -power)).mean() == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize(
    ("kernel", "hu", "cutoff"), [("smooth", 15, 0.18), ("standard", 25, 0.28), ("sharp", 40, 0.45)]
)
@pytest.mark.parametrize(("size", "voxel_mm", "thickness_mm"), [(32, 1.0, 2.5), (48, 0.7, 1.0)])
def test_noise_has_the_stated_strength_and_spectrum(kernel, hu, cutoff, size, voxel_mm, thickness_mm):
    grid = scanner.grid(size, voxel_mm)
    amplitude = scanner.noise_amplitude(grid, kernel, thickness_mm)
    drawn = np.stack([scanner.irfftn(scanner.white(grid, generator(0, "n", i)) * amplitude) for i in range(10)])
    assert np.std(drawn) == pytest.approx(hu, rel=0.02)
    x, y, z = grid.shape
    f_xy = np.hypot(np.fft.fftfreq(x, voxel_mm)[:, None], np.fft.fftfreq(y, voxel_mm))[:, :, None]
    f_z = np.fft.fftfreq(z)
    power = (f_xy + 0.001) * np.exp(-2 * (f_xy / cutoff) ** 2) * np.sinc(f_z * thickness_mm) ** 2
    power *= hu**2 / power.sum() * np.prod(grid.shape) ** 2
    found = (np.abs(np.fft.fftn(drawn, axes=(1, 2, 3))) ** 2).mean(0)
    for near, far in ((0.02, 0.1), (0.1, 0.2), (0.2, 0.35)):
        band = np.broadcast_to((f_xy > near) & (f_xy < far) & (np.abs(f_z) < 0.25), found.shape)
        assert found[band].sum() == pytest.approx(power[band].sum(), rel=0.05)


@pytest.mark.parametrize("kernel_sd", [("smooth", 1.1), ("standard", 0.75), ("sharp", 0.5)])
@pytest.mark.parametrize("voxel_mm", [1.0, 0.6])
def test_blur_equals_an_independent_convolution_of_a_phantom(kernel_sd, voxel_mm):
    (kernel, sd), fine = kernel_sd, 3
    grid = scanner.grid(32, voxel_mm)
    blobs = [((1, -2, 0.4), 1.5, 900), ((-3, 2, -1), 1.8, 500)]

    def phantom(*axes):
        x, y, z = np.ix_(*axes)
        return sum(
            hu * np.exp(-((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2) / (2 * r * r)) for (a, b, c), r, hu in blobs
        )

    dense = (
        (np.arange(n * fine) - (n * fine - 1) / 2) / fine * mm
        for n, mm in zip(grid.shape, grid.spacing_mm, strict=True)
    )
    slab = uniform_filter1d(phantom(*dense), 3 * fine, axis=2, mode="wrap")
    expected = gaussian_filter(slab, (fine * sd / voxel_mm,) * 2, mode="wrap", axes=(0, 1))[1::fine, 1::fine, 1::fine]
    silence = np.zeros((*grid.shape[:2], grid.shape[2] // 2 + 1), np.complex64)
    found = scanner.scan(phantom(*grid.axes_mm).astype(np.float32), grid, kernel, 3.0, 1.0, silence, 1.0)
    assert np.abs(found - grid.crop(expected)).max() < 0.004 * expected.max()


INVERTED = [
    *("u_image1", "u_image2", "s1", "s2", "b1", "n_image1", "n_image2", "n_image3", "n_image4", "n_image5", "n_image8")
]


@pytest.mark.parametrize("subject", [0, 4, 9])
def test_a_patch_gives_its_readout_away_far_below_the_readouts_own_spread(subject):
    """Cramer-Rao bound in units of t, where the scan's noise and the lung's texture hide the nodule, all jointly unknown.

    Not differentiable in t: n_image6 (a count) and c1 (contrast, slice thickness: coins). Not in the mean: n_image7 and b2
    (spread of texture and noise, each known from thousands of voxels).
    """
    table, t = subjects(10)
    known, grid = table.to_dict("records")[subject], scanner.grid(32, 1.0)

    def clean(at):
        one = ct.parameters(at[None], NAMES, uniforms(0, "ct/protocol", subject, 1, 3), SITE, NO_SIGN)
        return ct._measured(one.to_dict("records")[0] | {"noise_factor": 0.0}, 0, subject, 0, 32)

    power = np.full((32, 32, 32), 32**3 / 12)  # rounding to whole HU
    for i in range(40):
        texture = scanner.field(grid, generator(9, "texture", i), 3.0) * np.float32(known["texture_hu"])
        protocol = known["kernel"], known["thickness_mm"], 1.0
        lung = scanner.scan(
            texture, grid, *protocol, scanner.white(grid, generator(9, "noise", i)), known["noise_factor"]
        )
        power += np.abs(np.fft.fftn(lung)) ** 2 / 40
    steps = 0.05 * np.array([[name == other for other in NAMES] for name in INVERTED])
    slopes = [np.fft.fftn(clean(t[subject] + e) - clean(t[subject] - e)).ravel() / 0.1 for e in steps]
    whitened = np.stack(slopes) / np.sqrt(power.ravel())
    sd = dict(zip(INVERTED, np.sqrt(np.diag(np.linalg.inv((whitened @ whitened.conj().T).real))), strict=True))
    assert max(sd.values()) < 0.4
    assert sd["u_image2"] < 0.06
    assert sd["u_image1"] < 0.25
