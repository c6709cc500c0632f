"""A run that was killed, wherever, goes on to the same bits and the same metrics as one that never stopped."""

import errno
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

import mmjepa.engine.checkpoint as checkpoint_module
from mmjepa.engine.log import MetricsLog, read_metrics
from mmjepa.engine.loop import Engine
from mmjepa.engine.start import World
from mmjepa.refusal import Refusal
from mmjepa.run import Run

STEPS = 16  # of the toy's curriculum; phases end after 2, 5, 10, 13, 13 and 16


class Killed(BaseException):
    """Like a SIGKILL: nothing may catch it."""


def final(folder):
    newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
    facts = json.loads((newest / "state.json").read_text())
    return load_file(newest / "state.safetensors"), facts


def rows(folder):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(folder / "metrics.jsonl")]


def phases(folder):
    return json.loads((folder / "phases.json").read_text())


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    toy.train(out)
    return out


def assert_same(folder, whole):
    got, facts = final(folder)
    expected, expected_facts = final(whole)
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []
    assert facts == expected_facts
    assert rows(folder) == rows(whole)
    assert phases(folder) == phases(whole)


def killed_at(monkeypatch, toy, out, stop, **settings):
    """Train until ``stop`` steps are done, then die at the start of the next."""
    done, original = [0], Engine._step

    def step(self, *arguments):
        if done[0] == stop:
            raise Killed
        done[0] += 1
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_step", step)
        with pytest.raises(Killed):
            toy.train(out, **settings)


@pytest.mark.parametrize("stop", range(STEPS))
def test_killed_before_any_step_and_resumed_gives_the_same_bits(stop, toy, whole, tmp_path, monkeypatch):
    killed_at(monkeypatch, toy, tmp_path / "run", stop)
    toy.train(tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", whole)


def test_killed_twice_while_metrics_run_ahead_of_checkpoints(toy, whole, tmp_path, monkeypatch):
    """Steps that were logged but not saved are done, and logged, again: once each in the end."""
    often = {"checkpoint": 1000, "log": 1}
    killed_at(monkeypatch, toy, tmp_path / "run", 1, **often)
    assert len(rows(tmp_path / "run")) == 1
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    killed_at(monkeypatch, toy, tmp_path / "run", 9, resume=True, **often)
    toy.train(tmp_path / "run", resume=True, **often)
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("broken", ["save_file", "write_json", "_flush", "os.replace"])
def test_killed_inside_a_checkpoint(broken, toy, whole, tmp_path, monkeypatch):
    calls = [0]

    def dying(original):
        def call(*arguments, **named):
            calls[0] += 1
            if calls[0] == 4:
                raise Killed
            return original(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        if broken == "os.replace":
            replace = os.replace
            dies = dying(replace)
            patch.setattr(os, "replace", lambda a, b: (dies if "step_" in str(b) else replace)(a, b))
        else:
            patch.setattr(checkpoint_module, broken, dying(getattr(checkpoint_module, broken)))
        with pytest.raises(Killed):
            toy.train(tmp_path / "run")
    toy.train(tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", whole)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_workers_decide_no_bit_and_each_of_them_serves(toy, whole, tmp_path, monkeypatch):
    pids, original = set(), Engine._step

    def step(self, index, phase, number, batches):
        pids.update(batch.worker for batch in batches)
        original(self, index, phase, number, batches)

    monkeypatch.setattr(Engine, "_step", step)
    toy.train(tmp_path / "run", workers=2)
    assert_same(tmp_path / "run", whole)
    assert len(pids - {os.getpid()}) >= 2
    assert os.getpid() not in pids


@pytest.mark.parametrize("stop", [1, 5, 16])
def test_ctrl_c_leaves_a_checkpoint_after_the_step_in_flight(stop, toy, whole, tmp_path, monkeypatch):
    done, original = [0], Engine._forward

    def forward(self, *arguments):
        done[0] += 1
        if done[0] == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_forward", forward)
        with pytest.raises(KeyboardInterrupt, match=f"after step {stop}"):
            toy.train(tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is handler
    assert final(tmp_path / "run")[1]["step"] == stop
    toy.train(tmp_path / "run", resume=True)
    assert rows(tmp_path / "run") == rows(whole)
    got, expected = final(tmp_path / "run")[0], final(whole)[0]
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert phases(tmp_path / "run") == phases(whole)


def test_a_finished_run_resumes_to_itself(toy, whole, tmp_path, monkeypatch):
    toy.train(tmp_path / "run")
    engine = toy.train(tmp_path / "run", resume=True)
    assert engine.done == STEPS
    assert_same(tmp_path / "run", whole)


def test_a_torn_metrics_line_is_written_again(toy, whole, tmp_path, monkeypatch):
    killed_at(monkeypatch, toy, tmp_path / "run", 7)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 7, "phase": "jo')
    toy.train(tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", whole)


def test_two_checkpoints_are_kept(whole):
    assert [p.name for p in sorted((whole / "checkpoints").iterdir())] == ["step_00000014", "step_00000016"]


def test_a_full_disk_is_refused_and_the_checkpoint_before_it_still_loads(toy, whole, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    calls, original = [0], checkpoint_module.save_file

    def full(*arguments, **named):
        calls[0] += 1
        if calls[0] == 4:
            reason = "Error while serializing: I/O error: No space left on device (os error 28)"
            raise SafetensorError(reason)  # what safetensors makes of ENOSPC
        if calls[0] == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_file", full)
        for resume in (False, True):
            with pytest.raises(Refusal) as refused:
                toy.train(tmp_path / "run", resume=resume)
            assert refused.value.code == "DISK_FULL"
            assert Run.open(tmp_path / "run").latest(1) is not None
    toy.train(tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_goes_on(damage, toy, whole, tmp_path, monkeypatch):
    import shutil

    killed_at(monkeypatch, toy, tmp_path / "run", 9)
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    tensors = newest / "state.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-5] ^= 1
    if damage == "missing":
        tensors.unlink()
    else:
        tensors.write_bytes(data if damage == "flip" else data[:-100])
    with pytest.raises(Refusal) as refused:
        toy.train(tmp_path / "run", resume=True)
    assert refused.value.code == "CHECKPOINT_BROKEN"
    assert str(newest) in refused.value.hint
    shutil.rmtree(newest)
    toy.train(tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", whole)


def test_another_config_other_data_other_ranks_or_no_run_are_refused(toy, whole, tmp_path, monkeypatch):
    def code(call):
        with pytest.raises(Refusal) as refused:
            call()
        return refused.value.code

    assert code(lambda: toy.train(whole, resume=True, scale=2)) == "CHECKPOINT_CONFIG"
    assert code(lambda: toy.train(whole)) == "OUTPUT_EXISTS"
    assert code(lambda: toy.train(tmp_path / "none", resume=True)) == "RUN_MISSING"
    run = Run.open(whole)
    assert code(lambda: run.latest(2)) == "CHECKPOINT_RANKS"
    run.fingerprints = {"data_fingerprint": "other"}
    assert code(lambda: run.latest(1)) == "CHECKPOINT_DATA"


@pytest.mark.dist
def test_two_ranks_killed_and_resumed_give_the_same_bits(run_toy, tmp_path):
    run_toy(2, "train", tmp_path / "whole")
    run_toy(2, "train", tmp_path / "part", check=False, TOY_DIE_AFTER="7")
    assert final(tmp_path / "part")[1]["step"] == 6
    run_toy(2, "train", tmp_path / "part", "resume")
    assert_same(tmp_path / "part", tmp_path / "whole")


def test_a_resumed_teacher_lies_in_memory_of_its_own(toy, tmp_path, monkeypatch):
    """Tensors inside a read file lie at other alignments, where a matrix product may round otherwise than in a fresh one."""
    killed_at(monkeypatch, toy, tmp_path / "run", 8)  # inside the phase with an average
    places, original = [], Engine._enter

    def enter(self, phase, *, fresh):
        places.extend(shadow.data_ptr() % 64 for shadow in self.model.teacher.shadows.values())
        places.extend(
            int(shadow.untyped_storage().nbytes() != shadow.nbytes) for shadow in self.model.teacher.shadows.values()
        )
        original(self, phase, fresh=fresh)

    monkeypatch.setattr(Engine, "_enter", enter)
    toy.train(tmp_path / "run", resume=True)
    assert places
    assert set(places) == {0}


def test_a_part_that_no_phase_trains_is_in_no_checkpoint(toy, tmp_path):
    toy.train(tmp_path / "run", phases=toy.toy_phases()[1:2])
    tensors, _ = final(tmp_path / "run")
    assert {name.split("/")[0] for name in tensors} == {"model", "adam", "random"}
    assert all(name.startswith("model/predictor.") for name in tensors if name.startswith("model/"))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff"])
def test_a_checkpoint_without_its_facts_is_refused_with_what_to_do(monkeypatch, toy, tmp_path, content):
    killed_at(monkeypatch, toy, tmp_path / "run", 9)
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    (newest / "state.json").write_bytes(content)
    with pytest.raises(Refusal) as refused:
        toy.train(tmp_path / "run", resume=True)
    assert refused.value.code == "CHECKPOINT_BROKEN"


def test_rows_that_are_none_are_dropped_from_the_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'\xff\xfe\n[]\n5\n{}\n{"step": 1}\n{"step": 2}\n{"ste')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    MetricsLog(path, World(0, 1, torch.device("cpu"))).rewind(1)
    assert path.read_text() == '{"step": 1}\n'
