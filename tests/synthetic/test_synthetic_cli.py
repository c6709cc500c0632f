"""The command line of the synthetic world."""

import ast
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor
from pathlib import Path

import pytest

import synthetic
from synthetic.cli import main


def test_json_is_the_only_line_on_standard_output(tmp_path, capsys):
    assert main(["generate", "--patients", "2", "--out", str(tmp_path / "w"), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) | {"positives": 0, "ehr_rows": 0} == {
        **{"out": str(tmp_path / "w"), "preset": "li2025", "site": "internal", "seed": 0, "patients": 2, "images": 2},
        **{"positives": 0, "ehr_rows": 0, "image_format": "nifti", "size": 32, "scans": 1, "leaks": [], "first": 0},
    }


def test_the_oracle_prints_both_sites(capsys):
    assert main(["oracle", "--patients", "500", "--seeds", "1"]) == 0
    assert "env_bayes_both" in capsys.readouterr().out
    assert main(["oracle", "--patients", "500", "--seeds", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (
        result["sites"]["internal"]["env_bayes_both"]["mean"] > result["sites"]["external"]["source_bayes_both"]["mean"]
    )


def test_several_sites_and_knobs_reach_the_folder(tmp_path):
    line = [
        "generate",
        "--patients",
        "12",
        "--site",
        "internal",
        "--site",
        "east",
        "--knob",
        "east.rho=0",
        "--knob",
        "spec=1.2",
        "--scans",
        "2",
        "--size",
        "48",
    ]
    assert main([*line, "--out", str(tmp_path / "w")]) == 0
    truth = json.loads((tmp_path / "w" / "truth" / "world.json").read_text())
    assert [(s["name"], s["rho"], s["spec"]) for s in truth["sites"]] == [("internal", 0.8, 1.2), ("east", 0, 1.2)]
    assert len(list((tmp_path / "w" / "images").glob("*.nii"))) == 24


def test_icu_stays_and_a_sheet_are_made_from_the_command_line(tmp_path, capsys):
    assert main(["generate", "--icu", "--patients", "20", "--knob", "gam=1", "--out", str(tmp_path / "i")]) == 2
    line = [
        "generate",
        "--icu",
        "--patients",
        "20",
        "--knob",
        "policy_strength=0",
        "--out",
        str(tmp_path / "i"),
        "--json",
    ]
    assert main(line) == 0
    assert json.loads(capsys.readouterr().out)["patients"] == 20
    assert json.loads((tmp_path / "i" / "truth" / "world.json").read_text())["policy_strength"] == 0
    assert main(["look", "--out", str(tmp_path / "sheet.png"), "--site", "external"]) == 0
    assert (tmp_path / "sheet.png").stat().st_size > 100_000


@pytest.mark.parametrize(
    "line",
    [
        ["generate"],
        ["generate", "--out", "x", "--patients", "many"],
        ["generate", "--out", "x", "--site", "mars"],
        ["generate", "--out", "x", "--patients", "0"],
        ["oracle", "--seeds", "0"],
        ["generate", "--out", "x", "--knob", "sepc=2"],
        ["generate", "--out", "x", "--knob", "east.spec=2"],
        ["generate", "--out", "x", "--leak", "all"],
        ["generate", "--out", "x", "--size", "33"],
        ["generate", "--out", "x", "--scans", "4"],
        ["generate", "--out", "x", "--icu", "--knob", "spec=2"],
        ["generate", "--out", "x", "--icu", "--leak", "order_tells"],
        ["generate", "--out", "x", "--icu", "--format", "dicom"],
        ["generate", "--out", "x", "--first", "-1"],
        ["generate", "--out", "x", "--first", "999999", "--patients", "2"],
        ["oracle", "--particles", "8"],
        ["oracle", "--icu", "--seeds", "3"],
        ["shift", "--level", "2", "--seeds", "3"],
        ["generate", "--out", "x", "--icu", "--site", "internal", "--site", "external"],
        ["oracle", "--preset", "none"],
        ["oracle", "--icu", "--patients", "3"],
        ["shift", "--patients", "0"],
        ["shift", "--level", "1"],
        ["look", "--out", "x.doc"],
        ["bake"],
        ["generate", "--out", "/dev/null/x", "--patients", "1"],
        ["generate", "--out", "", "--patients", "1"],
        ["generate", "--out", ".", "--patients", "1"],
        ["generate", "--out", "\udcff", "--patients", "1"],
        ["look", "--out", ""],
        ["generate", "--out", "x", "--site", "", "--knob", ".rho=0"],
        ["generate", "--out", "x", "--site", "東", "--knob", "東.rho=0"],
        ["oracle", "--workers", "0"],
        ["oracle", "--workers", "100000"],
        ["oracle", "--patients", "10000000000"],
        ["oracle", "--icu", "--particles", "100000000"],
        ["shift", "--workers", "-1"],
        ["generate", "--icu", "--out", "x", "--seed", str(2**64)],
        ["generate", "--icu", "--out", "x", "--knob", "hours=1e18"],
        ["generate", "--icu", "--out", "x", "--knob", "noise=.1"],
    ],
)
def test_bad_arguments_end_with_code_2_and_one_line(line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(line)
    except SystemExit as end:
        code = end.code
    assert code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_results_that_find_no_room_end_with_one_line(form, monkeypatch, capsys):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sys.stdout", Full())
    assert main(["oracle", "--patients", "100", "--seeds", "1", *form]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "refused: FILE_ACCESS: oracle: No space left on device"


def test_a_link_is_no_new_folder_and_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink("nowhere", "link")
    with pytest.raises(SystemExit):
        main(["generate", "--patients", "1", "--out", "link"])
    assert "names no new" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize(("workers", "stop"), [("1", signal.SIGINT), ("2", signal.SIGINT), ("2", signal.SIGTERM)])
def test_an_interrupt_leaves_nothing_behind(workers, stop, tmp_path):
    line = [
        sys.executable,
        "-m",
        "synthetic",
        "generate",
        "--patients",
        "100000",
        "--workers",
        workers,
        "--out",
        str(tmp_path / "w"),
    ]
    process = subprocess.Popen(
        line, stderr=subprocess.PIPE, start_new_session=True, cwd=Path(synthetic.__file__).parents[1]
    )
    while not list(tmp_path.glob(".w.*/images/*.nii")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, stop)  # as a terminal does: to the workers too
    said = process.communicate(timeout=30)[1].decode()
    assert said.rstrip().endswith("interrupted; nothing was left behind")
    assert "Traceback" not in said
    assert process.returncode == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [BrokenExecutor("a worker is gone"), MemoryError()])
def test_a_process_that_is_killed_for_memory_ends_the_command_with_one_line(error, monkeypatch, capsys):
    def run(*_):
        raise error

    monkeypatch.setattr("synthetic.oracle.run", run)
    assert main(["oracle"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("refused: OUT_OF_MEMORY")
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_the_world_imports_no_model_room():
    allowed = {"mmjepa.refusal", "mmjepa.files", "mmjepa.progress"}
    for path in Path(synthetic.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert all(name in allowed for name in names if name.startswith("mmjepa")), path.name
