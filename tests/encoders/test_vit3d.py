"""The volume encoder computes what it may see, and nothing else."""

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from monai.data.meta_tensor import MetaTensor

from mmjepa.batch import VolumeView
from mmjepa.encoders.vit3d import ViT3D, ViT3DConfig, sincos_places
from mmjepa.refusal import Refusal

VARIANTS = {
    "fixed": {},
    "learned": {"learned_grid": (2, 3, 2), "registers": 2},
    "resampled": {"learned_grid": (3, 2, 4)},
}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return encoder(**VARIANTS[request.param])


def encoder(**settings):
    torch.manual_seed(0)
    made = ViT3D(ViT3DConfig(**{"patch": 4, "width": 24, "depth": 2, "heads": 2, "ffn": 32, "latent": 10, **settings}))
    for name, parameter in made.named_parameters():
        if name in ("place", "register"):  # large enough to be seen through the layers
            torch.nn.init.normal_(parameter)
    return made.eval()


def crops(n=2, shape=(8, 12, 8), seed=1, channels=1):
    return torch.randn(n, channels, *shape, generator=torch.Generator().manual_seed(seed))


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


def test_fixed_places_are_the_same_in_every_grid():
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
    model.zero_grad()
    model(VolumeView("ct", crops(), torch.tensor([[0, 1], [2, 3]]), "tokens")).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_crop_that_the_patch_does_not_divide_is_an_error(model):
    with pytest.raises(ValueError, match="multiple of patch"):
        model.tokens(crops(1, (8, 10, 8)))
    with pytest.raises(ValueError, match="multiple of"):
        ViT3DConfig(width=100)


@torch.no_grad()
def test_learned_places_are_taken_as_they_are_on_their_own_grid_and_keep_their_shape_on_others():
    model = encoder(learned_grid=(2, 4, 3))
    axes = torch.meshgrid(*(torch.linspace(-1 + 1 / n, 1 - 1 / n, n) for n in (2, 4, 3)), indexing="ij")
    model.place[0, :, :3] = torch.stack(axes, dim=-1).reshape(-1, 3)  # in a crop of edges -1..1
    assert torch.equal(model._places((2, 4, 3)), model.place)
    finer = model._places((4, 8, 6))[0, :, :3].reshape(4, 8, 6, 3)
    exact = torch.stack(
        torch.meshgrid(*(torch.linspace(-1 + 1 / n, 1 - 1 / n, n) for n in (4, 8, 6)), indexing="ij"), dim=-1
    )
    inside = (slice(1, -1),) * 3  # beyond the outermost trained places nothing is known but those
    torch.testing.assert_close(finer[inside], exact[inside], atol=1e-5, rtol=0)


@torch.no_grad()
def test_registers_are_read_but_no_token_of_the_output():
    model = encoder(registers=3)
    before = model.tokens(crops())
    assert before.shape == (2, 12, 10)
    model.register.add_(torch.randn_like(model.register))
    assert not torch.allclose(model.tokens(crops()), before, atol=1e-3)


@torch.no_grad()
def test_every_channel_is_read():
    model, voxels = encoder(channels=2), crops(channels=2)
    before = model.tokens(voxels)
    for channel in range(2):
        changed = voxels.clone()
        changed[:, channel] += torch.randn(8, 12, 8)
        assert not torch.allclose(model.tokens(changed), before, atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 1, 8, 12, 8), (2, 3, 8, 12, 8), (2, 8, 12, 8)])
def test_other_channels_than_the_encoders_are_refused(shape):
    with pytest.raises(Refusal) as refused:
        encoder(channels=2).tokens(torch.zeros(shape))
    assert refused.value.code == "ENCODER_INPUT"
    assert "want [V, 2, X, Y, Z]" in refused.value.message


@torch.no_grad()
def test_a_new_encoder_begins_as_if_voxels_of_0_to_1_were_centred():
    model = encoder()
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 24)
    voxels = torch.rand(5, 64)
    torch.testing.assert_close(model.embed(voxels), plain(2 * voxels - 1), atol=1e-5, rtol=1e-5)


def test_the_layers_see_only_kept_tokens_and_registers():
    model, seen = encoder(registers=2), []
    hooks = [
        layer.register_forward_hook(lambda _, x, y: seen.append(y.shape[1])) for layer in (model.embed, *model.blocks)
    ]
    model.tokens(crops(), torch.tensor([[0, 5, 7], [11, 2, 3]]))
    assert seen == [3, 5, 5]
    assert all(hook.remove() is None for hook in hooks)


def loss_and_gradients(model, run):
    model.zero_grad()
    tokens = run(crops(), torch.tensor([[0, 5, 7], [11, 2, 3]]))
    tokens.float().square().mean().backward()
    return tokens.detach().float(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("settings", [{}, {"learned_grid": (3, 2, 4), "registers": 2}], ids=str)
def test_compiled_in_one_graph_the_result_and_gradients_are_the_same(settings):
    model = encoder(depth=1, **settings)
    # backend aot_eager: graph capture and autograd as in any compile, without minutes of code generation
    plain = loss_and_gradients(model, model.tokens)
    compiled = loss_and_gradients(model, torch.compile(model.tokens, backend="aot_eager", fullgraph=True))
    for ours, theirs in zip(plain, compiled, strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="needs a C++ compiler and Python's headers",
)
def test_compiled_to_machine_code_the_result_and_gradients_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = encoder(depth=1)
    plain = loss_and_gradients(model, model.tokens)
    compiled = loss_and_gradients(model, torch.compile(model.tokens, fullgraph=True))
    for ours, theirs in zip(plain, compiled, strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss_and_gradients(model, torch.compile(model.tokens, fullgraph=True))
    for ours, theirs in zip(plain, half, strict=True):
        assert not torch.equal(ours, theirs)
        assert float((ours - theirs).norm() / ours.norm()) < 0.02
    assert list(tmp_path.rglob("*.so"))  # it was compiled, not run as it is


def test_in_bfloat16_the_result_and_gradients_are_the_same_within_its_precision(model):
    plain = loss_and_gradients(model, model.tokens)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss_and_gradients(model, model.tokens)
    for ours, theirs in zip(plain, half, strict=True):
        assert not torch.equal(ours, theirs)
        assert float((ours - theirs).norm() / ours.norm()) < 0.02


@torch.no_grad()
def test_a_monai_tensor_gives_a_plain_one_of_the_same_values(model):
    tokens = model.tokens(MetaTensor(crops()))
    assert type(tokens) is torch.Tensor
    assert torch.equal(tokens, model.tokens(crops()))


def test_places_are_the_centres_of_the_tokens_in_mm(model):
    places = model.places_mm(crops(), torch.tensor([[1.0, 2.0, 5.0], [1.0, 1.0, 1.0]])).reshape(2, 2, 3, 2, 3)
    assert places[0, 0, 0, 0].tolist() == [1.5, 3.0, 7.5]
    assert places[0, 1, 2, 1].tolist() == [5.5, 19.0, 27.5]
    assert places[1, 1, 2, 1].tolist() == [5.5, 9.5, 5.5]
