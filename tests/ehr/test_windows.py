"""Windows are 72 hours at every twelfth hour and never leave the stay."""

from hypothesis import given
from hypothesis import strategies as st

from mmjepa.ehr.windows import windows


@given(st.integers(0, 400), st.integers(1, 100), st.integers(1, 50))
def test_windows_are_all_that_fit_and_no_other(hours, length, stride):
    found = windows(hours, length, stride)
    if hours < length:
        assert found == ([(0, hours)] if hours else [])
    else:
        assert found == [
            (start, start + length) for start in range(hours) if start % stride == 0 and start + length <= hours
        ]
        assert found


def test_the_published_lengths():
    assert windows(71) == [(0, 71)]
    assert windows(83) == [(0, 72)]
    assert windows(96) == [(0, 72), (12, 84), (24, 96)]
    assert len(windows(336)) == 23
