"""A 2.5-D encoder: any timm backbone on stacks of neighbouring slices. Needs the extra ``mmjepa[timm]``."""

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mmjepa.batch import VolumeView
from mmjepa.encoders.pooling import Pool, scan_pool
from mmjepa.encoders.vit3d import plain_tensor, token_places_mm
from mmjepa.refusal import Refusal


@dataclass(frozen=True, kw_only=True)
class Slices25DConfig:
    """backbone: the name of a timm model. stack: axial slices a token, the channels of its image. latent: output width.
    pool: how the tokens of a crop become its latent."""

    kind: Literal["slices25d"] = "slices25d"
    backbone: str = "convnext_atto"
    stack: int = 3
    latent: int = 96
    pool: Pool = "mean"

    def __post_init__(self) -> None:
        if min(self.stack, self.latent) < 1:
            raise ValueError(f"stack={self.stack} and latent={self.latent} must be at least 1")

    @property
    def patch(self) -> tuple[None, None, int]:
        """Voxels of a token along x, y, z; None: the whole crop."""
        return None, None, self.stack


class Slices25D(nn.Module):
    """Encodes crops [V, 1, X, Y, Z], one token for every stack of neighbouring slices, from the lowest z upwards.

    Stacks do not overlap, so a token knows nothing of a stack that is hidden. A backbone made for one image size gets
    its slices resized to it (bilinear); the others take them as they are. Backbones with batch normalisation mix the
    rows of a batch while they train; the default has none.
    """

    def __init__(self, config: Slices25DConfig) -> None:
        """Raises Refusal EXTRA_MISSING, PACKAGE_BROKEN (timm is absent or cannot be imported) or ENCODER_ARCHITECTURE
        (timm knows no such backbone)."""
        super().__init__()
        timm = _timm()
        if not timm.is_model(config.backbone):
            raise Refusal(
                "ENCODER_ARCHITECTURE",
                f"timm {timm.__version__} has no model {config.backbone!r}",
                "timm.list_models() names those it has",
            )
        self.config = config
        self.backbone = timm.create_model(config.backbone, in_chans=config.stack, num_classes=0)
        cfg = self.backbone.pretrained_cfg
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
        """Token latents [V, K, latent] of the kept stacks (all of them: keep=None), in the order of ``keep``."""
        stacks = self.grid(voxels)[2]
        images = plain_tensor(voxels)[:, 0].unflatten(-1, (stacks, self.config.stack)).permute(0, 3, 4, 1, 2)
        if keep is not None:
            images = images.gather(1, keep[:, :, None, None, None].expand(-1, -1, *images.shape[2:]))
        flat = images.flatten(0, 1)
        if self.image is not None and flat.shape[2:] != self.image:
            flat = F.interpolate(flat, size=self.image, mode="bilinear", antialias=True)
        return self.head(self.backbone(flat)).unflatten(0, images.shape[:2])

    def forward(self, view: VolumeView) -> Tensor:
        """Latents [rows, latent] of a view: the pooled tokens of each crop, or every kept token."""
        tokens = self.tokens(view.voxels, view.keep)
        return self.pool(tokens) if view.read == "cell" else tokens.flatten(0, 1)


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
