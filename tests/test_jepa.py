"""The composition: what is compared with what, how terms are weighted, and what happens when there is little to compare."""

import dataclasses

import pytest
import torch

from mmjepa.batch import Batch, Layout, SequenceView, VolumeView, to_device
from mmjepa.config import build, to_plain
from mmjepa.encoders.qwen3 import Qwen3Config, make_base
from mmjepa.encoders.slices25d import Slices25DConfig
from mmjepa.encoders.vit3d import ViT3DConfig
from mmjepa.jepa import JEPA, LossConfig, ModelConfig, RolloutLoss, Share, part_of
from mmjepa.objectives.sigreg import SIGRegConfig
from mmjepa.objectives.vicreg import VICRegConfig
from mmjepa.predictor import PredictorConfig, gather_slots
from mmjepa.refusal import Refusal
from mmjepa.teacher import TeacherConfig

TINY = {
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
}


def share_of(batch, kinds, **more):
    return Share(batch.target_kinds(kinds), batch.rollouts(), batch.next_tokens(), **more)


def ct_ehr_model(**settings):
    torch.manual_seed(0)
    ct = settings.pop("ct", ViT3DConfig(patch=4, width=12, depth=1, heads=2, ffn=16, latent=8))
    config = ModelConfig(
        ct=ct,
        ehr=Qwen3Config(latent=8, pack=16, values=True),
        predictor=PredictorConfig(
            kinds=("ct", "ehr"),
            latent=8,
            width=12,
            depth=1,
            heads=2,
            ffn=16,
            position="continuous",
            queries=True,
            dropout=0.0,
            attention_dropout=0.0,
        ),
        **settings,
    )
    model = JEPA(config, make_base(TINY, 20))
    torch.nn.init.normal_(model.predictor.output.weight)
    return model


def ct_ehr_batch(targets=(("ct", 2), ("ehr", 3))):
    """Two subjects: CT and record are seen; ``targets`` of each kind are hidden, all asked of the first subject."""
    rng = torch.Generator().manual_seed(1)

    def crops(n):
        return VolumeView("ct", torch.randn(n, 1, 8, 8, 8, generator=rng))

    def records(n):
        lengths = torch.arange(2, 2 + n)
        total = int(lengths.sum())
        return SequenceView(
            "ehr",
            torch.randint(0, 20, (total,), generator=rng),
            torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
            values=torch.randn(total, generator=rng),
            has_value=torch.ones(total),
            days=torch.zeros(total),
        )

    layout = Layout.empty(2, 2 + sum(n for _, n in targets))
    layout.kind[:, 0], layout.kind[:, 1] = 0, 1
    layout.source[:, 0], layout.source[:, 1] = torch.tensor([0, 1]), torch.tensor([2, 3])
    slot, row, hidden = 2, 0, []
    for name, n in targets:
        if n:
            hidden.append(crops(n) if name == "ct" else records(n))
        for _ in range(n):
            layout.kind[0, slot], layout.target[0, slot] = ("ct", "ehr").index(name), row
            layout.time[0, slot] = 10.0 * slot
            slot, row = slot + 1, row + 1
    return Batch([crops(2), records(2)], hidden, layout, torch.tensor([7, 8]))


@torch.no_grad()
def test_the_prediction_term_is_the_mean_over_kinds_of_the_mean_over_their_targets():
    model, batch = ct_ehr_model(), ct_ehr_batch()
    terms = model(batch, LossConfig(predict=2.0), share_of(batch, 2))
    predicted = model.predictor(gather_slots(model.encode(batch.views), batch.layout))[0, 2:]
    wanted = model.encode(batch.targets)
    each = (predicted - wanted).square().mean(dim=1)
    torch.testing.assert_close(terms["predict.ct"], each[:2].mean())
    torch.testing.assert_close(terms["predict.ehr"], each[2:].mean())
    torch.testing.assert_close(terms["predict"], (each[:2].mean() + each[2:].mean()) / 2)
    torch.testing.assert_close(terms["loss"], 2 * terms["predict"])


@pytest.mark.parametrize("targets", [(("ct", 0), ("ehr", 2)), (("ct", 1), ("ehr", 0)), (("ct", 0), ("ehr", 0))])
def test_a_kind_without_targets_gives_no_nan(targets):
    model, batch = ct_ehr_model(), ct_ehr_batch(targets)
    terms = model(batch, LossConfig(vicreg=VICRegConfig(), sigreg=SIGRegConfig(slices=8)), share_of(batch, 2))
    terms["loss"].backward()
    assert all(value.isfinite().all() for value in terms.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    if not any(n for _, n in targets):
        assert float(terms["predict"].detach()) == 0


def test_a_micro_batch_of_skipped_subjects_is_worth_zero():
    model, asked = ct_ehr_model(), ct_ehr_batch()
    empty = Batch([], [], Layout.empty(2, 1), torch.tensor([7, 8]))
    loss = LossConfig(vicreg=VICRegConfig(), sigreg=SIGRegConfig(slices=8))
    for share in (share_of(empty, 2), share_of(asked, 2, parts=2)):
        terms = model(empty, loss, share)
        terms["loss"].backward()
        assert float(terms["loss"].detach()) == 0
        assert all(value.isfinite().all() for value in terms.values())


def test_targets_get_no_gradient_and_hidden_content_none_either():
    model, batch = ct_ehr_model(), ct_ehr_batch()
    batch.views[0].voxels.requires_grad_()
    batch.targets[0].voxels.requires_grad_()
    model(batch, LossConfig(), share_of(batch, 2))["loss"].backward()
    assert batch.views[0].voxels.grad.any()
    assert batch.targets[0].voxels.grad is None


@torch.no_grad()
def test_target_norm_is_a_layer_norm_without_weights():
    model, batch = ct_ehr_model(target_norm=True), ct_ehr_batch()
    got = model(batch, LossConfig(), share_of(batch, 2))["predict"]
    predicted = model.predictor(gather_slots(model.encode(batch.views), batch.layout))[0, 2:]
    wanted = model.encode(batch.targets)
    wanted = (wanted - wanted.mean(1, keepdim=True)) / (wanted.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    each = (predicted - wanted).square().mean(dim=1)
    torch.testing.assert_close(got, (each[:2].mean() + each[2:].mean()) / 2)


@torch.no_grad()
def test_the_teacher_forced_rollout_reweights_two_outputs_of_the_same_forward(toy):
    model, sampler = toy.toy_model(dropout=0.0), toy.ToySampler(shortest=3)
    torch.nn.init.normal_(model.predictor.output.weight)
    batch = sampler.batch([(0, i) for i in range(toy.WINDOWS)])
    assert 0 < batch.rollouts() < toy.WINDOWS
    forced = LossConfig(predict=0, rollout=RolloutLoss(chained=False))
    got = model(batch, forced, share_of(batch, 2))["rollout"]
    latents, layout = model.encode(batch.views), batch.layout
    predicted = model.predictor(gather_slots(latents, layout))
    expected = []
    for row in range(toy.WINDOWS):
        start = int(layout.start[row])
        if start >= 0:
            expected += [
                (predicted[row, slot] - latents[layout.source[row, slot + 2]]).abs().sum()
                for slot in (start, start + 2)
            ]
    torch.testing.assert_close(got, torch.stack(expected).sum() / batch.rollouts())


@torch.no_grad()
def test_the_chained_rollout_reads_its_own_prediction(toy):
    model, batch = toy.toy_model(dropout=0.0), toy.ToySampler().batch([(0, 0)])
    torch.nn.init.normal_(model.predictor.output.weight)
    loss = LossConfig(predict=0, rollout=RolloutLoss(chained=True))
    got = model(batch, loss, share_of(batch, 2))["rollout"]
    latents, layout, start = model.encode(batch.views), batch.layout, int(batch.layout.start[0])
    slots = gather_slots(latents, layout)
    first = model.predictor(slots)[0, start]
    fed = slots.latent.clone()
    fed[0, start + 2] = first
    second = model.predictor(dataclasses.replace(slots, latent=fed))[0, start + 2]
    wanted = latents[layout.source[0, [start + 2, start + 4]]]
    torch.testing.assert_close(got, (first - wanted[0]).abs().sum() + (second - wanted[1]).abs().sum())


def test_a_rollout_beyond_two_steps_is_an_error_not_a_wrong_target():
    with pytest.raises(ValueError, match="horizon=3"):
        RolloutLoss(horizon=3)


@torch.no_grad()
def test_an_average_gives_the_targets_and_the_online_weights_the_inputs(toy):
    model, batch = toy.toy_model(dropout=0.0), toy.ToySampler().batch([(0, 0), (0, 1)])
    torch.nn.init.normal_(model.predictor.output.weight)
    old = model.encode(batch.views)
    model.teacher.begin(TeacherConfig(kind="ema"), {n: p for n, p in model.online().items() if "lora" in n})
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.add_(torch.randn_like(p))
    new, layout = model.encode(batch.views), batch.layout
    assert not torch.equal(old, new)
    torch.testing.assert_close(model.targets(batch), old)
    predicted = model.predictor(gather_slots(new, layout))
    asked = layout.target >= 0
    expected = (predicted[asked] - old[layout.target[asked]]).abs().sum(dim=1).mean()
    torch.testing.assert_close(model(batch, LossConfig(), share_of(batch, 2))["predict"], expected)


@torch.no_grad()
def test_regularisers_weigh_a_text_by_the_slots_that_it_fills(toy):
    """Else its weight would depend on which rank's batch it is shared in."""
    model, batch = toy.toy_model(dropout=0.0), toy.ToySampler().batch([(0, 0), (0, 1), (0, 2)])
    loss = LossConfig(predict=0, sigreg=SIGRegConfig(slices=16))
    got = model(batch, loss, share_of(batch, 2))["sigreg"]
    latents = model.encode(batch.views)
    layout = dataclasses.replace(batch.layout)
    view = batch.views[0]
    spread = [latents[layout.source[layout.kind == kind]] for kind in (0, 1)]
    from mmjepa.objectives.sigreg import sigreg

    torch.testing.assert_close(got, sum(sigreg(z, loss.sigreg, 0) for z in spread))
    assert sum(len(z) for z in spread) > view.rows


def test_every_parameter_belongs_to_one_known_part():
    model = ct_ehr_model()
    assert set(model.parts()) == {"ct", "ehr.base", "ehr.front", "predictor"}
    assert part_of("encoders.ehr.lm.base_model.model.layers.0.q_proj.lora_A.default.weight") == "ehr.adapter"
    assert all(name.startswith("encoders.ehr.lm.") for name in model.parts()["ehr.base"])


def test_a_batch_moves_to_a_device_as_a_whole():
    batch = to_device(ct_ehr_batch(), torch.device("meta"))
    tensors = [batch.subjects, batch.layout.kind, batch.layout.start, batch.views[0].voxels, batch.targets[1].tokens]
    assert all(t.device.type == "meta" for t in tensors)
    assert batch.views[0].keep is None
    assert batch.views[1].encoder == "ehr"


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"kind": "vit3d"}, ViT3DConfig),
        ({"kind": "slices25d"}, Slices25DConfig),
        ({"patch": 4}, ViT3DConfig),
        ({"stack": 2}, Slices25DConfig),
        ({"latent": 8}, ViT3DConfig),
    ],
)
def test_the_volume_encoder_is_chosen_by_its_kind_or_else_by_its_keys(values, kind):
    config = build(ModelConfig, {"ct": values})
    assert type(config.ct) is kind
    assert build(ModelConfig, to_plain(config)) == config


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kind": "vit2d"}, "'vit2d'"),
        ({"patch": 4, "heds": 2}, "ct.heds"),
        ({"stack": 3, "latnt": 2}, "ct.latnt"),
        ({"kind": "vit3d", "stack": 3}, "ct.stack"),
        ({"heads": 0}, "heads"),
        ({"channels": 2}, "channels"),
        ({"weights": "x.safetensors"}, "learned_grid"),
        ({"pool": "max"}, "'max'"),
    ],
)
def test_a_volume_encoder_that_does_not_exist_is_refused_by_the_name_of_the_key(values, says):
    with pytest.raises(Refusal) as refused:
        build(ModelConfig, {"ct": values})
    assert says in refused.value.message


def test_pooling_by_attention_learns_from_the_latents_of_whole_scans():
    model, batch = (
        ct_ehr_model(ct=ViT3DConfig(width=12, heads=2, depth=1, latent=8, patch=4, pool="attention")),
        ct_ehr_batch(),
    )
    assert any(".pool." in name for name in model.parts()["ct"])
    model(batch, LossConfig(), share_of(batch, 2))["loss"].backward()
    pool = model.encoders["ct"].pool
    assert [name for name, p in pool.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_model_without_encoders_or_language_model_is_an_error():
    with pytest.raises(ValueError, match="at least one encoder"):
        ModelConfig()
    with pytest.raises(ValueError, match="pass base"):
        JEPA(ModelConfig(ehr=Qwen3Config()))
