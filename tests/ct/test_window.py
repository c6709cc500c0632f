"""Windows turn HU into channels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmjepa.ct.window import WINDOWS_HU, windowed
from mmjepa.refusal import Refusal


def test_windows_are_channels_between_0_and_1():
    hu = np.array([[[-3000, -1000, -600, 0, 600, 3071]]], dtype=np.int16)
    out = windowed(hu, ("wide", "lung", "dsb"))
    assert out.dtype == np.float32
    assert out.shape == (3, 1, 1, 6)
    np.testing.assert_allclose(out[0, 0, 0], [0, 0, 0.2, 0.5, 0.8, 1], rtol=1e-6)
    np.testing.assert_allclose(out[1, 0, 0, 1:3], [350 / 1500, 0.5], rtol=1e-6)
    np.testing.assert_allclose(out[2, 0, 0, 3:5], [1200 / 1800, 1], rtol=1e-6)
    with pytest.raises(Refusal, match="WINDOW_UNKNOWN"):
        windowed(hu, ("bone",))
    with pytest.raises(Refusal, match="WINDOW_UNKNOWN"):
        windowed(hu, ())


@given(hu=st.integers(-32768, 32767), name=st.sampled_from(sorted(WINDOWS_HU)))
def test_every_int16_is_the_clipped_share_of_its_window(hu, name):
    low, high = WINDOWS_HU[name]
    got = windowed(np.full((1, 1, 1), hu, np.int16), (name,)).item()
    assert got == pytest.approx(min(max((hu - low) / (high - low), 0), 1), abs=1e-6)
    assert 0 <= got <= 1


def test_the_voxels_that_came_in_stay_and_a_given_output_is_filled():
    hu, out = np.array([[[-2000, 2000]]], dtype=np.int16), np.empty((1, 1, 1, 2), np.float32)
    assert windowed(hu, ("lung",), out=out) is out
    np.testing.assert_array_equal(hu, [[[-2000, 2000]]])
    np.testing.assert_array_equal(out, [[[[0, 1]]]])
