"""The volume encoder computes what it may see, and nothing else."""

import pytest
import torch

from mmjepa.batch import VolumeView
from mmjepa.encoders.vit3d import ViT3D, ViT3DConfig, sincos_places


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ViT3D(ViT3DConfig(patch=4, width=24, depth=2, heads=2, ffn=32, latent=10)).eval()


def crops(n=2, shape=(8, 12, 8), seed=1):
    return torch.randn(n, 1, *shape, generator=torch.Generator().manual_seed(seed))


def place(index, grid=(2, 3, 2)):
    """The voxels of a token in raster order."""
    x, rest = divmod(index, grid[1] * grid[2])
    y, z = divmod(rest, grid[2])
    return tuple(slice(4 * i, 4 * i + 4) for i in (x, y, z))


@torch.no_grad()
def test_changing_hidden_voxels_changes_no_bit_and_visible_ones_do(model):
    voxels, keep = crops(), torch.tensor([[0, 5, 7], [11, 2, 3]])
    before = model.tokens(voxels, keep)
    hidden = voxels.clone()
    for row in range(2):
        for index in set(range(12)) - set(keep[row].tolist()):
            hidden[row, 0][place(index)] = 1e3
    assert torch.equal(model.tokens(hidden, keep), before)
    for row in range(2):
        for index in keep[row].tolist():
            seen = voxels.clone()
            seen[row, 0][place(index)] += 1
            assert not torch.equal(model.tokens(seen, keep)[row], before[row])


@torch.no_grad()
def test_keeping_every_token_is_keeping_none_aside(model):
    voxels = crops()
    everything = torch.arange(12).expand(2, -1)
    torch.testing.assert_close(model.tokens(voxels, everything), model.tokens(voxels), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_permuted_keep_permutes_the_tokens(model):
    voxels, order = crops(1), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.tokens(voxels, order[None])[0], model.tokens(voxels)[0][order], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_place_of_a_token_is_part_of_what_it_says(model):
    same = torch.ones(1, 1, 8, 12, 8)
    tokens = model.tokens(same)[0]
    assert float(torch.cdist(tokens, tokens)[~torch.eye(12, dtype=torch.bool)].min()) > 1e-4


@torch.no_grad()
def test_a_crop_is_encoded_alike_alone_and_in_company(model):
    voxels = crops(3)
    together = model(VolumeView("ct", voxels))
    singles = torch.cat([model(VolumeView("ct", voxels[i : i + 1])) for i in range(3)])
    torch.testing.assert_close(together, singles, atol=1e-5, rtol=0)


@torch.no_grad()
def test_another_grid_than_the_one_trained_on_works(model):
    view = VolumeView("ct", crops(1, (16, 4, 12)))
    assert model(view).shape == (1, 10)
    tokens = VolumeView("ct", crops(1, (16, 4, 12)), torch.tensor([[0, 3]]), "tokens")
    assert model(tokens).shape == (tokens.rows, 10)
    shared = sincos_places((2, 2, 2), 24, torch.device("cpu")).reshape(2, 2, 2, 24)
    wider = sincos_places((4, 3, 2), 24, torch.device("cpu")).reshape(4, 3, 2, 24)
    assert torch.equal(wider[:2, :2, :2], shared)


def test_no_dropout_anywhere_so_training_and_evaluation_agree(model):
    view = VolumeView("ct", crops())
    with torch.no_grad():
        evaluated = model.eval()(view)
        assert torch.equal(model.train()(view), evaluated)
        assert torch.equal(model.eval()(view), evaluated)


def test_every_parameter_gets_a_gradient(model):
    model(VolumeView("ct", crops(), torch.tensor([[0, 1], [2, 3]]), "tokens")).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_crop_that_the_patch_does_not_divide_is_an_error(model):
    with pytest.raises(ValueError, match="multiple of patch"):
        model.tokens(crops(1, (8, 10, 8)))
    with pytest.raises(ValueError, match="multiple of"):
        ViT3DConfig(width=100)
