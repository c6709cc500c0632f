"""The EHR benchmark runs its parts by name, and says why a figure has no peer."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ehr.py"


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


def test_the_chosen_parts_print_json_lines_and_find_nothing_wrong(tmp_path):
    done = run("--small", "--only", "history,equality", "--scratch", tmp_path)
    assert done.returncode == 0, done.stderr
    history, equality = map(json.loads, done.stdout.splitlines())
    assert (history["part"], len(history["cpu_us_a_window"])) == ("history", 2)
    assert equality["wrong"] == 0
    assert equality["rows"] == equality["subjects"] * equality["flag_combinations"] == 30 * 432
    assert not list(tmp_path.iterdir())


def test_without_an_environment_for_the_peer_the_line_says_why(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("--small", "--only", "batches", "--scratch", tmp_path, "--peer-env", tmp_path / "file")
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, done.stdout.splitlines())
    assert (row["peer"], row["met"]) == ("none", False)
    assert "venv" in row["why"]
    assert row["cpu_us_a_subject"] > 0


def test_an_unknown_part_is_refused_with_those_known():
    done = run("--only", "nothing")
    assert done.returncode == 2
    assert "batches" in done.stderr
    assert "no part is called nothing" in done.stderr
