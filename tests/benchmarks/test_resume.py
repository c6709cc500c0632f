"""The resume benchmark plans its kills by key and sees a single changed byte. The kills themselves are `make bench`."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "resume.py"


@pytest.fixture(scope="module")
def resume() -> ModuleType:
    spec = importlib.util.spec_from_file_location("resume", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["resume"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config() -> dict:
    return yaml.safe_load(SCRIPT.with_suffix(".yaml").read_text())


def test_ten_kills_four_of_them_forced_all_past_the_first_checkpoint(resume, config):
    rows = [{"seconds": 0.01}] * 60
    kills = resume.planned(0, 10, config, rows)
    assert len(kills) == 10
    assert kills == resume.planned(0, 10, config, rows)
    assert kills != resume.planned(1, 10, config, rows)
    steps = [kill.step for kill in kills]
    assert steps == sorted(steps)
    assert steps[0] > config["engine"]["checkpoint"]
    forced = {kill.kind for kill in kills} - {"random"}
    assert forced == {
        "checkpoint half written",
        "checkpoint not renamed",
        "before the phase's checkpoint",
        "after the hard sync",
    }


def test_forced_moments_are_those_of_the_curriculum(resume, config):
    kills = {kill.kind: kill.step for kill in resume.planned(3, 10, config, [{"seconds": 0.01}])}
    phases, interval = config["curriculum"], config["engine"]["checkpoint"]
    assert kills["before the phase's checkpoint"] == phases[0]["steps"] + phases[1]["steps"]
    assert kills["after the hard sync"] == sum(phase["steps"] for phase in phases[:3])
    assert [phase["name"] for phase in phases if phase.get("sync")] == ["hard sync"]
    assert kills["checkpoint half written"] % interval == kills["checkpoint not renamed"] % interval == 0


def test_one_changed_byte_or_a_missing_file_is_seen(resume, tmp_path):
    for name in ("one", "other"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "tensors").write_bytes(bytes(1000))
    assert resume.same_files(tmp_path / "one", tmp_path / "other")
    (tmp_path / "other" / "deep" / "tensors").write_bytes(bytes(999) + b"\1")
    assert not resume.same_files(tmp_path / "one", tmp_path / "other")
    (tmp_path / "other" / "deep" / "tensors").unlink()
    assert not resume.same_files(tmp_path / "one", tmp_path / "other")


def test_only_timing_is_left_out_of_a_row_and_a_torn_row_is_no_row(resume, tmp_path):
    run = resume.Watched(tmp_path / "run", tmp_path / "kept")
    run.run.mkdir()
    rows = [{"step": 1, "loss": 0.5, "seconds": 0.1}, {"step": 2, "loss": 0.25, "seconds": 0.2}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run.run / "metrics.jsonl").write_text(text + '{"step": 3, "lo')
    assert resume.untimed(run.rows()) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    assert run.reached(2)
    assert not run.reached(3)


def test_every_writing_of_a_checkpoint_is_kept_and_a_torn_one_is_not(resume, tmp_path):
    run = resume.Watched(tmp_path / "run", tmp_path / "kept")
    for name in ("step_00000005", ".step_00000010.1.partial"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / name / "state.json").write_text("{}")
    run.collect()
    run.collect()
    assert [path.parent.name for path in run.written()] == ["step_00000005"]
    assert run.last_step() == 5
