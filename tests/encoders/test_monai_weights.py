"""A MONAI ViT's weights give the tokens that MONAI's ViT gives."""

import pytest
import torch
from monai.networks.nets.unetr import UNETR
from monai.networks.nets.vit import ViT

from mmjepa.encoders.monai_weights import from_monai_state_dict
from mmjepa.refusal import Refusal

IMAGE = (8, 12, 16)


def monai_vit(**settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 36, "mlp_dim": 40, "num_layers": 2, "num_heads": 3}
    net = ViT(**{"in_channels": 1, "img_size": IMAGE, "patch_size": 4, **sizes, **settings}).eval()
    with torch.no_grad():
        for p in net.parameters():  # MONAI starts biases and the class token at zero, which would hide a lost one
            p.add_(0.1 * torch.randn_like(p))
    return net


def tokens_of(net, voxels):
    """The normalised tokens of the places, without the class token."""
    tokens = net.norm(net(voxels)[1][-1])
    return tokens[:, 1:] if net.classification else tokens


def loaded(net, **sizes):
    with pytest.warns(UserWarning, match=r"norm_cross_attn"):
        return from_monai_state_dict(net.state_dict(), **{"image": IMAGE, "patch": 4, "heads": 3, **sizes}).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"qkv_bias": True},
        {"pos_embed_type": "sincos"},
        {"proj_type": "perceptron"},
        {"proj_type": "perceptron", "in_channels": 3},
        {"in_channels": 3},
        {"classification": True},
        {"dropout_rate": 0.3},
    ],
    ids=str,
)
def test_the_tokens_are_those_of_monai(settings):
    net = monai_vit(**settings)
    voxels = torch.randn(2, settings.get("in_channels", 1), *IMAGE)
    model, wanted = loaded(net), tokens_of(net, voxels)
    torch.testing.assert_close(model.tokens(voxels), wanted, atol=1e-5, rtol=0)
    assert float(wanted.std()) > 0.1


@torch.no_grad()
def test_an_image_that_the_patch_does_not_divide_has_monais_grid():
    net = monai_vit(img_size=(9, 12, 18))
    voxels = torch.randn(1, 1, 9, 12, 18)
    model = loaded(net, image=(9, 12, 18))
    torch.testing.assert_close(model.tokens(voxels[:, :, :8, :, :16]), tokens_of(net, voxels), atol=1e-5, rtol=0)


@torch.no_grad()
def test_loaded_weights_read_other_grids_and_parts():
    model = loaded(monai_vit())
    assert model.tokens(torch.randn(1, 1, 16, 16, 16), torch.tensor([[0, 63]])).shape == (1, 2, 36)


def test_what_is_left_out_is_said_and_named():
    net = monai_vit(classification=True)
    with pytest.warns(UserWarning, match=r"6 MONAI weights .*blocks\.\*\.norm_cross_attn\.bias.*classification_head"):
        from_monai_state_dict(net.state_dict(), image=IMAGE, patch=4, heads=3)


def test_the_loaded_model_shares_no_memory_with_the_weights():
    net = monai_vit()
    state = net.state_dict()
    with pytest.warns(UserWarning, match="left out"):
        model = from_monai_state_dict(state, image=IMAGE, patch=4, heads=3)
    before = {name: value.clone() for name, value in state.items()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*have no use here")
@pytest.mark.parametrize(
    ("settings", "change", "code"),
    [
        ({}, {"heads": 5}, "ENCODER_ARCHITECTURE"),
        ({}, {"heads": 0}, "ENCODER_ARCHITECTURE"),
        ({}, {"image": (8, 8, 8)}, "ENCODER_ARCHITECTURE"),
        ({"proj_type": "perceptron"}, {"image": (8, 8, 8)}, "ENCODER_ARCHITECTURE"),
        ({"patch_size": (4, 4, 8)}, {}, "ENCODER_ARCHITECTURE"),
        ({"patch_size": (4, 4, 8)}, {"patch": (4, 4, 8)}, "ENCODER_ARCHITECTURE"),
        ({"patch_size": (4, 4, 8), "proj_type": "perceptron"}, {"patch": (4, 4, 8)}, "ENCODER_ARCHITECTURE"),
        ({"patch_size": (4, 4, 8), "proj_type": "perceptron"}, {}, "ENCODER_ARCHITECTURE"),
        ({"proj_type": "perceptron"}, {"patch": 8}, "ENCODER_ARCHITECTURE"),
        ({}, {"patch": 0}, "ENCODER_ARCHITECTURE"),
        ({}, {"image": 96}, "ENCODER_ARCHITECTURE"),
        ({}, {"image": (8, 12)}, "ENCODER_ARCHITECTURE"),
        ({"spatial_dims": 2, "img_size": (8, 8)}, {}, "ENCODER_ARCHITECTURE"),
        (
            {"spatial_dims": 2, "img_size": (8, 8), "proj_type": "perceptron"},
            {"image": (8, 8, 4)},
            "ENCODER_ARCHITECTURE",
        ),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_the_weights_are_refused(settings, change, code):
    with pytest.raises(Refusal) as refused:
        from_monai_state_dict(monai_vit(**settings).state_dict(), **{"image": IMAGE, "patch": 4, "heads": 3, **change})
    assert refused.value.code == code


@pytest.mark.filterwarnings("ignore:.*have no use here")
@pytest.mark.parametrize(
    "name", ["blocks.1.mlp.linear2.bias", "norm.weight", "patch_embedding.patch_embeddings.weight"]
)
def test_absent_misshapen_and_unknown_weights_are_refused(name):
    state = monai_vit().state_dict()
    cut = {key: value for key, value in state.items() if key != name}
    misshapen = state | {"norm.weight": torch.zeros(5)}
    for broken in (cut, misshapen, state | {"decoder.weight": torch.zeros(3)}):
        with pytest.raises(Refusal) as refused:
            from_monai_state_dict(broken, image=IMAGE, patch=4, heads=3)
        assert refused.value.code == "ENCODER_BROKEN"


@pytest.mark.filterwarnings("ignore:.*have no use here")
@torch.no_grad()
def test_checkpoints_parallel_wrappers_and_a_whole_unetr_give_their_vit():
    net = monai_vit()
    state, voxels = net.state_dict(), torch.randn(1, 1, *IMAGE)
    wrapped = {f"module.{name}": value for name, value in state.items()}
    for given in ({"state_dict": state, "epoch": 3}, wrapped, {"state_dict": wrapped}):
        model = from_monai_state_dict(given, image=IMAGE, patch=4, heads=3)
        torch.testing.assert_close(model.tokens(voxels), tokens_of(net, voxels), atol=1e-5, rtol=0)
    sizes = {"hidden_size": 36, "mlp_dim": 40, "num_heads": 3, "feature_size": 2}
    unetr = UNETR(in_channels=1, out_channels=2, img_size=(16, 16, 16), **sizes).eval()
    voxels = torch.randn(1, 1, 16, 16, 16)
    with pytest.warns(UserWarning, match="beside the ViT's are left out"):
        model = from_monai_state_dict(unetr.state_dict(), image=(16, 16, 16), patch=16, heads=3)
    torch.testing.assert_close(model.tokens(voxels), tokens_of(unetr.vit, voxels), atol=1e-5, rtol=0)


def test_what_is_no_state_dict_is_refused():
    net = monai_vit()
    for given in (net, [], {"model": net.state_dict()}, None):
        with pytest.raises(Refusal) as refused:
            from_monai_state_dict(given, image=IMAGE, patch=4, heads=3)
        assert refused.value.code == "ENCODER_BROKEN"
