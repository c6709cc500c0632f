"""Masks hide what they should, as often as they should, and the same way every time."""

import hashlib
from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mmjepa.config import build
from mmjepa.keyed import generator
from mmjepa.masking import (
    MODES,
    WITHIN,
    CellMaskConfig,
    PatchMaskConfig,
    block_shapes,
    check_patches,
    draw_cells,
    draw_events,
    draw_patches,
    draw_rollout_start,
    feasible,
    most_hidden,
    subsample,
    visible_count,
)
from mmjepa.refusal import Refusal

DRAWS = 20_000
EVERY = CellMaskConfig(
    probability={"cross_modal": 0.35, "temporal": 0.25, "random_cells": 0.2, "patches": 0.1, "events": 0.1}
)


def five_errors(p, draws=DRAWS):
    return 5 * np.sqrt(p * (1 - p) / draws)


@given(st.integers(1, 5).flatmap(lambda t: arrays(bool, (t, 2))), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_context_and_target_are_disjoint_non_empty_parts_of_what_is_present(present, seed):
    kept = present.copy()
    mask = draw_cells(present, generator(seed, "mask"), EVERY)
    assert (present == kept).all()
    if mask is None:
        assert feasible(present) == []
        return
    assert mask.mode in feasible(present)
    assert not (mask.context & mask.target).any()
    assert ((mask.context | mask.target) == present).all()
    assert mask.context.any()
    assert mask.target.any() == (mask.mode not in WITHIN)
    again = draw_cells(present, generator(seed, "mask"), EVERY)
    assert again.mode == mask.mode
    assert (again.target == mask.target).all()


PATCHES = {name: PatchMaskConfig(sampler=name) for name in ("equal_blocks", "varied_blocks", "subset")}


@st.composite
def patch_settings(draw):
    """A grid and a config that may be drawn from."""
    grid = draw(st.tuples(*[st.integers(2, 8)] * 3))
    low = draw(st.floats(0.02, 0.3))
    config = PatchMaskConfig(
        sampler=draw(st.sampled_from(sorted(PATCHES))),
        block=draw(st.floats(0.1, 0.6)),
        blocks=draw(st.integers(1, 4)),
        scale=(low, low + draw(st.floats(0, 0.2))),
        aspect=draw(st.floats(1, 3)),
        visible=draw(st.floats(0.01, 0.5)),
    )
    try:
        check_patches(grid, config)
    except ValueError:
        assume(False)
    return grid, config


@given(patch_settings(), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_patches_are_disjoint_non_empty_sorted_and_the_visible_always_as_many(setting, seed):
    grid, config = setting
    visible, hidden = draw_patches(grid, generator(seed, "mask"), config)
    assert len(visible) == visible_count(grid, config) > 0
    assert 0 < len(hidden) <= most_hidden(grid, config)
    assert not set(visible.tolist()) & set(hidden.tolist())
    for chosen in (visible, hidden):
        assert (np.diff(chosen) > 0).all()
        assert chosen.min() >= 0
        assert chosen.max() < np.prod(grid)


@pytest.mark.parametrize("config", PATCHES.values(), ids=PATCHES)
def test_a_volume_is_masked_alike_whatever_is_drawn_beside_it(config):
    def drawn(subject, grid):
        return [places.tolist() for places in draw_patches(grid, generator(3, "mask", 0, subject), config)]

    alone = {subject: drawn(subject, GRID) for subject in range(8)}
    for mates in ([7, 2, 5], [0, 1, 2, 3, 4, 5, 6, 7], [5]):
        for subject in mates:
            drawn(subject + 100, (8, 8, 8))
            assert drawn(subject, GRID) == alone[subject]
    assert len({str(masks) for masks in alone.values()}) == 8


@pytest.mark.parametrize(
    ("grid", "config", "digest"),
    [
        ((4, 4, 4), PatchMaskConfig(), "351e8d9a1cbbc623"),
        ((4, 5, 6), PatchMaskConfig(), "a8ab11838f498aa7"),
        ((8, 8, 8), PatchMaskConfig(block=0.3, blocks=3, visible=0.1), "137008e0c4f1c02d"),
    ],
)
def test_default_draws_keep_the_bits_of_recorded_runs(grid, config, digest):
    bits = hashlib.blake2b(digest_size=8)
    for subject in range(100):
        rng = generator(7, "mask", subject)
        for places in draw_patches(grid, rng, config):
            bits.update(places.astype("<i8").tobytes())
        bits.update(rng.bytes(4))
    assert bits.hexdigest() == digest


def test_the_infeasible_is_never_drawn():
    ct_only, ehr_only, both = (np.array([cells]) for cells in ([True, False], [False, True], [True, True]))
    assert feasible(ct_only) == ["patches"]
    assert feasible(ehr_only) == ["events"]
    assert feasible(both) == ["cross_modal", "patches", "events"]
    assert feasible(~both) == []
    only_cells = CellMaskConfig(probability={"random_cells": 1.0})
    assert draw_cells(both, generator(0, "m"), only_cells) is None
    assert draw_cells(~both, generator(0, "m"), EVERY) is None


def test_a_single_cell_is_used_from_within_even_where_that_mode_is_not_asked_for():
    for cells, mode in (([[True, False]], "patches"), ([[False, True]], "events")):
        assert draw_cells(np.array(cells), generator(0, "m"), CellMaskConfig()).mode == mode


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_events_are_split_with_some_on_either_side(count, visible, seed):
    shown = draw_events(count, generator(seed, "m"), visible)
    assert shown.shape == (count,)
    assert 0 < shown.sum() < count
    assert abs(shown.sum() - visible * count) <= 1
    assert (shown == draw_events(count, generator(seed, "m"), visible)).all()


def test_every_event_stays_visible_equally_often():
    rng = np.random.default_rng(4)
    found = np.mean([draw_events(9, rng, 0.4) for _ in range(DRAWS)], axis=0)
    assert (np.abs(found - 4 / 9) < five_errors(4 / 9)).all()
    with pytest.raises(ValueError, match="one event"):
        draw_events(1, rng)


PRESENT = np.array([[True, True], [True, True], [True, False], [True, True]])


@pytest.fixture(scope="module")
def draws():
    rng = np.random.default_rng(0)
    return [draw_cells(PRESENT, rng, EVERY) for _ in range(DRAWS)]


def frequency(draws, mode):
    chosen = [m.target for m in draws if m.mode == mode]
    return np.mean(chosen, axis=0), len(chosen)


def test_modes_come_as_often_as_configured(draws):
    for mode in MODES:
        p = EVERY.probability[mode]
        found = np.mean([m.mode == mode for m in draws])
        assert abs(found - p) < five_errors(p), mode


def test_cross_modal_hides_each_cell_at_its_analytic_frequency(draws):
    found, n = frequency(draws, "cross_modal")
    expected = np.zeros((4, 2))
    for modality in range(2):  # half: every date; half: one of them
        dates = PRESENT[:, modality].sum()
        expected[PRESENT[:, modality], modality] = 0.5 * (0.5 + 0.5 / dates)
    assert (np.abs(found - expected) <= five_errors(expected, n)).all()
    sides = [m.target[:, 0].any() for m in draws if m.mode == "cross_modal"]
    assert abs(np.mean(sides) - 0.5) < five_errors(0.5, n)
    assert not any(m.target[:, 0].any() and m.target[:, 1].any() for m in draws if m.mode == "cross_modal")


def test_temporal_hides_whole_dates_and_favours_the_last_by_half(draws):
    found, n = frequency(draws, "temporal")
    expected = np.array([1, 1, 1, 3])[:, None] / 6 * PRESENT
    assert (np.abs(found - expected) <= five_errors(expected, n)).all()
    for m in draws:
        if m.mode == "temporal":
            hidden = np.flatnonzero(m.target.any(axis=1))
            assert len(hidden) == 1
            assert (m.target[hidden[0]] == PRESENT[hidden[0]]).all()


def unbalanced(targets, cells):
    """By how many standard errors the mean numbers of CT and EHR targets miss the ratio cells[0] : cells[1]."""
    difference = (targets.sum(axis=1) / cells).dot([1, -1])
    return abs(difference.mean()) / max(1e-9, difference.std() / np.sqrt(len(difference)))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in WITHIN])
@pytest.mark.parametrize("present", [PRESENT, PRESENT | True, PRESENT[1:3]], ids=["4:3", "4:4", "2:1"])
def test_ct_and_ehr_are_targets_in_their_analytic_ratio(present, mode):
    rng, config = np.random.default_rng(2), CellMaskConfig(probability={mode: 1.0})
    targets = np.array([draw_cells(present, rng, config).target for _ in range(DRAWS // 2)])
    dates = present.sum(axis=0)
    last = np.where(np.arange(len(present)) < len(present) - 1, 0.5 / (len(present) - 1), 0.5)
    expected = {"cross_modal": 0.25 * (dates + 1), "temporal": last @ present, "random_cells": dates}[mode]
    assert unbalanced(targets, expected) < 5
    assert unbalanced(targets, expected * [1.0, 1.2]) > 5
    if mode != "random_cells":  # there the ratio is all that is known: how many are hidden is drawn and rounded
        found, spread = targets.sum(axis=1).mean(axis=0), targets.sum(axis=1).std(axis=0)
        assert (np.abs(found - expected) <= 5 * spread / np.sqrt(len(targets)) + 1e-9).all()


def test_random_cells_hide_every_cell_equally_often_and_30_to_50_percent(draws):
    found, n = frequency(draws, "random_cells")
    chances = found[PRESENT]
    p = chances.mean()
    assert 0.3 <= p <= 0.5
    assert (np.abs(chances - p) < five_errors(p, n)).all()
    counts = {int(m.target.sum()) for m in draws if m.mode == "random_cells"}
    assert counts == {2, 3, 4} or counts == {2, 3}


GRID = (4, 5, 6)


CONTEXT, TARGET = 0, 1


def visits(draw, draws=DRAWS):
    """Which places each of many draws chose: bool [draws, X, Y, Z]."""
    rng, chosen = np.random.default_rng(1), np.zeros((draws, np.prod(GRID)), dtype=bool)
    for row in chosen:
        row[draw(rng)] = True
    return chosen.reshape(draws, *GRID)


@pytest.fixture(scope="module")
def visited():
    """visits() of context and target for every sampler."""
    found = {}
    for name, config in PATCHES.items():
        rng, chosen = np.random.default_rng(1), np.zeros((2, DRAWS, np.prod(GRID)), dtype=bool)
        for row in range(DRAWS):
            for which, places in enumerate(draw_patches(GRID, rng, config)):
                chosen[which, row, places] = True
        found[name] = chosen.reshape(2, DRAWS, *GRID)
    return found


def lopsided(chosen):
    """Why the visits are no honest block sampler's; None if they are.

    Place i and its mirror image along each axis are visited equally often, as slices of the grid within five standard
    errors of a slice's frequency and as single places within five of their paired difference; no place is never visited.
    """
    draws = len(chosen)
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        p = chosen.mean(axis=(0, *(a + 1 for a in others)))
        if (np.abs(p - p[::-1]) > five_errors(p, draws)).any():
            return f"slices along axis {axis}"
        once = chosen ^ np.flip(chosen, axis=axis + 1)  # variance of a difference of two booleans, where its mean is 0
        frequency = chosen.mean(axis=0)
        if (np.abs(frequency - np.flip(frequency, axis=axis)) > 5 * np.sqrt(once.mean(axis=0) / draws)).any():
            return f"places along axis {axis}"
    return None if chosen.any(axis=0).all() else "some place is never visited"


@pytest.mark.parametrize("which", [CONTEXT, TARGET], ids=["context", "target"])
@pytest.mark.parametrize("sampler", PATCHES)
def test_every_place_is_visited_as_often_as_its_mirror_image(visited, sampler, which):
    assert lopsided(visited[sampler][which]) is None


@pytest.mark.parametrize("which", [CONTEXT, TARGET], ids=["context", "target"])
def test_a_subset_visits_every_place_equally_often(visited, which):
    config = PATCHES["subset"]
    p = (visible_count(GRID, config), most_hidden(GRID, config))[which] / np.prod(GRID)
    assert (np.abs(visited["subset"][which].mean(axis=0) - p) < five_errors(p)).all()


@pytest.mark.parametrize("sampler", ["equal_blocks", "varied_blocks"])
def test_blocks_are_rarer_at_the_edge_than_in_the_middle(visited, sampler):
    found = visited[sampler][TARGET].mean(axis=0)
    assert found[0, 0, 0] < found[1:3, 2, 2:4].min() / 2


@pytest.mark.parametrize("which", [CONTEXT, TARGET], ids=["context", "target"])
@pytest.mark.parametrize("sampler", PATCHES)
def test_a_prefix_in_raster_order_would_be_caught(sampler, which):
    """The public samplers' way to make ragged masks rectangular: the first k of what could be taken."""

    def cut(rng):
        hidden = draw_patches(GRID, rng, PATCHES[sampler])[TARGET]
        could = hidden if which == TARGET else np.setdiff1d(np.arange(np.prod(GRID)), hidden)
        return could[: visible_count(GRID, PATCHES[sampler]) if which == CONTEXT else 8]

    assert lopsided(visits(cut, 2_000)) == "slices along axis 0"


@pytest.mark.parametrize("sampler", PATCHES)
def test_tokens_that_are_whole_slices_are_masked_along_z_alone(sampler):
    grid, rng = (1, 1, 12), np.random.default_rng(3)
    config = PatchMaskConfig(sampler=sampler, block=0.25, scale=(0.15, 0.3))
    check_patches(grid, config)
    chosen = np.zeros((2, DRAWS // 4, 12), dtype=bool)
    for row in range(DRAWS // 4):
        for which, places in enumerate(draw_patches(grid, rng, config)):
            chosen[which, row, places] = True
    assert (chosen[CONTEXT].sum(axis=1) == 3).all()
    assert not chosen.all(axis=0).any()
    for which in (CONTEXT, TARGET):
        p = chosen[which].mean(axis=0)
        assert (p > 0).all()
        assert (np.abs(p - p[::-1]) <= np.sqrt(2) * five_errors(p, DRAWS // 4)).all()


def test_a_block_that_never_starts_at_the_last_place_would_be_caught():
    def short(rng):
        inside = tuple(n - 1 for n in GRID)
        return np.ravel_multi_index(
            np.unravel_index(draw_patches(inside, rng, PATCHES["equal_blocks"])[1], inside), GRID
        )

    assert lopsided(visits(short, 2_000)) is not None


def test_a_cut_at_random_to_a_common_size_keeps_every_place_equally_often():
    places, rng = np.array([3, 4, 9, 11, 20, 21, 30]), np.random.default_rng(5)
    taken = np.stack([subsample(places, 3, rng) for _ in range(DRAWS)])
    assert (np.diff(taken, axis=1) > 0).all()
    found = (taken[:, :, None] == places).any(axis=1).mean(axis=0)
    assert (np.abs(found - 3 / 7) < five_errors(3 / 7)).all()


def test_varied_blocks_take_every_shape_that_scale_and_aspect_allow_equally_often():
    config = PatchMaskConfig(sampler="varied_blocks", blocks=1, scale=(0.05, 0.3), aspect=1.6, visible=0.1)
    allowed = {
        (x, y, z)
        for x, y, z in product(range(1, 5), range(1, 6), range(1, 7))
        if 6 <= x * y * z <= 36 and max(x / 4, y / 5, z / 6) <= 1.6 * min(x / 4, y / 5, z / 6) + 1e-12
    }
    assert len(allowed) > 5
    assert set(block_shapes(GRID, config)) == allowed
    rng, count = np.random.default_rng(6), dict.fromkeys(allowed, 0)
    for _ in range(DRAWS):
        places = np.unravel_index(draw_patches(GRID, rng, config)[1], GRID)
        count[tuple(int(np.ptp(along)) + 1 for along in places)] += 1
    p = 1 / len(allowed)
    assert (np.abs(np.array(list(count.values())) / DRAWS - p) < five_errors(p)).all()


def test_targets_keep_all_their_places_however_ragged(visited):
    sizes = visited["varied_blocks"][TARGET].sum(axis=(1, 2, 3))
    assert len(np.unique(sizes)) > 10
    assert sizes.max() == most_hidden(GRID, PATCHES["varied_blocks"])
    assert (
        visited["varied_blocks"][CONTEXT].sum(axis=(1, 2, 3)) == visible_count(GRID, PATCHES["varied_blocks"])
    ).all()


@pytest.mark.parametrize("sampler", PATCHES)
def test_visible_places_are_uniform_outside_the_blocks(visited, sampler):
    """Given what is hidden, every place outside is equally likely to stay visible."""
    free = ~visited[sampler][TARGET]
    p = (visible_count(GRID, PATCHES[sampler]) * free / free.sum(axis=(1, 2, 3), keepdims=True)).mean(axis=0)
    assert (np.abs(visited[sampler][CONTEXT].mean(axis=0) - p) < five_errors(p)).all()


def test_too_little_room_outside_the_blocks_is_an_error():
    with pytest.raises(ValueError, match="lower visible"):
        draw_patches((2, 2, 2), generator(0, "m"), PatchMaskConfig(block=0.9, visible=0.5))


def test_rollouts_start_uniformly_wherever_two_steps_fit():
    rng = np.random.default_rng(3)
    for hours in (1, 2, 3):
        assert draw_rollout_start(hours, rng) == -1
    assert {draw_rollout_start(4, rng) for _ in range(50)} == {1}
    starts = np.bincount([draw_rollout_start(9, rng) for _ in range(DRAWS)], minlength=9) / DRAWS
    assert (np.abs(starts[1:7] - 1 / 6) < five_errors(1 / 6)).all()
    assert starts[0] == starts[7] == starts[8] == 0


def test_impossible_configs_are_errors():
    with pytest.raises(ValueError, match="unknown mode 'cros'"):
        CellMaskConfig(probability={"cros": 1.0})
    with pytest.raises(ValueError, match="least"):
        CellMaskConfig(hide=(0.6, 0.5))
    with pytest.raises(ValueError, match="block="):
        PatchMaskConfig(block=1.0)
    with pytest.raises(ValueError, match="sampler='cubes'"):
        PatchMaskConfig(sampler="cubes")
    for scale in ((0.0, 0.2), (0.3, 0.2), (0.1, 1.0), (float("nan"), 0.2)):
        with pytest.raises(ValueError, match="scale="):
            PatchMaskConfig(scale=scale)
    for aspect in (0.9, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="aspect="):
            PatchMaskConfig(aspect=aspect)


def test_a_sampler_is_chosen_in_a_config_file_by_its_name():
    made = build(PatchMaskConfig, {"sampler": "varied_blocks", "scale": [0.05, 0.1], "aspect": 2.0})
    assert made == PatchMaskConfig(sampler="varied_blocks", scale=(0.05, 0.1), aspect=2.0)
    with pytest.raises(Refusal) as caught:
        build(PatchMaskConfig, {"sampler": "cubes"})
    assert caught.value.code == "CONFIG_VALUE"


@pytest.mark.parametrize(("blocks", "fits"), [(1, True), (2, True), (6, True), (7, False)])
def test_blocks_that_could_hide_too_much_are_known_before_any_draw(blocks, fits):
    config = PatchMaskConfig(block=0.5, blocks=blocks, visible=0.25)  # 8 of 64 tokens a block, 16 visible
    if fits:
        check_patches((4, 4, 4), config)
    else:
        with pytest.raises(ValueError, match="lower block, blocks or visible"):
            check_patches((4, 4, 4), config)


def test_varied_blocks_that_fit_nowhere_or_hide_too_much_are_known_before_any_draw():
    with pytest.raises(ValueError, match="widen scale or aspect"):
        check_patches((2, 2, 2), PatchMaskConfig(sampler="varied_blocks", scale=(0.15, 0.2)))
    with pytest.raises(ValueError, match=r"may hide 96 of 125 tokens.* lower scale, blocks"):
        check_patches((5, 5, 5), PatchMaskConfig(sampler="varied_blocks", scale=(0.3, 0.4), visible=0.3))


@pytest.mark.parametrize(
    "config", [PatchMaskConfig(blocks=1), PatchMaskConfig(sampler="varied_blocks", scale=(0.2, 0.3))]
)
def test_blocks_that_always_cover_the_centre_are_known_before_any_draw(config):
    with pytest.raises(ValueError, match="never be visible"):
        check_patches((3, 3, 3), config)
    check_patches((3, 3, 6), config)


@pytest.mark.parametrize("share", [-1.0, float("nan"), float("inf")])
def test_a_share_of_a_mode_is_a_number_from_zero_on(share):
    with pytest.raises(ValueError, match="probability"):
        CellMaskConfig(probability={"cross_modal": share})
