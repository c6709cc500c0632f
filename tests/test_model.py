"""Models come back from disk as they were, through nothing but safetensors, JSON and the usual libraries."""

import json
import shutil

import numpy as np
import pytest
import torch
from monai.networks.nets.vit import ViT
from safetensors.torch import load_file, save_file

from mmjepa.batch import SequenceView, VolumeView
from mmjepa.config import build, merge
from mmjepa.embed import TrainedRun
from mmjepa.jepa import JEPA, ModelConfig
from mmjepa.model import build_model, load_model, save_model
from mmjepa.refusal import Refusal


def text_view(vocabulary=40):
    tokens = torch.arange(11) * 7 % vocabulary
    return SequenceView("ehr", tokens, torch.tensor([0, 4, 5, 11]))


def trained(model):
    """The same model, every parameter moved."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


SETTINGS = {
    "base": {},
    "adapter": {"adapter": {"rank": 2}},
    "untied": {"architecture": {"tie_word_embeddings": False, "num_hidden_layers": 1}, "adapter": {"rank": 2}},
    "mean": {"pool": "mean", "latent": 96},
}


@torch.no_grad()
@pytest.mark.parametrize("name", SETTINGS)
def test_a_saved_model_gives_identical_latents_and_predictions(name, tmp_path):
    torch.manual_seed(0)
    model = trained(build_model(build(ModelConfig, {"ehr": SETTINGS[name]}), tmp_path / "m", 40))
    save_model(model, tmp_path / "m", base_trained=True)
    other = load_model(tmp_path / "m")
    assert not other.training
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []
    assert torch.equal(model.encode([text_view()]), other.encode([text_view()]))


@torch.no_grad()
def test_a_volume_model_comes_back_too(tmp_path):
    config = build(ModelConfig, {"ct": {"patch": 4, "width": 12, "heads": 2, "depth": 1, "latent": 96}})
    torch.manual_seed(0)
    model = trained(build_model(config, tmp_path / "m", 0))
    save_model(model, tmp_path / "m", base_trained=False)
    view = VolumeView("ct", torch.randn(2, 1, 8, 8, 8))
    assert torch.equal(model.encode([view]), load_model(tmp_path / "m").encode([view]))
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


def monai_vit(**settings):
    """A small MONAI ViT for crops of 8 x 12 x 16 voxels, and the config of a model that begins with its weights."""
    torch.manual_seed(3)
    net = ViT(1, (8, 12, 16), patch_size=4, hidden_size=36, mlp_dim=40, num_layers=2, num_heads=3, **settings).eval()
    ct = {"patch": 4, "width": 36, "depth": 2, "heads": 3, "ffn": 40, "latent": 36, "learned_grid": [2, 3, 4]}
    return net, {"ct": ct, "predictor": {"latent": 36}}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*have no use here")
@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_a_model_begins_with_the_weights_of_a_monai_vit_and_needs_their_file_once(tmp_path, pool):
    net, values = monai_vit()
    path = tmp_path / "vit.safetensors"
    save_file(net.state_dict(), path)
    fresh = build_model(build(ModelConfig, values), tmp_path / "m", 0)
    config = build(ModelConfig, merge(values, {"ct": {"weights": str(path), "pool": pool}}))
    torch.manual_seed(0)
    model = build_model(config, tmp_path / "m", 0).eval()
    voxels = torch.randn(2, 1, 8, 12, 16)
    monai = net.norm(net(voxels)[1][-1])
    torch.testing.assert_close(model.encoders["ct"].tokens(voxels), monai, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(fresh.encoders["ct"].tokens(voxels), monai, atol=1e-2)
    path.unlink()
    save_model(model, tmp_path / "m", base_trained=False)
    assert torch.equal(
        load_model(tmp_path / "m").encode([VolumeView("ct", voxels)]), model.encode([VolumeView("ct", voxels)])
    )


@pytest.mark.filterwarnings("ignore:.*have no use here")
@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"depth": 3}, "ENCODER_ARCHITECTURE", "depth=2, not depth=3"),
        ({"ffn": 64, "registers": 1}, "ENCODER_ARCHITECTURE", "ffn=40, registers=0"),
        ({"heads": 5, "width": 30, "latent": 30}, "ENCODER_ARCHITECTURE", "heads=5"),
        ({"learned_grid": [2, 2, 2]}, "ENCODER_ARCHITECTURE", "(8, 8, 8)"),
        ({"weights": "nowhere.safetensors"}, "ENCODER_MISSING", "nowhere.safetensors is not a file"),
        ({"weights": "."}, "ENCODER_MISSING", "is not a file"),
        ({"weights": "vit.pt"}, "ENCODER_BROKEN", "no safetensors file"),
        ({"weights": "cut.safetensors"}, "ENCODER_BROKEN", "damaged"),
        ({"weights": "other.safetensors"}, "ENCODER_BROKEN", "absent"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_the_config_or_are_none_are_refused(tmp_path, monkeypatch, change, code, says):
    monkeypatch.chdir(tmp_path)
    net, values = monai_vit()
    save_file(net.state_dict(), "vit.safetensors")
    torch.save(net.state_dict(), "vit.pt")
    whole = (tmp_path / "vit.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"a": torch.zeros(2)}, "other.safetensors")
    values = merge(values, {"ct": {"weights": "vit.safetensors", **change}})
    values["predictor"]["latent"] = values["ct"]["latent"]
    with pytest.raises(Refusal) as refused:
        build_model(build(ModelConfig, values), tmp_path / "m", 0)
    assert refused.value.code == code
    assert says in refused.value.message


@torch.no_grad()
def test_a_language_model_that_was_not_trained_here_is_not_copied(tmp_path):
    torch.manual_seed(0)
    first = build_model(build(ModelConfig, {"ehr": {}}), tmp_path / "first", 40)
    save_model(first, tmp_path / "first", base_trained=True)
    path = str(tmp_path / "first" / "ehr")
    model = build_model(build(ModelConfig, {"ehr": {"path": path, "adapter": {"rank": 2}}}), tmp_path / "m", 40)
    assert torch.equal(model.encode([text_view()]), first.encode([text_view()]))
    for name, p in model.named_parameters():
        if "lora_B" in name or "predictor" in name:
            p.add_(torch.randn_like(p))
    save_model(model, tmp_path / "m", base_trained=False)
    assert not (tmp_path / "m" / "ehr").exists()
    assert torch.equal(load_model(tmp_path / "m").encode([text_view()]), model.eval().encode([text_view()]))


@torch.no_grad()
def test_plain_peft_and_transformers_read_what_a_run_leaves(icu_run):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = TrainedRun(icu_run).model
    base = AutoModelForCausalLM.from_pretrained(icu_run / "model" / "ehr")
    plain = PeftModel.from_pretrained(base, icu_run / "model" / "ehr_adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(icu_run / "model" / "tokenizer")
    text = "t=3h | HR: 91 bpm."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    states = plain(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    view = SequenceView("ehr", ids[0], torch.tensor([0, ids.shape[1]]))
    torch.testing.assert_close(model.encoders["ehr"].hidden_states(view), states, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.encode([view])[0], states[-1], atol=1e-5, rtol=1e-5)
    weights = load_file(icu_run / "model" / "ehr_adapter" / "adapter_model.safetensors")
    assert all(value.any() for name, value in weights.items() if "lora_B" in name)


def test_nothing_on_disk_names_this_machine_or_is_a_pickle(icu_run, ct_ehr_run):
    for run in (icu_run, ct_ehr_run):
        for path in (run / "model").rglob("*"):
            assert path.suffix not in (".bin", ".pt", ".pth", ".pkl")
            if path.suffix in (".json", ".md"):
                assert str(run.parent) not in path.read_text(), path.name


def test_saving_twice_leaves_the_same_bytes(tmp_path):
    torch.manual_seed(0)
    model = build_model(build(ModelConfig, {"ehr": {"adapter": {"rank": 2}}}), tmp_path / "m", 40)
    contents = []
    for _ in range(2):
        save_model(model, tmp_path / "m", base_trained=True)
        contents.append({p: p.read_bytes() for p in sorted((tmp_path / "m").rglob("*")) if p.is_file()})
    assert contents[0] == contents[1]


def test_an_unfinished_or_incomplete_model_is_refused(icu_run, tmp_path):
    with pytest.raises(Refusal) as missing:
        load_model(tmp_path)
    assert missing.value.code == "MODEL_MISSING"
    shutil.copytree(icu_run / "model", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    removed = sorted(tensors)[0]
    save_file({n: v for n, v in tensors.items() if n != removed}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(Refusal) as incomplete:
        load_model(tmp_path / "m")
    assert incomplete.value.code == "MODEL_BROKEN"
    assert removed in incomplete.value.message
    save_file({**tensors, "predictor.new": torch.zeros(1)}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(Refusal) as unknown:
        load_model(tmp_path / "m")
    assert unknown.value.code == "MODEL_BROKEN"


def test_the_other_parts_draw_the_same_whether_the_base_is_made_or_read(tmp_path):
    config = build(ModelConfig, {"ehr": {"adapter": {"rank": 2}}})
    models = []
    for _ in range(2):  # the second finds the base that the first made
        torch.manual_seed(5)
        models.append(build_model(config, tmp_path / "m", 40))
    for (name, a), (_, b) in zip(*(m.named_parameters() for m in models), strict=True):
        assert torch.equal(a, b), name
    assert isinstance(models[0], JEPA)
    assert json.loads((tmp_path / "m" / "base" / "config.json").read_text())["vocab_size"] == 40
    assert np.isfinite(float(sum(p.sum() for p in models[0].parameters()).detach()))


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("model.safetensors", "MODEL_BROKEN"),
        ("ehr_adapter/adapter_model.safetensors", "MODEL_BROKEN"),
        ("ehr/model.safetensors", "ENCODER_BROKEN"),
    ],
)
def test_weights_cut_short_are_refused(icu_run, tmp_path, file, code):
    shutil.copytree(icu_run / "model", tmp_path / "m")
    path = tmp_path / "m" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(Refusal) as cut:
        load_model(tmp_path / "m")
    assert cut.value.code == code
