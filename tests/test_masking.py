"""Masks hide what they should, as often as they should, and the same way every time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mmjepa.keyed import generator
from mmjepa.masking import (
    MODES,
    WITHIN,
    CellMaskConfig,
    PatchMaskConfig,
    check_patches,
    draw_cells,
    draw_events,
    draw_patches,
    draw_rollout_start,
    feasible,
    visible_count,
)

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


@given(
    st.tuples(st.integers(2, 6), st.integers(2, 6), st.integers(2, 6)),
    st.integers(0, 2**32),
    st.sampled_from([PatchMaskConfig(), PatchMaskConfig(block=0.3, blocks=3, visible=0.1)]),
)
@settings(max_examples=150, deadline=None)
def test_patches_are_disjoint_sorted_and_always_as_many(grid, seed, config):
    visible, hidden = draw_patches(grid, generator(seed, "mask"), config)
    assert len(visible) == visible_count(grid, config)
    assert not set(visible.tolist()) & set(hidden.tolist())
    assert len(hidden) > 0
    for chosen in (visible, hidden):
        assert (np.diff(chosen) > 0).all()
        assert chosen.min() >= 0
        assert chosen.max() < np.prod(grid)


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


def test_random_cells_hide_every_cell_equally_often_and_30_to_50_percent(draws):
    found, n = frequency(draws, "random_cells")
    chances = found[PRESENT]
    p = chances.mean()
    assert 0.3 <= p <= 0.5
    assert (np.abs(chances - p) < five_errors(p, n)).all()
    counts = {int(m.target.sum()) for m in draws if m.mode == "random_cells"}
    assert counts == {2, 3, 4} or counts == {2, 3}


GRID = (4, 5, 6)


def prefix_truncated(rng):
    """The public samplers' way to make ragged masks rectangular: the first k in raster order."""
    hidden = draw_patches(GRID, rng, PatchMaskConfig())[1]
    outside = np.setdiff1d(np.arange(np.prod(GRID)), hidden)
    return outside[: visible_count(GRID, PatchMaskConfig())]


def visits(draw, draws=DRAWS):
    rng, total = np.random.default_rng(1), np.zeros(np.prod(GRID))
    for _ in range(draws):
        total[draw(rng)] += 1
    return (total / draws).reshape(GRID)


def symmetric(found, draws=DRAWS):
    """Whether place i is visited as often as its mirror image along every axis, within five standard errors."""
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        mean = found.mean(axis=others)
        spread = np.sqrt(mean * (1 - mean) / draws)
        if (np.abs(mean - mean[::-1]) > 5 * spread).any():
            return False
    return bool(found.min() > 0)


@pytest.mark.parametrize("which", [0, 1])
def test_patches_visit_every_place_as_often_as_its_mirror_image(which):
    assert symmetric(visits(lambda rng: draw_patches(GRID, rng, PatchMaskConfig())[which]))


def test_prefix_truncation_would_be_caught():
    assert not symmetric(visits(prefix_truncated, 2_000), 2_000)


def test_visible_places_are_uniform_outside_the_blocks():
    """Given what is hidden, every place outside is equally likely to stay visible."""
    rng, seen, outside = np.random.default_rng(2), np.zeros(np.prod(GRID)), np.zeros(np.prod(GRID))
    keep = visible_count(GRID, PatchMaskConfig())
    for _ in range(DRAWS):
        visible, hidden = draw_patches(GRID, rng, PatchMaskConfig())
        free = np.ones(len(seen), bool)
        free[hidden] = False
        seen[visible] += 1
        outside[free] += keep / free.sum()
    p = outside / DRAWS
    assert (np.abs(seen / DRAWS - p) < five_errors(p)).all()


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


@pytest.mark.parametrize(("blocks", "fits"), [(1, True), (2, True), (6, True), (7, False)])
def test_blocks_that_could_hide_too_much_are_known_before_any_draw(blocks, fits):
    config = PatchMaskConfig(block=0.5, blocks=blocks, visible=0.25)  # 8 of 64 tokens a block, 16 visible
    if fits:
        check_patches((4, 4, 4), config)
    else:
        with pytest.raises(ValueError, match="lower block, blocks or visible"):
            check_patches((4, 4, 4), config)


@pytest.mark.parametrize("share", [-1.0, float("nan"), float("inf")])
def test_a_share_of_a_mode_is_a_number_from_zero_on(share):
    with pytest.raises(ValueError, match="probability"):
        CellMaskConfig(probability={"cross_modal": share})
