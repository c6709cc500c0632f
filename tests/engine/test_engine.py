"""What learns, learns; what stands still, stands still; and a loss that is no number stops the run."""

import json

import pytest
import torch

from mmjepa.curriculum import Phase
from mmjepa.engine import loop
from mmjepa.engine.checkpoint import State, load_latest, save
from mmjepa.engine.log import MetricsLog, read_metrics
from mmjepa.engine.loop import Engine, EngineConfig, digests
from mmjepa.engine.optim import OptimConfig, clip_gradients, make_optimizer, moments, restore_moments
from mmjepa.engine.start import World
from mmjepa.jepa import JEPA, LossConfig, RolloutLoss
from mmjepa.objectives.vicreg import VICRegConfig
from mmjepa.refusal import Refusal
from mmjepa.teacher import TeacherConfig

ALONE = World(0, 1, torch.device("cpu"))


def snapshot(engine):
    return {name: p.detach().clone() for name, p in engine.model.named_parameters()}


@pytest.fixture
def watched(monkeypatch):
    """Parameters and Adam's moments at the start and the end of every phase."""
    seen, enter, leave = [], Engine._enter, Engine._leave

    def state(engine):
        names = {id(p): n for n, p in engine.model.named_parameters()}
        return snapshot(engine), {k: v.clone() for k, v in moments(engine.optimizer, names).items()}

    def entering(self, phase, **named):
        enter(self, phase, **named)
        seen.append([phase, state(self)])

    def leaving(self, phase):
        leave(self, phase)
        seen[-1].append(state(self))

    monkeypatch.setattr(Engine, "_enter", entering)
    monkeypatch.setattr(Engine, "_leave", leaving)
    return seen


def test_a_phase_moves_every_tensor_of_its_parts_and_no_bit_of_the_others(toy, tmp_path, watched):
    engine = toy.train(tmp_path / "run")
    parts = engine.model.parts()
    assert len(watched) == 6
    for phase, (before, moved_before), (after, moved_after) in watched:
        trained = {name for part in phase.train for name in parts[part]}
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == trained, phase.name
        for key in moved_after.keys() | moved_before.keys():
            if key.split("|")[0] not in trained:  # momentum of a frozen part neither moves nor decays
                assert torch.equal(moved_before[key], moved_after[key]), (phase.name, key)
    report = json.loads((tmp_path / "run" / "phases.json").read_text())
    assert [entry["steps"] for entry in report] == [2, 3, 5, 3, 0, 3]
    for entry in report:
        assert set(entry["trained"]) | set(entry["frozen"]) == set(parts)
        assert all(part["bit_equal"] for part in entry["frozen"].values())
        assert all(part["changed"] for part in entry["trained"].values())
    assert report[3]["teacher_gap"] > 0
    assert report[4]["teacher_gap"] == 0


def test_one_step_changes_every_trainable_tensor(toy, tmp_path, watched):
    loss = LossConfig(rollout=RolloutLoss(), vicreg=VICRegConfig())
    parts = ("ehr.base", "ehr.adapter", "predictor")
    phase = Phase(name="all", steps=2, train=parts, teacher=TeacherConfig(kind="ema"), loss=loss)
    engine = toy.train(tmp_path / "run", phases=(phase,))
    _, (before, _), (after, _) = watched[0]
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == set()  # lora_A moves from the second step on: lora_B starts at zero
    assert set(engine.model.teacher.shadows) == set(engine.model.online())


def test_every_parameter_is_in_exactly_one_part_and_one_group(toy):
    model = toy.toy_model()
    parts = model.parts()
    listed = [name for part in parts.values() for name in part]
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters())
    assert set(parts) == {"ehr.base", "ehr.adapter", "predictor"}
    held = [id(p) for group in make_optimizer(parts, OptimConfig()).param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_each_part_has_its_rate_and_decay_acts_on_matrices_alone(toy):
    config = OptimConfig(lr={"ehr.adapter": 1e-5, "ehr": 2e-5, "default": 3e-4}, weight_decay=0.1)
    parts = toy.toy_model().parts()
    rate = {id(p): config.rate_of(part) for part, named in parts.items() for p in named.values()}
    assert sorted(set(rate.values())) == [1e-5, 2e-5, 3e-4]
    for group in make_optimizer(parts, config).param_groups:
        for p in group["params"]:
            assert group["peak"] == rate[id(p)]
            assert group["weight_decay"] == (0.1 if p.ndim >= 2 else 0.0)
    with pytest.raises(Refusal) as refused:
        OptimConfig(lr={"ct": 1e-4}).rate_of("predictor")
    assert refused.value.code == "CONFIG_VALUE"


def test_encoder_and_predictor_are_clipped_apart():
    a, b = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(4))
    a.grad, b.grad = torch.full((4,), 50.0), torch.full((4,), 0.01)
    norms = clip_gradients({"ehr.adapter": {"a": a}, "predictor": {"b": b}}, 1.0)
    assert float(norms["ehr"]) == pytest.approx(100.0)
    assert float(a.grad.norm()) == pytest.approx(1.0, rel=1e-4)
    assert float(b.grad.norm()) == pytest.approx(0.02)


def test_moments_come_back_bit_for_bit(toy):
    model = toy.toy_model()
    optimizer = make_optimizer(model.parts(), OptimConfig())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    names = {id(p): n for n, p in model.named_parameters()}
    flat = {k: v.clone() for k, v in moments(optimizer, names).items()}
    assert len(flat) == 3 * len(names)
    other = make_optimizer(model.parts(), OptimConfig())
    restore_moments(other, dict(model.named_parameters()), flat)
    again = moments(other, names)
    assert again.keys() == flat.keys()
    assert all(torch.equal(again[k], flat[k]) for k in flat)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_no_number_is_refused_before_it_is_saved(where, toy, tmp_path, monkeypatch):
    original, calls = JEPA.forward, [0]

    def forward(self, *arguments):
        terms = original(self, *arguments)
        calls[0] += 1
        if calls[0] == 10:  # the last step of a phase, after which a checkpoint is due
            hurt = torch.nan if where == "loss" else 0.0
            terms["loss"] = terms["loss"] + hurt
            if where == "gradient":
                terms["loss"].register_hook(lambda g: g * torch.inf)
        return terms

    monkeypatch.setattr(JEPA, "forward", forward)
    with pytest.raises(Refusal) as refused:
        toy.train(tmp_path / "run")
    assert refused.value.code == "LOSS_NOT_FINITE"
    assert "step 10 (joint)" in refused.value.message
    state = load_latest(tmp_path / "run" / "checkpoints")
    assert state.facts["step"] < 10
    assert all(value.isfinite().all() for value in state.group("model").values())


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(rollout=RolloutLoss(chained=True)),
        LossConfig(rollout=RolloutLoss(chained=False)),
        LossConfig(predict=0, next_token=1),
    ],
)
def test_micro_batches_are_one_batch_for_terms_that_add_up(loss, toy, tmp_path, monkeypatch):
    gradients, original = [], loop.clip_gradients

    def clip(parts, limit):
        held = (p.grad for part in parts.values() for p in part.values() if p.grad is not None)
        gradients.append(torch.cat([g.flatten().clone() for g in held]))
        return original(parts, limit)

    monkeypatch.setattr(loop, "clip_gradients", clip)
    phase = Phase(name="p", steps=1, train=("ehr.base", "ehr.adapter", "predictor"), loss=loss)
    for parts in (1, 2, 5):  # of 5 windows, hence unequal ones
        toy.train(tmp_path / str(parts), accumulate=parts, phases=(phase,), dropout=0.0, batch=5)
    whole, *split = gradients
    logged = [read_metrics(tmp_path / str(parts) / "metrics.jsonl")[0] for parts in (1, 2, 5)]
    for gradient, row in zip(split, logged[1:], strict=True):
        assert float((gradient - whole).norm() / whole.norm()) < 1e-5
        for name in {"loss", "predict", "rollout", "next_token"} & logged[0].keys():
            assert row[name] == pytest.approx(logged[0][name], rel=1e-5), name


def test_a_batch_too_small_for_its_micro_batches_is_refused(toy, tmp_path):
    with pytest.raises(Refusal) as refused:
        toy.train(tmp_path / "run", accumulate=4)  # the joint phase has 3 windows a step
    assert refused.value.code == "CONFIG_VALUE"
    assert "joint" in refused.value.message


def test_latents_under_frozen_encoders_are_kept_and_equal_fresh_ones(toy, tmp_path, monkeypatch):
    encoded, original = [0], Engine._step

    def step(self, index, phase, *arguments):
        if phase.name in ("warm-up", "final"):
            assert set(self.model.kept) == {"ehr"}
            view = self.sampler.view(torch.tensor([3, 17]).numpy())
            with torch.no_grad():
                torch.testing.assert_close(
                    self.model.kept["ehr"][view.ids], self.model.encoders["ehr"](view), atol=1e-5, rtol=1e-5
                )
            encoded[0] += 1
        elif phase.name in ("tuning", "joint"):
            assert not self.model.kept
        original(self, index, phase, *arguments)

    monkeypatch.setattr(Engine, "_step", step)
    toy.train(tmp_path / "run")
    assert encoded[0] == 6


def test_metrics_wait_without_a_sync_and_are_whole_lines(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", ALONE)
    log.add({"step": 1, "phase": "a"}, {"loss": torch.tensor(2.0)})
    log.add({"step": 2, "phase": "a"}, {"loss": torch.tensor(1.5), "extra": torch.tensor(3)})
    assert not (tmp_path / "metrics.jsonl").exists()
    assert log.flush() == 1.5
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "phase": "a", "loss": 2.0},
        {"step": 2, "phase": "a", "loss": 1.5, "extra": 3.0},
    ]
    log.rewind(1)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_a_checkpoint_gives_back_every_bit_and_type(tmp_path):
    tensors = {
        "model/a": torch.randn(3, 2).bfloat16(),
        "model/b": torch.randn(4, 3).T,
        "adam/a|step": torch.tensor(3.0),
        "random/0": torch.get_rng_state(),
    }
    save(tmp_path, State(tensors, {"step": 3, "ranks": 1}))
    state = load_latest(tmp_path)
    assert state.facts["step"] == 3
    assert set(state.group("model")) == {"a", "b"}
    for name, value in tensors.items():
        assert state.tensors[name].dtype == value.dtype
        assert torch.equal(state.tensors[name], value)
    assert load_latest(tmp_path / "none") is None


def test_digests_tell_a_single_flipped_bit():
    p = torch.nn.Parameter(torch.zeros(5))
    before = digests({"part": {"p": p}})
    with torch.no_grad():
        p[2] = -0.0
    assert digests({"part": {"p": p}}) != before


def test_impossible_engine_settings_are_errors():
    for settings in ({"precision": "fp16"}, {"accumulate": 0}, {"workers": -1}, {"checkpoint": 0}, {"log": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            EngineConfig(**settings)


def test_what_a_sampler_counts_is_in_the_log(toy, tmp_path, monkeypatch):
    original = toy.ToySampler.batch

    def batch(self, items):
        made = original(self, items)
        made.notes["skipped"] = len(items)
        return made

    monkeypatch.setattr(toy.ToySampler, "batch", batch)
    toy.train(tmp_path / "run", phases=toy.toy_phases()[1:2], accumulate=2)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [4.0] * 3  # both micro-batches of each step
