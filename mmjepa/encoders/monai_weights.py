"""Weights of MONAI's ViT in the volume encoder.

Files are safetensors, never pickles. What ``torch.save`` wrote of a ViT ``net`` becomes one where it is trusted, with
``safetensors.torch.save_file(net.state_dict(), "vit.safetensors")`` after ``net.load_state_dict(torch.load(..., weights_only=True))``.
"""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    model = from_monai_state_dict(state, image=(x, y, z), patch=config.patch, heads=config.heads)
    wanted = dataclasses.replace(model.config, pool=config.pool, weights=config.weights)
    differing = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(wanted, f.name)]
    if differing:
        said = ", ".join(f"{name}={getattr(config, name)}" for name in differing)
        true = ", ".join(f"{name}={getattr(wanted, name)}" for name in differing)
        raise Refusal("ENCODER_ARCHITECTURE", f"{config.weights} has {true}, not {said}", f"Set model.ct to {true}")
    return model


def from_monai_state_dict(
    state: Mapping[str, Any], *, image: tuple[int, int, int], patch: int | tuple[int, int, int], heads: int
) -> ViT3D:
    """The volume encoder that gives the same tokens as a MONAI 1.6 ViT (``monai.networks.nets.ViT``, three dimensions).

    state: its state dict; also a checkpoint that holds one as ``state_dict``, one with names under ``module.``, or that of
    a whole UNETR, whose ViT (``vit.``) is taken. image, patch: its ``img_size`` and ``patch_size`` in voxels, heads: its
    ``num_heads``; weights do not tell them (a linear patch embedding is the same for patches of 8^3 and 16 x 4 x 8).
    The latents are the ViT's normalised tokens: the head is the identity, and its width the ViT's. Position embeddings
    of every kind become learned places (resampled for other grids), a class token a register. Cross-attention, which
    MONAI's ViT holds and never calls, its classification head and the rest of a UNETR are left out with a warning.
    Raises Refusal ENCODER_BROKEN (no weights; one is absent, unknown or of another shape) or ENCODER_ARCHITECTURE
    (another model: image, patch and heads do not fit the weights, patches are no cubes, or it is two-dimensional).
    """
    state = _vit_weights(state)
    unused = sorted(name for name in state if UNUSED.match(name))
    if unused:
        kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in unused})
        warnings.warn(
            f"{len(unused)} MONAI weights have no use here and are left out: {', '.join(kinds)}", stacklevel=2
        )
    rest = {name: value for name, value in state.items() if name not in set(unused)}
    config = _config(rest, image, patch, heads)
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
            "Give the state dict of a MONAI 1.6 ViT in three dimensions",
        )
    model.load_state_dict(weights)
    return model


def _vit_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The ViT's own weights: out of a checkpoint, a parallel wrapper or a UNETR."""
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise Refusal(
            "ENCODER_BROKEN",
            f"a {type(state).__name__} is no state dict, or one that holds more than weights",
            "Give net.state_dict() of a MONAI 1.6 ViT",
        )
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    inner = {name.removeprefix("vit."): value for name, value in state.items() if name.startswith("vit.")}
    if inner and len(inner) < len(state):
        warnings.warn(f"{len(state) - len(inner)} weights beside the ViT's are left out", stacklevel=3)
    return inner or dict(state)


def _config(
    state: Mapping[str, Tensor], image: tuple[int, int, int], patch: int | tuple[int, int, int], heads: int
) -> ViT3DConfig:
    """The configuration of the weights of a ViT with the three given sizes."""
    place, up, embed = (
        _weight(state, name)
        for name in ("patch_embedding.position_embeddings", "blocks.0.mlp.linear1.weight", _embedding(state))
    )
    count, width = place.shape[1:]
    edges = (patch,) * 3 if isinstance(patch, int) else tuple(patch)
    sizes = (*edges, *image) if isinstance(image, (tuple, list)) else ()
    if len(sizes) != 6 or not all(isinstance(size, int) and size > 0 for size in sizes) or len(set(edges)) > 1:
        raise Refusal(
            "ENCODER_ARCHITECTURE",
            f"image={image} and patch={patch} are no three voxel edges and no edge of a cube",
            "Give img_size and patch_size as the ViT was made with, such as image=(96, 96, 96), patch=16; patches must be "
            "cubes",
        )
    edge = edges[0]
    grid = (image[0] // edge, image[1] // edge, image[2] // edge)
    flat = embed.ndim == 2  # a linear embedding: channels times voxels of a patch; else a convolution's kernel
    fits = embed.shape[1] % edge**3 == 0 if flat else tuple(embed.shape[2:]) == edges
    if not fits or grid[0] * grid[1] * grid[2] != count or heads < 1 or width % heads:
        held = f"{embed.shape[1]} numbers" if flat else f"{tuple(embed.shape[2:])} voxels"
        raise Refusal(
            "ENCODER_ARCHITECTURE",
            f"image={image}, patch={patch} and heads={heads} do not fit {count} places of width {width} and patches of {held}",
            "Give img_size (model.ct.learned_grid times model.ct.patch), patch_size and num_heads as the ViT was made with",
        )
    channels, patch = embed.shape[1] // (edge**3 if flat else 1), edge
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
