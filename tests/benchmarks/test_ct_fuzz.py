"""The fuzzer: keyed damage, and every kind of failure is seen. The thousands of cases are for the benchmark itself."""

import importlib
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def fuzz():
    pytest.importorskip("SimpleITK")
    pytest.importorskip("highdicom")
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("ct_fuzz")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def series(fuzz):
    return fuzz.bases(None)


def test_the_damage_is_fixed_by_its_key_and_changes_an_image(fuzz, series):
    for n in range(60):
        files = series[n % len(series)][1]
        kind, changed = fuzz.damaged(files, np.random.default_rng(n))
        assert (kind, changed) == fuzz.damaged(files, np.random.default_rng(n))
        assert changed.keys() == files.keys()
        assert changed != files or kind == "blank"  # zeros over zeros
        assert changed.get("images.csv") == files.get("images.csv")


def test_undamaged_series_are_accepted_and_equal_their_decode(fuzz, series, tmp_path):
    for name, files in series:
        source, out = tmp_path / name / "source", tmp_path / name / "out"
        source.mkdir(parents=True)
        for file, content in files.items():
            (source / file).write_bytes(content)
        fuzz.ingest_images(source, out, crosswalk=fuzz.Crosswalk.none(fuzz.SALT))
        every, theirs = fuzz.stored(out), fuzz.decoded(source)
        assert len(every) == {"two_slices_missing": 0, "interleaved_reconstructions": 2}.get(name, 1), name
        for ours in every:
            matched = [
                (not planes or fuzz.in_place(ours, planes)) for other, planes in theirs if fuzz.same(ours, other)
            ]
            assert any(matched), name


def test_a_few_cases_end_without_a_finding(fuzz, capsys):
    assert fuzz.main(["--cases", "30", "--jobs", "1", "--data", "/none"]) == 0
    compared, counts = capsys.readouterr().out.splitlines()
    assert counts == '{"cases": 30, "crashes": 0, "silent": 0}'
    assert int(compared.split()[3]) > 3


def die(*arguments, **options):
    os.kill(os.getpid(), 9)


def fail(*arguments, **options):
    raise RuntimeError("not a refusal")


def hang(*arguments, **options):
    time.sleep(60)


@pytest.mark.parametrize("way", [die, fail, hang])
def test_a_death_an_exception_and_a_hang_are_crashes(fuzz, monkeypatch, way):
    monkeypatch.setattr(fuzz, "ingest_images", way)
    monkeypatch.setattr(fuzz, "LIMIT_S", 1)
    assert fuzz.fuzz(2, 0, 2, None) == {"crash": 2, "silent": 0, "compared": 0}


def test_a_file_written_outside_the_out_folder_is_a_crash(fuzz, monkeypatch, capsys):
    honest = fuzz.ingest_images

    def stray(source, out, **options):
        (Path(out).parent / "elsewhere").write_text("x")
        return honest(source, out, **options)

    monkeypatch.setattr(fuzz, "ingest_images", stray)
    assert fuzz.fuzz(2, 0, 1, None) == {"crash": 2, "silent": 0, "compared": 0}
    assert "outside" in capsys.readouterr().out


def test_one_changed_voxel_in_an_accepted_volume_is_silent(fuzz, monkeypatch):
    true = fuzz.stored
    monkeypatch.setattr(fuzz, "stored", lambda out: [(hu + 1, affine) for hu, affine in true(out)])
    assert fuzz.fuzz(12, 0, 1, None)["silent"] > 0
