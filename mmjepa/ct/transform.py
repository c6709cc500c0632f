"""Transforms of a sample, MONAI's or anyone's: seeded, and what they may return.

A MONAI transform is handed a MetaTensor with the affine of the crop (RAS mm), so ``Spacing`` or ``Orientation`` know its voxels; any other
is handed a plain tensor. Transforms of dictionaries do not fit: take the array transform of the same name, without the d.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmjepa.keyed import key_words
from mmjepa.refusal import Refusal

Transform = Callable[[Tensor], Any]
_RANDOM = np.random.RandomState(0)  # MONAI's kind; a new one costs fifty times what seeding does


def check_transform(transform: Transform | None) -> None:
    """Raises Refusal TRANSFORM_INVALID: nothing to call, or a MONAI transform of dictionaries (also within a Compose)."""
    if transform is not None and not callable(transform):
        raise Refusal("TRANSFORM_INVALID", f"the transform is a {type(transform).__name__}, which nobody can call")
    monai = sys.modules.get("monai.transforms")
    if monai and isinstance(transform, monai.MapTransform):
        name = type(transform).__name__
        raise Refusal("TRANSFORM_INVALID", f"{name} is a transform of dictionaries", f"Take {name.removesuffix('d')}")
    if monai and isinstance(transform, monai.Compose):
        for part in transform.transforms:
            check_transform(part)


def transformed(
    transform: Transform, voxels: Tensor, affine: np.ndarray, seed: int, stream: str, *key: int | str
) -> Tensor:
    """What a transform makes of float32 [C, X, Y, Z], as a plain float32 tensor. ``voxels`` may be overwritten afterwards.

    affine: 4 x 4, voxel -> RAS mm. A transform that has ``set_random_state`` is seeded by (seed, stream, *key) first.
    Raises Refusal TRANSFORM_FAILED (what it raised is the cause, ``__cause__``), TRANSFORM_OUTPUT (not one array).
    """
    reseed = getattr(transform, "set_random_state", None)
    if reseed:
        _RANDOM.seed(key_words(seed, stream, *key)[0])
        reseed(state=_RANDOM)
    monai = sys.modules.get("monai.transforms")
    if monai and isinstance(transform, monai.Transform):
        from monai.data import MetaTensor

        voxels = MetaTensor(voxels, affine=torch.from_numpy(affine))
    try:
        made = transform(voxels)
    except Exception as error:
        raise Refusal(
            "TRANSFORM_FAILED", f"the transform raised {type(error).__name__} on {tuple(voxels.shape)}"
        ) from error
    if not isinstance(made, Tensor | np.ndarray):
        kind = f"{type(made).__name__} of {len(made)}" if isinstance(made, list | tuple | dict) else type(made).__name__
        hint = "Want one tensor [C, X, Y, Z]; for several crops of an image, list it several times"
        raise Refusal("TRANSFORM_OUTPUT", f"the transform returned a {kind}", hint)
    made = torch.as_tensor(made)
    plain = made.as_tensor() if hasattr(made, "as_tensor") else made  # MONAI's own tensors slow every later step
    return plain.float()
