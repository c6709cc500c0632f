"""Weights of MONAI's ViT in the volume encoder.

Files are safetensors, never pickles. What ``torch.save`` wrote of a ViT ``net`` becomes one where it is trusted, with
``safetensors.torch.save_file(net.state_dict(), "vit.safetensors")`` after ``net.load_state_dict(torch.load(..., weights_only=True))``.
"""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmjepa.encoders.vit3d import ViT3D, ViT3DConfig
from mmjepa.refusal import Refusal

UNUSED = re.compile(r"blocks\.\d+\.(norm_cross_attn|cross_attn)\.|classification_head\.")


def read_monai_weights(config: ViT3DConfig) -> ViT3D:
    """The encoder that the MONAI ViT in the file ``config.weights`` is.

    Raises Refusal ENCODER_MISSING (no such file), ENCODER_BROKEN (no safetensors, or not of such a ViT) or
    ENCODER_ARCHITECTURE (the sizes of the config are not those of the weights).
    """
    assert config.weights is not None
    assert config.learned_grid is not None  # the config holds both or neither
    if not Path(config.weights).is_file():
        raise Refusal("ENCODER_MISSING", f"{config.weights} is not a file", "Name one in model.ct.weights")
    try:
        state = load_file(config.weights)
    except (SafetensorError, OSError):
        raise Refusal(
            "ENCODER_BROKEN",
            f"{config.weights} is no safetensors file, or is damaged",
            "Write it with safetensors.torch.save_file(net.state_dict(), path); pickles are not read",
        ) from None
    x, y, z = (n * config.patch for n in config.learned_grid)
    model = from_monai_state_dict(state, image=(x, y, z), heads=config.heads)
    wanted = dataclasses.replace(model.config, pool=config.pool, weights=config.weights)
    differing = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(wanted, f.name)]
    if differing:
        said = ", ".join(f"{name}={getattr(config, name)}" for name in differing)
        true = ", ".join(f"{name}={getattr(wanted, name)}" for name in differing)
        raise Refusal("ENCODER_ARCHITECTURE", f"{config.weights} has {true}, not {said}", f"Set model.ct to {true}")
    return model


def from_monai_state_dict(state: Mapping[str, Tensor], *, image: tuple[int, int, int], heads: int) -> ViT3D:
    """The volume encoder that gives the same tokens as a MONAI 1.6 ViT (``monai.networks.nets.ViT``, three dimensions).

    state: its state dict. image: its ``img_size`` in voxels, heads: its ``num_heads``; neither can be read from weights.
    The latents are the ViT's normalised tokens: the head is the identity, and its width the ViT's. Position embeddings
    of every kind become learned places (resampled for other grids), a class token a register. Cross-attention, which
    MONAI's ViT holds and never calls, and its classification head are left out with a warning.
    Raises Refusal ENCODER_BROKEN (a weight is absent, unknown or of another shape) or ENCODER_ARCHITECTURE (another
    model: image and heads do not fit the weights, or patches are no cubes).
    """
    unused = sorted(name for name in state if UNUSED.match(name))
    if unused:
        kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in unused})
        warnings.warn(
            f"{len(unused)} MONAI weights have no use here and are left out: {', '.join(kinds)}", stacklevel=2
        )
    rest = {name: value for name, value in state.items() if name not in set(unused)}
    config = _config(rest, image, heads)
    weights = _renamed(rest, config)
    model = ViT3D(config)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    wrong = sorted(
        name
        for name in expected.keys() | weights.keys()
        if name not in weights or name not in expected or weights[name].shape != expected[name]
    )
    if wrong:
        raise Refusal(
            "ENCODER_BROKEN",
            f"{len(wrong)} weights are absent, unknown or of another shape, first {', '.join(wrong[:3])}",
            "Give the state dict of a MONAI 1.6 ViT in three dimensions, its names without a prefix",
        )
    model.load_state_dict(weights)
    return model


def _config(state: Mapping[str, Tensor], image: tuple[int, int, int], heads: int) -> ViT3DConfig:
    """The configuration that the shapes of the weights and the two given sizes imply."""
    place, up, embed = (
        _weight(state, name)
        for name in ("patch_embedding.position_embeddings", "blocks.0.mlp.linear1.weight", _embedding(state))
    )
    count, width = place.shape[1:]
    if embed.ndim == 5:
        channels, edges = embed.shape[1], set(embed.shape[2:])
    else:  # a linear embedding tells neither patch nor channels, but the number of places does
        patch = round((torch.Size(image).numel() / count) ** (1 / 3))
        channels, edges = embed.shape[1] // max(1, patch**3), {patch}
    patch = max(edges)
    grid = (image[0] // patch, image[1] // patch, image[2] // patch) if patch else (0, 0, 0)
    if len(edges) > 1 or torch.Size(grid).numel() != count or heads < 1 or width % heads:
        raise Refusal(
            "ENCODER_ARCHITECTURE",
            f"image={image} and heads={heads} do not fit {count} places of width {width} and patches of {sorted(edges)}",
            "Give img_size (model.ct.learned_grid times model.ct.patch) and num_heads as the ViT was made with; patches "
            "must be cubes",
        )
    return ViT3DConfig(
        patch=patch,
        channels=channels,
        width=width,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        heads=heads,
        ffn=len(up),
        latent=width,
        learned_grid=grid,
        registers=int("cls_token" in state),
    )


def _embedding(state: Mapping[str, Tensor]) -> str:
    """Name of the patch embedding's weight: of a convolution, or of a linear layer behind a rearrangement."""
    linear = "patch_embedding.patch_embeddings.1.weight"
    return linear if linear in state else "patch_embedding.patch_embeddings.weight"


def _weight(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise Refusal("ENCODER_BROKEN", f"the weight {name} is absent", "Give the state dict of a MONAI 1.6 ViT")
    return state[name]


def _renamed(state: Mapping[str, Tensor], config: ViT3DConfig) -> dict[str, Tensor]:
    """The same weights under the encoder's names, patches flattened channel first, an absent bias as zeros."""
    names = {"patch_embedding.position_embeddings": "place", "cls_token": "register"}
    weights = {}
    for name, value in state.items():
        new = re.sub(r"^patch_embedding\.patch_embeddings\.(1\.)?", "embed.", names.get(name, name))
        weights[new] = value.detach().as_subclass(Tensor)
    embed = weights["embed.weight"]
    if embed.ndim == 2:  # MONAI's linear embedding reads voxel by voxel, the channels of each together
        embed = embed.unflatten(1, (-1, config.channels)).transpose(1, 2)
    weights["embed.weight"] = embed.flatten(1)
    for index in range(config.depth):
        weights.setdefault(f"blocks.{index}.attn.qkv.bias", torch.zeros(3 * config.width))
    return weights | {"head.weight": torch.eye(config.width), "head.bias": torch.zeros(config.width)}
