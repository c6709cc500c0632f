"""A 2.5-D encoder: any timm backbone on stacks of neighbouring slices. Needs the extra ``mmjepa[timm]``."""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmjepa.batch import VolumeView
from mmjepa.encoders.pooling import Pool, scan_pool
from mmjepa.encoders.vit3d import check_channels, plain_tensor, token_places_mm
from mmjepa.refusal import Refusal


@dataclass(frozen=True, kw_only=True)
class Slices25DConfig:
    """backbone: the name of a timm model. stack: axial slices a token, the channels of its image. latent: output width.
    pool: how the tokens of a crop become its latent. weights: a safetensors file of timm with the backbone's weights that a
    run begins with; None: at random, and then the name has no tag (``.a1_in1k``), for a tag names weights. ``Slices25D``
    does not read the file, ``read_timm_weights`` does."""

    kind: Literal["slices25d"] = "slices25d"
    backbone: str = "convnext_atto"
    stack: int = 3
    latent: int = 96
    pool: Pool = "mean"
    weights: str | None = None

    def __post_init__(self) -> None:
        name, _, tag = self.backbone.partition(".")
        if tag and self.weights is None:
            raise ValueError(
                f"backbone={self.backbone!r} names trained weights, which are not fetched: set weights to their "
                f"model.safetensors, or take {name!r} to begin at random"
            )
        if min(self.stack, self.latent) < 1:
            raise ValueError(f"stack={self.stack} and latent={self.latent} must be at least 1")

    @property
    def patch(self) -> tuple[None, None, int]:
        """Voxels of a token along x, y, z; None: the whole crop."""
        return None, None, self.stack


class Slices25D(nn.Module):
    """Encodes crops [V, 1, X, Y, Z] of voxels in 0..1, one token for every stack of neighbouring slices, from the lowest z
    upwards. Slices reach the backbone with its own normalisation, the mean of its colours'.

    Stacks do not overlap, so a token knows nothing of a stack that is hidden. A backbone made for one image size gets
    its slices resized to it (bilinear); the others take them as they are. Backbones with batch normalisation mix the
    rows of a batch while they train; the default has none.
    """

    def __init__(self, config: Slices25DConfig) -> None:
        """Raises Refusal EXTRA_MISSING, PACKAGE_BROKEN (timm is absent or cannot be imported) or ENCODER_ARCHITECTURE
        (timm knows no such backbone)."""
        super().__init__()
        self.config = config
        self.backbone = _backbone(config)
        cfg = self.backbone.pretrained_cfg
        self.mean, self.std = (sum(cfg[name]) / len(cfg[name]) for name in ("mean", "std"))
        self.image: tuple[int, int] | None = tuple(cfg["input_size"][1:]) if cfg.get("fixed_input_size") else None
        self.head = nn.Linear(self.backbone.num_features, config.latent)
        self.pool = scan_pool(config.pool, config.latent)

    @property
    def width(self) -> int:
        """Latent width."""
        return self.config.latent

    def grid(self, voxels: Tensor) -> tuple[int, int, int]:
        """Tokens along each axis for crops [V, 1, X, Y, Z]. Raises ValueError if the stack does not divide Z."""
        if voxels.shape[4] % self.config.stack:
            raise ValueError(f"crop of {voxels.shape[4]} slices is not a multiple of stack={self.config.stack}")
        return 1, 1, voxels.shape[4] // self.config.stack

    def places_mm(self, voxels: Tensor, spacing_mm: Tensor) -> Tensor:
        """Centres [V, N, 3] of all tokens of crops with ``spacing_mm`` [V, 3], in mm from the first voxel's centre."""
        return token_places_mm(self.grid(voxels), (voxels.shape[2], voxels.shape[3], self.config.stack), spacing_mm)

    def tokens(self, voxels: Tensor, keep: Tensor | None = None) -> Tensor:
        """Token latents [V, K, latent] of the kept stacks (all of them: keep=None), in the order of ``keep``.

        Raises Refusal ENCODER_INPUT for crops of several channels.
        """
        check_channels(voxels, 1)
        stacks = self.grid(voxels)[2]
        images = plain_tensor(voxels)[:, 0].unflatten(-1, (stacks, self.config.stack)).permute(0, 3, 4, 1, 2)
        if keep is not None:
            images = images.gather(1, keep[:, :, None, None, None].expand(-1, -1, *images.shape[2:]))
        flat = images.flatten(0, 1)
        if self.image is not None and flat.shape[2:] != self.image:
            flat = F.interpolate(flat, size=self.image, mode="bilinear", antialias=True)
        return self.head(self.backbone((flat - self.mean) / self.std)).unflatten(0, images.shape[:2])

    def forward(self, view: VolumeView) -> Tensor:
        """Latents [rows, latent] of a view: the pooled tokens of each crop, or every kept token."""
        tokens = self.tokens(view.voxels, view.keep)
        return self.pool(tokens) if view.read == "cell" else tokens.flatten(0, 1)


def read_timm_weights(config: Slices25DConfig) -> Slices25D:
    """The encoder whose backbone has the weights in the file ``config.weights``, its first layer fitted to ``stack``
    channels as timm does; the head is at random.

    Raises Refusal ENCODER_MISSING (no such file), ENCODER_BROKEN (no safetensors, or not of this backbone).
    """
    assert config.weights is not None
    if not Path(config.weights).is_file():
        raise Refusal("ENCODER_MISSING", f"{config.weights} is not a file", "Name one in model.ct.weights")
    try:
        state = load_file(config.weights)
    except (SafetensorError, OSError):
        raise Refusal(
            "ENCODER_BROKEN", f"{config.weights} is no safetensors file, or is damaged", "Pickles are not read"
        ) from None
    encoder = Slices25D(config)
    missing = dict(encoder.backbone.named_parameters()).keys() - state.keys()  # timm overlooks absent weights
    try:
        if missing:
            raise RuntimeError
        given = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state, "custom_load": False}}
        encoder.backbone.load_state_dict(_backbone(config, **given).state_dict())
    except RuntimeError:
        raise Refusal(
            "ENCODER_BROKEN",
            f"{config.weights} does not hold the weights of {config.backbone!r}: {len(missing)} are absent, or shapes differ",
            "Name the model.safetensors of that backbone",
        ) from None
    return encoder


def _backbone(config: Slices25DConfig, **settings: Any) -> Any:
    """timm's model, one channel a slice of the stack and without a classifier."""
    timm = _timm()
    if not timm.is_model(config.backbone):
        raise Refusal(
            "ENCODER_ARCHITECTURE",
            f"timm {timm.__version__} has no model {config.backbone!r}",
            "timm.list_models() names those it has",
        )
    return timm.create_model(config.backbone, in_chans=config.stack, num_classes=0, **settings)


def _timm() -> ModuleType:
    try:
        import timm  # type: ignore[import-not-found]
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "timm":
            raise Refusal("EXTRA_MISSING", "timm is not installed", "Install the extra mmjepa[timm]") from None
        reason = " ".join(str(error).split())
        if "torchvision::" in reason:
            reason = "this torchvision does not match this torch"
        raise Refusal(
            "PACKAGE_BROKEN",
            f"timm is installed and cannot be imported: {reason}",
            "Install timm and the torchvision build that matches torch again; `mmjepa doctor` says which is broken",
        ) from None
    return timm
