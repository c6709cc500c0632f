"""Stacks of slices become tokens with places, and a token knows its own stack alone."""

import dataclasses
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mmjepa.batch import Layout, VolumeView
from mmjepa.config import build
from mmjepa.embed import TrainedRun, embed
from mmjepa.encoders.slices25d import Slices25D, Slices25DConfig, read_timm_weights
from mmjepa.engine.log import read_metrics
from mmjepa.evaluate.tables import read_embeddings
from mmjepa.jepa import JEPA, ModelConfig
from mmjepa.masking import check_patches
from mmjepa.model import build_model, load_model, save_model
from mmjepa.plan import plan, plan_file
from mmjepa.predictor import Predictor, PredictorConfig, gather_slots
from mmjepa.pretrain import RunConfig, pretrain, read_config
from mmjepa.refusal import Refusal


def needs_timm(test):
    skip = pytest.mark.skipif(find_spec("timm") is None, reason="needs the extra timm: make test-timm")
    return pytest.mark.timm(skip(test))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Slices25D(Slices25DConfig(stack=2, latent=10)).eval()


def crops(n=2, shape=(32, 64, 8), seed=1):
    return torch.randn(n, 1, *shape, generator=torch.Generator().manual_seed(seed))


@needs_timm
@torch.no_grad()
@pytest.mark.parametrize("backbone", ["convnext_atto", "resnet10t", "vit_tiny_patch16_224"])
def test_a_token_is_what_the_backbone_says_of_its_slices_as_channels(backbone):
    torch.manual_seed(0)
    model = Slices25D(Slices25DConfig(backbone=backbone, stack=2, latent=10)).eval()
    voxels = crops(1, (32, 64, 4))
    image = voxels[0, :, :, :, 2:4].movedim(-1, 1)
    if backbone.startswith("vit"):
        image = torch.nn.functional.interpolate(image, size=(224, 224), mode="bilinear", antialias=True)
    tokens = model.tokens(voxels)
    assert tokens.shape == (1, 2, 10)
    cfg = model.backbone.pretrained_cfg
    image = (image - np.mean(cfg["mean"])) / np.mean(cfg["std"])
    torch.testing.assert_close(tokens[0, 1], model.head(model.backbone(image))[0], atol=1e-5, rtol=1e-5)


@needs_timm
@torch.no_grad()
def test_hidden_slices_change_no_bit_and_visible_ones_do(model):
    voxels, keep = crops(), torch.tensor([[0, 2], [3, 1]])
    before = model.tokens(voxels, keep)
    for row in range(2):
        for stack in range(4):
            changed = voxels.clone()
            changed[row, :, :, :, 2 * stack + 1] += 5
            assert torch.equal(model.tokens(changed, keep)[row], before[row]) == (stack not in keep[row])


@needs_timm
@torch.no_grad()
def test_kept_tokens_come_in_the_order_of_keep(model):
    voxels, keep = crops(), torch.tensor([[0, 2], [3, 1]])
    all_tokens = model.tokens(voxels)
    wanted = torch.stack([all_tokens[row][keep[row]] for row in range(2)])
    torch.testing.assert_close(model.tokens(voxels, keep), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(VolumeView("ct", voxels, keep)), wanted.mean(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(VolumeView("ct", voxels, keep, "tokens")), wanted.flatten(0, 1))


@needs_timm
def test_places_are_the_centres_of_the_stacks_in_mm(model):
    places = model.places_mm(crops(2, (4, 6, 6)), torch.tensor([[1.0, 2.0, 5.0], [1.0, 1.0, 1.0]]))
    assert places[0].tolist() == [[1.5, 5.0, 2.5], [1.5, 5.0, 12.5], [1.5, 5.0, 22.5]]
    assert places[1].tolist() == [[1.5, 2.5, 0.5], [1.5, 2.5, 2.5], [1.5, 2.5, 4.5]]


@needs_timm
def test_the_predictor_reads_the_tokens_and_every_weight_learns():
    torch.manual_seed(0)
    model = Slices25D(Slices25DConfig(stack=2, latent=10))
    config = PredictorConfig(kinds=("ct",), latent=10, width=12, heads=2, ffn=16, queries=True, position="continuous")
    view = VolumeView("ct", crops(), torch.tensor([[0, 2], [3, 1]]), "tokens")
    layout = Layout.empty(2, 3)
    layout.kind[:], layout.source[:, :2] = 0, torch.arange(view.rows).view(2, 2)
    places = model.places_mm(view.voxels, torch.ones(2, 3))
    layout.place[:, :2] = places.gather(1, view.keep[:, :, None].expand(-1, -1, 3)) / torch.tensor([32, 64, 8])
    predicted = Predictor(config)(gather_slots(model(view), layout))
    assert predicted.shape == (2, 3, 10)
    predicted[:, 2].square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@needs_timm
def test_slices_that_the_stack_does_not_divide_and_unknown_backbones_are_errors(model):
    with pytest.raises(ValueError, match="multiple of stack"):
        model.tokens(crops(1, (32, 32, 7)))
    with pytest.raises(Refusal) as unknown:
        Slices25D(Slices25DConfig(backbone="no_such_net"))
    assert unknown.value.code == "ENCODER_ARCHITECTURE"


def run_config(cohort, out, **ct):
    """A few steps of pretraining with this encoder, on whole crops and on stacks of slices."""
    predictor = {"kinds": ["ct", "ehr", "ct_patch"], "queries": True, "position": "continuous", "depth": 1, "heads": 2}
    qwen3 = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    values = {
        "data": str(cohort),
        "out": str(out),
        "views": {
            "kind": "ct_ehr",
            "crop": [32, 32, 16],
            "mask": {"probability": {"cross_modal": 0.6, "patches": 0.4}},
            "patches": {"block": 0.25},
        },
        "model": {
            "ct": {"kind": "slices25d", "backbone": "test_convnext", "stack": 2, "latent": 8, **ct},
            "ehr": {"architecture": {**qwen3, "num_key_value_heads": 1, "head_dim": 8}, "values": True, "latent": 8},
            "predictor": {**predictor, "latent": 8, "width": 12, "ffn": 16},
        },
        "curriculum": [
            {"name": "joint", "steps": 3, "train": ["ct", "predictor"], "teacher": {"kind": "ema", "tau": 0.9}}
        ],
        "batch": 4,
        "engine": {"device": "cpu"},
    }
    return build(RunConfig, values)


@needs_timm
@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_a_run_pretrains_saves_and_embeds_with_it(ct_ehr_cohort, tmp_path, pool):
    config = run_config(ct_ehr_cohort, tmp_path / "run", pool=pool)
    pretrain(config)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert any("predict.ct_patch" in row for row in rows)
    assert rows[0]["gradient.ct"] > 0
    run = TrainedRun(tmp_path / "run")
    began = dict(TrainedRun(tmp_path / "run", untrained=True).model.named_parameters())
    still = [n for n, p in run.model.named_parameters() if n.startswith("encoders.ct.") and torch.equal(p, began[n])]
    assert still == []
    assert embed(tmp_path / "run", ct_ehr_cohort, tmp_path / "z.parquet")["width"] == 16
    z = read_embeddings(tmp_path / "z.parquet").z
    assert np.isfinite(z).all()
    assert (z[:, :8].std(axis=0) > 0).all()


@needs_timm
def test_its_cost_is_planned_on_the_modules_that_a_run_builds(tmp_path):
    config = run_config(".", ".")
    made = plan(config)
    model = Slices25D(config.model.ct)
    assert made["parameters"]["ct"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert made["per_step"]["volume_tokens"] == 4 * 8
    longer = plan(dataclasses.replace(config, views=dataclasses.replace(config.views, crop=(64, 32, 16))))
    head = (
        2 * model.head.weight.numel() * 32 * 3
    )  # of 32 tokens; a pass forward and two backward, the teacher's forward
    one, two = (p["phases"][0]["flops_per_step"]["ct"] - head * 4 / 3 for p in (made, longer))
    assert two == pytest.approx(2 * one, rel=0.05)  # twice the pixels of every slice
    assert longer["memory"]["activations"] > made["memory"]["activations"]


@needs_timm
def test_the_small_recipe_takes_it_on_the_command_line(tmp_path):
    small = (Path(__file__).parents[2] / "recipes" / "configs" / "ct_ehr_small.yaml").read_text()
    (tmp_path / "small.yaml").write_text(small)
    told = re.search(r"(model\.ct\.kind=\S+) (model\.ct\.stack=\S+) (views\.patches\.block=\S+)", small)
    made = plan_file(tmp_path / "small.yaml", [*told.groups(), "model.ct.backbone=test_convnext"])
    assert made["per_step"]["volume_length"] == 32 // 2
    config = read_config(tmp_path / "small.yaml", ["data=.", "out=.", *told.groups()])
    check_patches((1, 1, 16), config.views.patches)


@needs_timm
def test_a_backbone_that_keeps_running_statistics_is_refused_for_a_run():
    with pytest.raises(Refusal) as refused:
        JEPA(ModelConfig(ct=Slices25DConfig(backbone="resnet10t", latent=96)))
    assert refused.value.code == "ENCODER_ARCHITECTURE"
    assert "bn1" in refused.value.message


def test_without_timm_a_run_is_refused_says_what_to_install_and_leaves_nothing(ct_ehr_cohort, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    config = run_config(ct_ehr_cohort, tmp_path / "run")
    for start in (pretrain, plan):
        with pytest.raises(Refusal) as missing:
            start(config)
        assert missing.value.code == "EXTRA_MISSING"
        assert "mmjepa[timm]" in missing.value.hint
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "torchvision does not match this torch"),
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("import a_package_that_is_nowhere", "a_package_that_is_nowhere"),
        ("from math import no_such_name", "no_such_name"),
    ],
)
def test_a_timm_that_fails_at_import_is_refused_as_broken_not_as_absent(tmp_path, monkeypatch, fault, says):
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text(fault)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(Refusal) as broken:
        Slices25D(Slices25DConfig())
    assert broken.value.code == "PACKAGE_BROKEN"
    assert says in broken.value.message


@needs_timm
def test_several_windows_as_channels_are_refused(model):
    with pytest.raises(Refusal) as refused:
        model.tokens(torch.zeros(1, 3, 32, 32, 4))
    assert refused.value.code == "ENCODER_INPUT"


def test_a_name_of_trained_weights_needs_their_file():
    with pytest.raises(ValueError, match=r"set weights .*'resnet18'"):
        Slices25DConfig(backbone="resnet18.a1_in1k")
    assert Slices25DConfig(backbone="resnet18.a1_in1k", weights="model.safetensors").weights == "model.safetensors"


@needs_timm
@torch.no_grad()
def test_a_model_begins_with_the_weights_of_a_timm_file_and_needs_it_once(tmp_path):
    import timm

    torch.manual_seed(1)
    trained = timm.create_model("test_convnext")
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    values = {"kind": "slices25d", "backbone": "test_convnext.r160_in1k", "stack": 2, "latent": 8}
    values["weights"] = str(tmp_path / "model.safetensors")
    config = build(ModelConfig, {"ct": values, "predictor": {"latent": 8}})
    torch.manual_seed(0)
    model = build_model(config, tmp_path / "m", 0).eval()
    body, wanted = dict(model.encoders["ct"].backbone.named_parameters()), dict(trained.named_parameters())
    changed = [name for name in body if body[name].shape != wanted[name].shape]
    assert changed == ["stem.0.weight"]  # two slices instead of three colours
    assert all(torch.equal(body[name], wanted[name]) for name in body if name not in changed)
    (tmp_path / "model.safetensors").unlink()
    save_model(model, tmp_path / "m", base_trained=False)
    view = VolumeView("ct", crops())
    assert torch.equal(load_model(tmp_path / "m").encode([view]), model.encode([view]))


@needs_timm
@pytest.mark.parametrize(
    ("content", "code"), [(None, "MISSING"), ("text", "BROKEN"), ("other", "BROKEN"), ("shape", "BROKEN")]
)
def test_backbone_weights_that_are_none_or_of_another_are_refused(tmp_path, content, code):
    path = tmp_path / "model.safetensors"
    if content == "text":
        path.write_text("no weights")
    elif content == "other":
        save_file({"a": torch.zeros(2)}, path)
    elif content == "shape":
        import timm

        state = timm.create_model("test_convnext").state_dict()
        save_file(state | {"stages.0.blocks.0.conv_dw.bias": torch.zeros(3)}, path)
    with pytest.raises(Refusal) as refused:
        read_timm_weights(Slices25DConfig(backbone="test_convnext", weights=str(path)))
    assert refused.value.code == f"ENCODER_{code}"


def test_an_impossible_size_is_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        Slices25DConfig(stack=0)
