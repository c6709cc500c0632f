"""Crops: where they lie and what they hold."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmjepa.ct.crop import AIR_HU, centre_around, crop_around, random_centre

sizes = st.tuples(*[st.integers(1, 12)] * 3)


@given(shape=sizes, size=sizes, shares=st.tuples(*[st.floats(0, 1)] * 3))
def test_the_mask_says_what_is_volume_and_the_rest_is_air(shape, size, shares):
    volume = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    centre = tuple(share * n - 0.5 for share, n in zip(shares, shape, strict=True))
    crop = crop_around(volume, centre, size)
    assert crop.hu.shape == crop.valid.shape == size
    assert crop.hu.dtype == np.int16
    assert (crop.hu[~crop.valid] == AIR_HU).all()
    places = np.argwhere(crop.valid) + crop.start
    np.testing.assert_array_equal(crop.hu[crop.valid], volume[tuple(places.T)])
    covered = [min(s + n, m) - max(s, 0) for s, n, m in zip(crop.start, size, shape, strict=True)]
    assert crop.valid.sum() == np.prod(np.maximum(covered, 0))


def test_a_crop_wholly_beside_the_volume_is_air():
    crop = crop_around(np.zeros((4, 4, 4), np.int16), (-20.0, 1.0, 40.0), (3, 3, 3))
    assert (crop.hu == AIR_HU).all()
    assert not crop.valid.any()


def test_a_crop_is_a_copy_that_may_be_written_to():
    volume = np.zeros((4, 4, 4), np.int16)
    crop_around(volume, (1.5, 1.5, 1.5), (2, 2, 2)).hu[:] = 7
    assert not volume.any()


@given(shape=sizes, size=sizes, seed=st.integers(0, 10**6))
def test_a_random_crop_is_never_padded_where_the_volume_is_long_enough(shape, size, seed):
    crop = crop_around(np.zeros(shape, np.int16), random_centre(shape, size, np.random.default_rng(seed)), size)
    for n, length, start, part in zip(shape, size, crop.start, crop.inside, strict=True):
        filled = part.stop - part.start
        assert filled == min(n, length)
        assert n < length or 0 <= start <= n - length


def test_random_crops_are_uniform_over_every_place():
    rng = np.random.default_rng(0)
    volume = np.zeros((7, 4, 5), np.int16)
    drawn = [crop_around(volume, random_centre((7, 4, 5), (4, 4, 2), rng), (4, 4, 2)).start for _ in range(4000)]
    counts = np.unique(drawn, axis=0, return_counts=True)[1]
    assert len(counts) == 4 * 1 * 4
    assert np.abs(counts - 250).max() < 5 * 250**0.5


@given(data=st.data(), shape=sizes, size=sizes, seed=st.integers(0, 10**6))
def test_a_random_crop_holds_its_box_and_stays_inside_where_it_can(data, shape, size, seed):
    low = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    high = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(low, shape, strict=True))
    centre = centre_around(low, high, shape, size, np.random.default_rng(seed))
    crop = crop_around(np.zeros(shape, np.int16), centre, size)
    for a, b, n, length, start in zip(low, high, shape, size, crop.start, strict=True):
        if b - a <= length or n <= length:
            assert start <= a
            assert b <= start + length
        else:
            assert a <= start
            assert start + length <= b
        assert n < length or 0 <= start <= n - length
    assert all(-0.5 <= c <= n - 0.5 for c, n in zip(centre, shape, strict=True))


def test_without_chance_a_box_is_in_the_middle_of_its_crop():
    assert centre_around((2, 4, 0), (5, 6, 1), (9, 9, 9), (3, 3, 3)) == (3.0, 4.5, 0.0)
