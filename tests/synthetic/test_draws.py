"""Keyed draws."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from synthetic.draws import by_row, generator, normals, uniforms


@given(st.integers(0, 2**63 - 1), st.integers(0, 500), st.integers(1, 20), st.integers(1, 9))
def test_a_subject_gets_the_same_draws_in_any_batch(seed, first, count, width):
    whole = uniforms(seed, "x", 0, first + count, width)
    assert (uniforms(seed, "x", first, count, width) == whole[first:]).all()
    assert whole.min() > 0
    assert whole.max() < 1


def test_streams_seeds_and_subjects_differ():
    base = uniforms(0, "x", 0, 2, 4)
    assert not (base == uniforms(1, "x", 0, 2, 4)).any()
    assert not (base == uniforms(0, "y", 0, 2, 4)).any()
    assert not (base[0] == base[1]).any()
    drawn = {generator(0, "x", subject).random() for subject in range(100)}
    assert len(drawn | set(uniforms(0, "x", 0, 100, 4).ravel())) == 500


def test_normals_are_standard_normal():
    assert kstest(normals(3, "x", 0, 5000, 3).ravel(), "norm").pvalue > 1e-3


@given(st.integers(1, 60), st.integers(1, 130), st.integers(1, 40))
def test_a_row_is_multiplied_alike_among_any_number_of_rows(count, d, q):
    draw = np.random.default_rng(count * 10_000 + d * 50 + q)
    matrix, rows = draw.standard_normal((q, d)), draw.standard_normal((count, d))
    whole = by_row(matrix, rows)
    np.testing.assert_allclose(whole, rows @ matrix.T, rtol=0, atol=1e-10)
    assert (by_row(matrix, rows[-1:]) == whole[-1:]).all()
    for ours in (matrix, np.asfortranarray(matrix)):
        assert (by_row(ours, np.asfortranarray(rows)) == by_row(ours, rows)).all()
