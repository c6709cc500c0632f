"""Work in several processes."""

import os

import joblib
import pytest

from synthetic import workers


@pytest.mark.parametrize("count", [1, 2])
def test_nobody_runs_far_ahead_and_all_is_done_in_the_end(count, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "AHEAD", 4)
    results = workers.in_order(os.mkdir, [(str(tmp_path / str(i)),) for i in range(50)], count)
    for _ in range(3):
        next(results)
    assert len(list(tmp_path.iterdir())) <= 4 * count
    assert len(list(results)) == 47
    assert len(list(tmp_path.iterdir())) == 50


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_results_come_in_order_through_any_backend(backend):
    with joblib.parallel_config(backend=backend):
        assert list(workers.in_order(pow, [(i, 2) for i in range(90)], 2)) == [i**2 for i in range(90)]
