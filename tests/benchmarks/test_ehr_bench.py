"""The EHR benchmark runs its parts by name, and says why a figure has no peer."""

import importlib
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    bench = importlib.import_module("ehr")

    def lines(*arguments):
        assert bench.main(["--small", *map(str, arguments)]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return lines


def test_the_chosen_parts_print_json_lines_and_find_nothing_wrong(run, tmp_path):
    history, equality = run("--only", "history,equality", "--scratch", tmp_path)
    assert (history["part"], len(history["cpu_us_a_window"])) == ("history", 2)
    assert equality["wrong"] == 0
    assert equality["rows"] == equality["subjects"] * equality["flag_combinations"] == 10 * 432
    assert not list(tmp_path.iterdir())


def test_without_an_environment_for_the_peer_the_line_says_why(run, tmp_path):
    (tmp_path / "file").write_text("")
    (row,) = run("--only", "batches", "--scratch", tmp_path, "--peer-env", tmp_path / "file")
    assert (row["peer"], row["met"]) == ("none", False)
    assert "venv" in row["why"]
    assert row["cpu_us_a_subject"] > 0


def test_an_unknown_part_is_refused_with_those_known(run, capsys):
    with pytest.raises(SystemExit) as ended:
        run("--only", "nothing")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "no part is called nothing" in said
    assert "batches" in said
