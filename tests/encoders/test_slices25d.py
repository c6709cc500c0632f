"""Stacks of slices become tokens with places, and a token knows its own stack alone."""

import sys
from importlib.util import find_spec

import pytest
import torch

from mmjepa.batch import Layout, VolumeView
from mmjepa.encoders.slices25d import Slices25D, Slices25DConfig
from mmjepa.predictor import Predictor, PredictorConfig, gather_slots
from mmjepa.refusal import Refusal


def needs_timm(test):
    skip = pytest.mark.skipif(find_spec("timm") is None, reason="needs the extra timm: make test-timm")
    return pytest.mark.timm(skip(test))


@pytest.fixture(scope="module")
def timm():
    """timm, also beside a torch of another build than torchvision's: its compiled operators are declared, not used."""
    library = None
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")  # alive for as long as the declarations are needed
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    yield timm
    del library


@pytest.fixture(scope="module")
def model(timm):
    torch.manual_seed(0)
    return Slices25D(Slices25DConfig(stack=2, latent=10)).eval()


def crops(n=2, shape=(32, 64, 8), seed=1):
    return torch.randn(n, 1, *shape, generator=torch.Generator().manual_seed(seed))


@needs_timm
@torch.no_grad()
@pytest.mark.parametrize("backbone", ["convnext_atto", "resnet10t", "vit_tiny_patch16_224"])
def test_a_token_is_what_the_backbone_says_of_its_slices_as_channels(timm, backbone):
    torch.manual_seed(0)
    model = Slices25D(Slices25DConfig(backbone=backbone, stack=2, latent=10)).eval()
    voxels = crops(1, (32, 64, 4))
    image = voxels[0, :, :, :, 2:4].movedim(-1, 1)
    if backbone.startswith("vit"):
        image = torch.nn.functional.interpolate(image, size=(224, 224), mode="bilinear", antialias=True)
    tokens = model.tokens(voxels)
    assert tokens.shape == (1, 2, 10)
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
def test_the_predictor_reads_the_tokens_and_every_weight_learns(timm):
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


def test_without_timm_the_encoder_is_refused_and_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(Refusal) as missing:
        Slices25D(Slices25DConfig())
    assert missing.value.code == "PACKAGE_MISSING"
    assert "mmjepa[timm]" in missing.value.hint


def test_an_impossible_size_is_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        Slices25DConfig(stack=0)
