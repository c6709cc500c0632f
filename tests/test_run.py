"""A run folder is entered once, and again only as what it was."""

import pytest
import yaml

from mmjepa.refusal import Refusal
from mmjepa.run import FREE_KEYS, Run

CONFIG = {"out": "a", "seed": 0, "optim": {"lr": {"default": 1e-4}}, "engine": {"workers": 0, "precision": "fp32"}}


def code(call):
    with pytest.raises(Refusal) as refused:
        call()
    return refused.value.code


def test_a_run_is_created_once(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG)
    assert run.saved_config() == CONFIG
    assert run.checkpoints.is_dir()
    assert run.saved_facts()["mmjepa"]
    assert code(lambda: Run.create(tmp_path / "run", CONFIG)) == "OUTPUT_EXISTS"
    (tmp_path / "empty").mkdir()
    Run.create(tmp_path / "empty", CONFIG)


def test_keys_that_decide_no_bit_may_change_and_no_others(tmp_path):
    Run.create(tmp_path / "run", CONFIG)
    free = {**CONFIG, "out": "b", "engine": {"workers": 4, "precision": "fp32", "log": 3}, "resume": True}
    assert Run.resume(tmp_path / "run", free).saved_config() == CONFIG
    for key, changed in (
        ("seed", {**CONFIG, "seed": 1}),
        ("optim.lr.default", {**CONFIG, "optim": {"lr": {"default": 2e-4}}}),
        ("engine.precision", {**CONFIG, "engine": {"workers": 0, "precision": "bf16"}}),
        ("new", {**CONFIG, "new": 1}),
    ):
        with pytest.raises(Refusal) as refused:
            Run.resume(tmp_path / "run", changed)
        assert refused.value.code == "CHECKPOINT_CONFIG"
        assert key in refused.value.message


def test_every_free_key_is_a_key(icu_run):
    config = yaml.safe_load((icu_run / "config.yaml").read_text())
    for key in FREE_KEYS:
        value = config
        for part in key.split("."):
            assert part in value, key
            value = value[part]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    assert code(lambda: Run.open(tmp_path)) == "RUN_MISSING"
    assert code(lambda: Run.resume(tmp_path / "none", CONFIG)) == "RUN_MISSING"
    assert Run.create(tmp_path / "run", CONFIG).latest(1) is None


def test_a_run_killed_right_after_its_config_was_written_can_be_resumed(tmp_path):
    Run.create(tmp_path / "run", {"a": 1})
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "checkpoints").rmdir()
    run = Run.resume(tmp_path / "run", {"a": 1})
    assert run.latest(1) is None
    assert "mmjepa" in run.saved_facts()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"- 1\n", b"a: [\n"])
def test_a_damaged_saved_config_is_refused(tmp_path, content):
    run = Run.create(tmp_path / "run", CONFIG)
    run.config.write_bytes(content)
    assert code(lambda: Run.resume(tmp_path / "run", CONFIG)) == "CONFIG_BROKEN"
    assert code(run.saved_config) == "CONFIG_BROKEN"
