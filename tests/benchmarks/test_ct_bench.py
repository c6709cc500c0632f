"""The CT benchmark reports every ratio of its docstring, and its peers read the voxels that we read."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mmjepa.ct.store import VolumeStore
from mmjepa.ct.window import windowed

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ct.py"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module
    sys.path.remove(str(SCRIPT.parent))


def test_it_prints_one_json_line_a_ratio():
    done = subprocess.run([sys.executable, SCRIPT, "--small"], capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    names = [row["name"].split(",")[0] for row in rows]
    assert names == ["read", "read", "ingest", "crop", "crop", *["batches"] * 6, "tokens"]
    assert all("skipped" in row or row["ratio"] > 0 for row in rows)
    assert sum(("at_least" in row) != ("at_most" in row) for row in rows) == sum("met" in row for row in rows) == 8


def test_a_ratio_is_met_on_the_right_side_of_its_bound(bench, capsys):
    for ratio, at_most, met in ((3, False, True), (1, False, False), (1, True, True), (3, True, False)):
        bench("ct_parts.common").say("x", ratio, 2, at_most=at_most)
        assert json.loads(capsys.readouterr().out)["met"] is met


def test_the_peak_of_memory_is_seen_between_two_batches(bench):
    common = bench("ct_parts.common")

    def work():
        block = np.ones(20 << 20)
        del block
        time.sleep(0.01)

    assert common.peak_anonymous_mb(work) - common.anonymous_mb() > 100


def test_peers_make_the_windows_that_we_make(bench, tmp_path):
    """With crops as large as the volume nothing is left to chance but the flip."""
    batching, common = bench("ct_parts.batching"), bench("ct_parts.common")
    paths = common.make_store(tmp_path, 2, (8, 8, 8))
    store = VolumeStore(tmp_path / "cohort")
    for windows in (("wide",), batching.WINDOWS):
        want = {windowed(np.asarray(store.hu(image)), windows).tobytes() for image in store.index["image_id"]}
        for track_meta in (True, False):
            cache = tmp_path / f"{len(windows)}{track_meta}"
            for loader in batching.loaders(paths, cache, 8, windows, track_meta=track_meta, look=torch.as_tensor):
                (batch,) = loader()
                rows = [np.asarray(row) for row in batch]
                flips = [{row.tobytes(), row[:, ::-1].tobytes()} for row in rows]
                assert all(flip & want for flip in flips)


def test_all_readers_read_the_same_voxels(bench, tmp_path):
    bench = bench("ct_parts.reading")
    bench.write_series(tmp_path / "source" / "a", 5, 16)
    (ours,), (bare,) = bench.our_hu(tmp_path / "source"), bench.bare_hu([tmp_path / "source" / "a"])
    (monai,) = bench.monai_hu([tmp_path / "source" / "a"])
    np.testing.assert_array_equal(np.sort(ours, axis=None), np.sort(bare, axis=None))
    np.testing.assert_array_equal(ours[::-1, ::-1], bare.transpose(2, 1, 0))
    np.testing.assert_array_equal(np.sort(np.asarray(monai), axis=None), np.sort(bare, axis=None))
