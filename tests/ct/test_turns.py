"""One writer at a time, whoever is killed; damaged outputs are written again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mmjepa.ct import turns
from mmjepa.refusal import Refusal

RUN = """
import sys, time
import mmjepa.ct.series as series
from mmjepa.ct.ingest import ingest_images
from mmjepa.identity import Crosswalk
if __name__ == "__main__":
    ingest_images(sys.argv[1], sys.argv[2], crosswalk=Crosswalk.none("a salt for tests"), workers=2)
"""


def volumes(tmp_path) -> Path:
    return tmp_path / "out" / "ct" / "volumes"


@pytest.mark.parametrize("text", ["{}", "null", "[]", "{", '{"source_hash": 1, "affine": null}'])
@pytest.mark.parametrize("name", ["sidecar", "manifest"])
def test_a_damaged_sidecar_or_manifest_is_written_again(series_of, save, ingest, tmp_path, text, name):
    save(tmp_path / "source", series_of())
    ingest()
    (sidecar,) = volumes(tmp_path).glob("*.json")
    path = sidecar if name == "sidecar" else tmp_path / "out/ct/manifest.json"
    before = json.loads(path.read_text())
    path.write_text(text)
    manifest = ingest()
    assert (manifest["accepted"], manifest["refused"]) == (1, {})
    after = json.loads(path.read_text())
    assert after == (before if name == "sidecar" else {**before, "unchanged": 1, "volumes": after["volumes"]})


@pytest.mark.parametrize("form", ["npy", "blosc2"])
def test_a_flipped_voxel_is_found_and_mended_where_the_source_is_read_again(series_of, save, ingest, tmp_path, form):
    save(tmp_path / "source", series_of())
    ingest(form=form)
    (path,) = (path for path in volumes(tmp_path).iterdir() if path.suffix != ".json")
    good = path.read_bytes()
    path.write_bytes(good[:-3] + bytes([good[-3] ^ 1]) + good[-2:])
    (tmp_path / "out/ct/scan.parquet").unlink()
    assert ingest(form=form)["unchanged"] == 0
    assert path.read_bytes() == good
    (tmp_path / "out/ct/scan.parquet").unlink()
    assert ingest(form=form)["unchanged"] == 1


def test_two_ingests_cannot_write_to_one_cohort(series_of, save, ingest, tmp_path):
    save(tmp_path / "source", series_of())
    with turns.alone(tmp_path / "out/ct"), pytest.raises(Refusal, match="INGEST_RUNNING"):
        ingest()
    assert ingest()["accepted"] == 1


def test_what_a_dead_process_left_half_written_is_removed_and_what_a_living_one_writes_is_not(
    series_of, save, ingest, tmp_path
):
    save(tmp_path / "source", series_of())
    volumes(tmp_path).mkdir(parents=True)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stale, living = (volumes(tmp_path) / f".x.npy.{pid}.partial" for pid in (gone.pid, os.getpid()))
    stale.write_bytes(b"x")
    living.write_bytes(b"x")
    ingest()
    assert not stale.exists()
    assert living.exists()


def test_a_worker_whose_parent_is_gone_writes_nothing(tmp_path):
    child = os.fork()
    if not child:
        try:
            with turns.writing(tmp_path, parent=1 << 30):
                (tmp_path / "written").touch()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert not (tmp_path / "written").exists()


def children(pid: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found |= {int(stat.parent.name)} | children(int(stat.parent.name))
    return found


@pytest.mark.dist
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at /proc")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_no_process_that_writes_and_no_temporary_file(series_of, save, ingest, tmp_path, how):
    for n in range(40):
        slices = series_of(4, Rows=256, Columns=256, PixelData=(np.arange(1 << 16, dtype="<u2") >> 5).tobytes())
        save(tmp_path / "source" / str(n), slices)
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, tmp_path / "source", tmp_path / "out"], stderr=subprocess.DEVNULL
    )
    while run.poll() is None and not list(volumes(tmp_path).glob("*.json")):
        time.sleep(0.01)
    below = children(run.pid)
    run.send_signal(how)
    run.wait(30)
    deadline = time.monotonic() + 20
    while any(map(turns._lives, below)) and time.monotonic() < deadline:
        time.sleep(0.05)
    done = {path.name for path in volumes(tmp_path).iterdir()}
    time.sleep(0.3)
    assert {path.name for path in volumes(tmp_path).iterdir()} == done
    if how == signal.SIGTERM:
        assert not any(name.endswith(".partial") for name in done)
        assert not any(map(turns._lives, below))
    manifest = ingest()
    assert manifest["accepted"] == 40
    assert not any(path.name.endswith(".partial") for path in volumes(tmp_path).iterdir())
