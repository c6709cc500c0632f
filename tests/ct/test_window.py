"""Windows turn HU into channels."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmjepa.ct import window
from mmjepa.ct.window import WINDOWS_HU, ranges_hu, windowed
from mmjepa.refusal import Refusal


def test_windows_are_channels_between_0_and_1():
    hu = np.array([[[-3000, -1000, -600, 0, 600, 3071]]], dtype=np.int16)
    out = windowed(hu, ("wide", "lung", "dsb"))
    assert out.dtype == np.float32
    assert out.shape == (3, 1, 1, 6)
    np.testing.assert_allclose(out[0, 0, 0], [0, 0, 0.2, 0.5, 0.8, 1], rtol=1e-6)
    np.testing.assert_allclose(out[1, 0, 0, 1:3], [350 / 1500, 0.5], rtol=1e-6)
    np.testing.assert_allclose(out[2, 0, 0, 3:5], [1200 / 1800, 1], rtol=1e-6)


def test_one_name_or_one_pair_needs_no_list_and_pairs_stand_beside_names():
    assert ranges_hu("lung") == ranges_hu(["lung"]) == ranges_hu((-1350, 150)) == ((-1350, 150),)
    assert ranges_hu(("soft", (-500.0, 1300.0), "dsb")) == (WINDOWS_HU["soft"], WINDOWS_HU["bone"], WINDOWS_HU["dsb"])
    hu = np.array([[[-500, 400, 1300]]], dtype=np.int16)
    np.testing.assert_array_equal(windowed(hu, (-500, 1300)), [[[[0, 0.5, 1]]]])
    np.testing.assert_array_equal(windowed(hu, "bone"), windowed(hu, [(-500, 1300)]))


@pytest.mark.parametrize(
    ("windows", "code"),
    [
        ((), "WINDOW_UNKNOWN"), ("bony", "WINDOW_UNKNOWN"), (("lung", "l"), "WINDOW_UNKNOWN"),
        ((1, 1), "WINDOW_RANGE"), ((300, -100), "WINDOW_RANGE"), ([(0.5, 3)], "WINDOW_RANGE"), ([(0, 1, 2)], "WINDOW_RANGE"),
        ([(-40000, 0)], "WINDOW_RANGE"), ([(-20000, 20000)], "WINDOW_RANGE"), ([("a", "b")], "WINDOW_RANGE"),
        ([None], "WINDOW_RANGE"), ([(float("nan"), 1)], "WINDOW_RANGE"), ([(0, float("inf"))], "WINDOW_RANGE"), ([7], "WINDOW_RANGE"),
    ],
)  # fmt: skip
def test_what_is_no_window_is_refused(windows, code):
    with pytest.raises(Refusal, match=code):
        windowed(np.zeros((1, 1, 1), dtype=np.int16), windows)


@given(
    hu=st.integers(-32768, 32767),
    window=st.sampled_from(sorted(WINDOWS_HU)) | st.tuples(st.integers(-16000, -1), st.integers(0, 16000)),
)
def test_every_int16_is_the_clipped_share_of_its_window(hu, window):
    low, high = WINDOWS_HU.get(window, window)
    got = windowed(np.full((1, 1, 1), hu, np.int16), [window]).item()
    assert got == pytest.approx(min(max((hu - low) / (high - low), 0), 1), abs=1e-6)
    assert 0 <= got <= 1


def test_the_voxels_that_came_in_stay_and_a_given_output_is_filled():
    hu, out = np.array([[[-2000, 2000]]], dtype=np.int16), np.empty((1, 1, 1, 2), np.float32)
    assert windowed(hu, ("lung",), out=out) is out
    np.testing.assert_array_equal(hu, [[[-2000, 2000]]])
    np.testing.assert_array_equal(out, [[[[0, 1]]]])


def test_the_table_of_names_is_the_one_in_use():
    rows = re.findall(r"^``(\w+)`` +(-?\d+) \.\. (-?\d+)", window.__doc__, flags=re.MULTILINE)
    assert {name: (int(low), int(high)) for name, low, high in rows} == WINDOWS_HU
