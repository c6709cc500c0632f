"""What the README shows runs."""

import re
import shlex
from pathlib import Path

import pytest

from mmjepa.cli import make_parser

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_quick_start_runs(icu_run, icu_cohort, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "icu").symlink_to(icu_run)
    (tmp_path / "cohort").symlink_to(icu_cohort)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], "README", "exec"), {})
    said = capsys.readouterr().out
    assert said.startswith("trajectory")
    assert "copy_forward" in said
    assert (tmp_path / "states.parquet").is_file()


@pytest.mark.parametrize("command", re.findall(r"\| `mmjepa (.*?)` \|", README))
def test_every_verb_of_the_table_is_spelt_as_the_command_line_wants_it(command):
    options = make_parser().parse_args(shlex.split(command))
    assert callable(options.call)


def test_every_config_that_is_named_exists():
    named = set(re.findall(r"recipes/configs/\w+\.yaml", README))
    assert len(named) >= 4
    assert all((Path(__file__).parents[1] / path).is_file() for path in named)
