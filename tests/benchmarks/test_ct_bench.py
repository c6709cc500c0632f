"""The CT benchmark reports every ratio of its docstring, and its peers read the voxels that we read."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ct.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("ct_bench", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_prints_one_json_line_a_ratio():
    done = subprocess.run([sys.executable, SCRIPT, "--small"], capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["name"].split(",")[0] for row in rows] == ["read", "read", "ingest", "crop", *["batches"] * 3, "tokens"]
    assert all(row["ratio"] > 0 and ("at_least" in row) != ("at_most" in row) for row in rows)


def test_a_ratio_is_met_on_the_right_side_of_its_bound(bench, capsys):
    for ratio, at_most, met in ((3, False, True), (1, False, False), (1, True, True), (3, True, False)):
        bench.say("x", ratio, 2, at_most=at_most)
        assert json.loads(capsys.readouterr().out)["met"] is met


def test_all_readers_read_the_same_voxels(bench, tmp_path):
    bench.write_series(tmp_path / "source" / "a", 5, 16)
    (ours,), (bare,) = bench.our_hu(tmp_path / "source"), bench.bare_hu([tmp_path / "source" / "a"])
    (monai,) = bench.monai_hu([tmp_path / "source" / "a"])
    np.testing.assert_array_equal(np.sort(ours, axis=None), np.sort(bare, axis=None))
    np.testing.assert_array_equal(ours[::-1, ::-1], bare.transpose(2, 1, 0))
    np.testing.assert_array_equal(np.sort(np.asarray(monai), axis=None), np.sort(bare, axis=None))
