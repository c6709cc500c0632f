"""Which item, which rate, which phase: functions of (seed, phases, step) and nothing else."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjepa.curriculum import Curriculum, Phase


def phases(*steps, **special):
    return tuple(
        Phase(name=f"p{i}", steps=n, train=("predictor",), **special.get(f"p{i}", {})) for i, n in enumerate(steps)
    )


def everything(curriculum):
    return [
        item
        for index, phase in enumerate(curriculum.phases)
        for step in range(phase.steps)
        for item in curriculum.drawn(index, step)
    ]


@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=4),
    st.lists(st.one_of(st.none(), st.integers(1, 9)), min_size=4, max_size=4),
    st.integers(1, 11),
    st.integers(1, 9),
)
@settings(max_examples=100, deadline=None)
def test_every_item_comes_once_an_epoch_across_phases_and_batch_sizes(steps, sizes, items, batch):
    made = tuple(
        Phase(name=str(i), steps=n, train=("predictor",), batch=size)
        for i, (n, size) in enumerate(zip(steps, sizes[: len(steps)], strict=True))
    )
    drawn = everything(Curriculum(made, batch, items, 0))
    assert [epoch for epoch, _ in drawn] == [place // items for place in range(len(drawn))]
    full = len(drawn) // items * items
    assert all(n == 1 for n in Counter(drawn).values())
    assert len(set(drawn[:full])) == full
    assert {index for _, index in drawn} <= set(range(items))


def test_the_order_is_another_in_every_epoch_and_seed():
    one = everything(Curriculum(phases(4), 10, 20, 0))
    first, second = [i for e, i in one if e == 0], [i for e, i in one if e == 1]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert first != list(range(20))
    assert [i for _, i in everything(Curriculum(phases(2), 10, 20, 1))] != first


def test_a_step_is_drawn_alike_whenever_it_is_asked_for():
    made = phases(3, 5, p1={"batch": 2})
    walked = [Curriculum(made, 4, 7, 0).drawn(1, step) for step in range(5)]
    curriculum = Curriculum(made, 4, 7, 0)
    assert [curriculum.drawn(1, step) for step in (4, 0, 2, 1, 3)] == [walked[step] for step in (4, 0, 2, 1, 3)]


def rates(curriculum, warmup=0.1, floor=0.0):
    return [
        curriculum.rate(index, step, warmup, floor)
        for index, phase in enumerate(curriculum.phases)
        for step in range(phase.steps)
    ]


def test_one_schedule_spans_all_phases():
    split, whole = Curriculum(phases(7, 0, 30, 63), 4, 9, 0), Curriculum(phases(100), 4, 9, 0)
    assert rates(split) == rates(whole)
    got = rates(whole)
    assert got[:10] == [pytest.approx((i + 1) / 10) for i in range(10)]
    assert got[10] == 1
    assert got[55] == pytest.approx(0.5)
    assert all(b < a for a, b in pairwise(got[10:]))
    assert 0 < got[-1] < 1e-3
    assert rates(whole, floor=0.2)[-1] == pytest.approx(0.2, abs=1e-3)


def test_a_phase_with_a_schedule_of_its_own_leaves_the_others_theirs():
    mixed = Curriculum(phases(20, 40, 60, p1={"own_schedule": True}), 4, 9, 0)
    got = rates(mixed)
    assert got[20:60] == rates(Curriculum(phases(40), 4, 9, 0))
    assert got[:20] + got[60:] == rates(Curriculum(phases(80), 4, 9, 0))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_the_rate_is_always_a_share_of_the_peak(steps, warmup, floor):
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates(Curriculum(phases(*steps), 4, 9, 0), warmup, floor))


def test_the_walk_goes_on_where_it_stopped():
    curriculum = Curriculum(phases(3, 0, 2), 4, 9, 0)
    assert list(curriculum.walk(0, 2)) == [(0, 2), (1, 0), (2, 0)]
    assert list(curriculum.walk(1, 0)) == [(1, 0), (2, 0)]
    assert curriculum.steps == 5


def test_a_phase_that_trains_nothing_must_not_step():
    with pytest.raises(ValueError, match="trains nothing"):
        Phase(name="p", steps=1)
    with pytest.raises(ValueError, match="batch=0"):
        Phase(name="p", steps=1, train=("ct",), batch=0)
    with pytest.raises(ValueError, match="steps=-1"):
        Phase(name="p", steps=-1)
    assert Phase(name="sync", steps=0, sync=True).train == ()
