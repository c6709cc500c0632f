"""The malformed-input benchmark: its table covers what it must, a case is judged by the table and by an independent decode."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
CODE = re.compile(r"(CT|NII)_[A-Z0-9_]+|load")


@pytest.fixture(scope="module")
def bench():
    pytest.importorskip("SimpleITK")
    pytest.importorskip("highdicom")
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("ct_malformed")
    sys.path.remove(str(FOLDER))


def test_the_table_names_every_case_once_and_at_least_forty_with_the_twenty_first(bench):
    table = bench.expectations()
    assert len(table) >= 40
    assert set(list(table)[:20]) == set(bench.ct_cases.TABLE)
    assert set(table) == set(bench.ct_cases.CASES)
    assert all(row["expected"] and all(map(CODE.fullmatch, row["expected"].split())) for row in table.values())


@pytest.mark.parametrize(
    "name",
    ["clean", "one_truncated_file", "localizer_same_uid", "padding_wrapped_declared", "nifti_nan", "two_patients"],
)
def test_a_case_comes_out_as_the_table_says(bench, name):
    want = bench.expectations()[name]["expected"].split()
    assert sorted(bench.judged(name, None)) == sorted(want)


@pytest.mark.parametrize("spoil", ["voxel", "place"])
def test_an_accepted_volume_that_differs_from_the_independent_decode_is_seen(bench, tmp_path, monkeypatch, spoil):
    true = bench.stored

    def other(out):
        ((hu, affine),) = true(out)
        hu = hu.copy()
        if spoil == "voxel":
            hu[3, 2, 1] += 1
        return [(hu, affine if spoil == "voxel" else affine + 0.01 * np.eye(4))]

    assert bench.run_case("clean", tmp_path / "a", None) == ["load"]
    monkeypatch.setattr(bench, "stored", other)
    assert bench.run_case("clean", tmp_path / "b", None) == ["load", "(differs from the independent decode)"]


def test_a_crash_or_a_death_of_the_ingest_is_a_row_that_is_not_as_expected(bench, monkeypatch, capsys):
    def broken(*arguments, **options):
        raise ValueError("a message that may quote data")

    monkeypatch.setattr(bench, "ingest_images", broken)
    assert bench.main(["--only", "clean", "--data", "/none"]) == 1
    shown = capsys.readouterr().out
    assert "crash: ValueError" in shown
    assert "quote" not in shown
    assert shown.endswith('{"cases": 1, "as_expected": 0}\n')
    monkeypatch.setattr(bench, "ingest_images", lambda *arguments, **options: bench.os.kill(bench.os.getpid(), 9))
    assert bench.judged("clean", None) == ["(the process died)"]


def test_a_slice_at_another_place_than_its_header_says_is_seen_however_the_affine_was_made(bench):
    hu = np.random.default_rng(0).integers(-1000, 400, (4, 3, 5)).astype(np.int16)  # X, Y, Z
    affine = np.diag([-0.6, -0.8, 1.0, 1.0])
    planes = [
        bench.Plane(
            np.array([[1.0, 0, 0], [0, 1, 0]]), np.array([0, 0, float(k)]), (0.8, 0.6), hu[:, :, k].T.astype(float)
        )
        for k in range(5)
    ]
    assert bench.in_place((hu, affine), planes[::-1])
    assert not bench.in_place((hu, affine), planes[:-1])
    planes[3].position_mm[2] += 0.6
    assert not bench.in_place((hu, affine), planes)
    planes[3].position_mm[:] = 0, 0.45, 3
    assert not bench.in_place((hu, affine), planes)
