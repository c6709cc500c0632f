"""Targets: a float32 average that moves as its formula says, and never disturbs the student."""

import pytest
import torch
from torch import nn

from mmjepa.batch import VolumeView
from mmjepa.encoders.vit3d import ViT3D, ViT3DConfig
from mmjepa.engine.optim import OptimConfig, make_optimizer
from mmjepa.jepa import LossConfig, Share
from mmjepa.teacher import Teacher, TeacherConfig

EMA = TeacherConfig(kind="ema", tau=0.996)


class Linear(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.layer = nn.Linear(4, 3, dtype=dtype)
        self.dropout = nn.Dropout(0.5)

    def forward(self, view):
        return self.dropout(self.layer(view))


def online_of(encoders):
    return dict(encoders.named_parameters())


def test_the_gap_to_a_fixed_bfloat16_model_shrinks_as_tau_to_the_n():
    torch.manual_seed(0)
    encoders = nn.ModuleDict({"ehr": Linear(torch.bfloat16)})
    teacher, online = Teacher(), online_of(encoders)
    teacher.begin(EMA, online)
    start = {name: shadow.clone() for name, shadow in teacher.shadows.items()}
    with torch.no_grad():
        for parameter in online.values():
            parameter.add_(torch.randn_like(parameter))
    for n in range(1, 301):
        teacher.update(online, 0.996)
        if n in (1, 100, 300):
            for name, shadow in teacher.shadows.items():
                assert shadow.dtype == torch.float32
                fixed = online[name].float()
                expected = fixed + 0.996**n * (start[name] - fixed)
                torch.testing.assert_close(shadow, expected, atol=2e-6, rtol=1e-4)
                assert (shadow != start[name]).all()


def test_the_average_follows_a_moving_model_by_its_closed_form():
    encoders = nn.ModuleDict({"ehr": Linear()})
    teacher, online = Teacher(), online_of(encoders)
    teacher.begin(EMA, online)
    expected = {name: shadow.double() for name, shadow in teacher.shadows.items()}
    for step in range(20):
        with torch.no_grad():
            for parameter in online.values():
                parameter.add_(0.1 * (step + 1))
        teacher.update(online, 0.9)
        expected = {name: 0.9 * e + 0.1 * online[name].double() for name, e in expected.items()}
    for name, shadow in teacher.shadows.items():
        torch.testing.assert_close(shadow.double(), expected[name].detach(), atol=1e-5, rtol=1e-5)


def test_sync_closes_the_gap_entirely():
    encoders = nn.ModuleDict({"ehr": Linear()})
    teacher, online = Teacher(), online_of(encoders)
    assert float(teacher.gap(online)) == 0
    teacher.begin(EMA, online)
    with torch.no_grad():
        encoders["ehr"].layer.weight[0, 0] += 0.25
    assert float(teacher.gap(online)) == pytest.approx(0.25)
    teacher.sync(online)
    assert float(teacher.gap(online)) == 0


def test_each_kind_uses_its_weights_without_dropout_or_gradient():
    torch.manual_seed(0)
    encoders, view = nn.ModuleDict({"ehr": Linear()}), torch.randn(5, 4)
    teacher, online = Teacher(), online_of(encoders)
    teacher.begin(EMA, online)
    old = encoders["ehr"].layer(view).detach()
    with torch.no_grad():
        encoders["ehr"].layer.weight.mul_(2)
    new = encoders["ehr"].layer(view).detach()
    for kind, expected in (("ema", old), ("frozen", old), ("online", new)):
        teacher.begin(TeacherConfig(kind=kind), online)
        encoders.train()
        got = teacher.encode(encoders, "ehr", view)
        torch.testing.assert_close(got, expected)
        assert not got.requires_grad
        assert encoders["ehr"].training
        assert encoders["ehr"].dropout.training


def test_a_teacher_call_between_forward_and_backward_leaves_every_student_gradient(toy):
    def gradients(call):
        model, batch = toy.toy_model(dropout=0.0), toy.ToySampler().batch([(0, 0), (0, 1), (0, 2)])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name or "predictor" in name)
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        model.teacher.begin(EMA, {n: p for n, p in model.online().items() if p.requires_grad})
        share = Share(batch.target_kinds(2), batch.rollouts(), batch.next_tokens())
        loss = model(batch, LossConfig(), share)["loss"]
        if call:
            model.teacher.encode(model.encoders, "ehr", batch.views[0])
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    torch.manual_seed(0)
    without = gradients(False)
    torch.manual_seed(0)
    with_call = gradients(True)
    assert sum("lora" in name for name in without) == 8
    for name, gradient in without.items():
        assert gradient is not None, name
        assert gradient.any(), name
        assert torch.equal(gradient, with_call[name]), name


def test_shadows_are_in_no_module_and_no_optimiser(toy):
    model = toy.toy_model()
    before = {id(p) for p in model.parameters()}
    model.teacher.begin(EMA, model.online())
    assert {id(p) for p in model.parameters()} == before
    optimizer = make_optimizer(model.parts(), OptimConfig())
    held = {p.data_ptr() for group in optimizer.param_groups for p in group["params"]}
    assert not held & {shadow.data_ptr() for shadow in model.teacher.shadows.values()}
    assert not any(shadow.requires_grad for shadow in model.teacher.shadows.values())


def test_only_the_parameters_of_the_phase_are_shadowed_and_old_shadows_stay():
    encoders = nn.ModuleDict({"ct": Linear(), "ehr": Linear()})
    teacher, online = Teacher(), online_of(encoders)
    teacher.begin(TeacherConfig(kind="online"), online)
    assert not teacher.shadows
    teacher.begin(EMA, {n: p for n, p in online.items() if n.startswith("ct")})
    kept = teacher.shadows["ct.layer.weight"].clone()
    with torch.no_grad():
        encoders["ct"].layer.weight.add_(1)
    teacher.begin(EMA, online)
    assert set(teacher.shadows) == set(online)
    assert torch.equal(teacher.shadows["ct.layer.weight"], kept)


def test_tau_moves_along_a_cosine_from_its_start_to_its_end():
    config = TeacherConfig(kind="ema", tau=0.9, tau_end=1.0)
    assert config.tau_at(0) == pytest.approx(0.9)
    assert config.tau_at(0.5) == pytest.approx(0.95)
    assert config.tau_at(1) == pytest.approx(1.0)
    assert EMA.tau_at(0.7) == 0.996
    with pytest.raises(ValueError, match=r"tau=1\.2"):
        TeacherConfig(tau=0.5, tau_end=1.2)


def test_the_shadowed_volume_encoder_is_the_old_encoder():
    torch.manual_seed(0)
    encoders = nn.ModuleDict({"ct": ViT3D(ViT3DConfig(patch=4, width=12, depth=1, heads=2, ffn=8, latent=4))})
    view = VolumeView("ct", torch.randn(2, 1, 8, 8, 8))
    teacher, online = Teacher(), online_of(encoders)
    teacher.begin(EMA, online)
    with torch.no_grad():
        old = encoders["ct"](view)
        for parameter in online.values():
            parameter.add_(0.1)
    assert torch.equal(teacher.encode(encoders, "ct", view), old)
