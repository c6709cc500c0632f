"""A 3-D vision transformer over CT crops, built on MONAI's blocks, that computes only the tokens it may see."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmjepa.batch import VolumeView


@dataclass(frozen=True, kw_only=True)
class ViT3DConfig:
    """patch: edge of a cubic token in voxels. width, depth, heads, ffn: of the transformer. latent: output width."""

    patch: int = 8
    width: int = 128
    depth: int = 4
    heads: int = 4
    ffn: int = 512
    latent: int = 128

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("patch", "width", "depth", "heads", "ffn", "latent")}
        if min(sizes.values()) < 1:
            raise ValueError(f"every size must be at least 1, not {sizes}")
        if self.width % self.heads or self.width % 6:
            raise ValueError(
                f"width={self.width} must be a multiple of heads={self.heads} and of 6 (three sin/cos axes)"
            )


class ViT3D(nn.Module):
    """Encodes crops [V, 1, X, Y, Z] to latents.

    Positions are fixed sines and cosines of the token's place in millimetre-free grid units, so another grid than the
    one trained on needs no resampling. A MONAI TransformerBlock is used without dropout: with its fused attention,
    dropout would stay on in eval mode.
    """

    def __init__(self, config: ViT3DConfig) -> None:
        super().__init__()
        from monai.networks.blocks.transformerblock import TransformerBlock

        self.config = config
        self.embed = nn.Linear(config.patch**3, config.width)
        self.blocks = nn.ModuleList()
        for _ in range(config.depth):
            block = TransformerBlock(config.width, config.ffn, config.heads, qkv_bias=True, use_flash_attention=True)
            del block.norm_cross_attn  # never called; its parameters would get no gradient
            self.blocks.append(block)
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.latent)

    @property
    def width(self) -> int:
        """Latent width."""
        return self.config.latent

    def grid(self, voxels: Tensor) -> tuple[int, int, int]:
        """Tokens along each axis for crops [V, 1, X, Y, Z]. Raises ValueError if the patch does not divide an edge."""
        edges = tuple(voxels.shape[2:])
        if any(edge % self.config.patch for edge in edges):
            raise ValueError(f"crop {edges} is not a multiple of patch={self.config.patch}")
        x, y, z = (edge // self.config.patch for edge in edges)
        return x, y, z

    def tokens(self, voxels: Tensor, keep: Tensor | None = None) -> Tensor:
        """Token latents [V, K, latent] of the kept places (all of them: keep=None), in the order of ``keep``."""
        grid, p = self.grid(voxels), self.config.patch
        patches = voxels.reshape(len(voxels), grid[0], p, grid[1], p, grid[2], p)
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).reshape(len(voxels), -1, p**3)
        place = sincos_places(grid, self.config.width, voxels.device).expand(len(voxels), -1, -1)
        if keep is not None:
            patches = patches.gather(1, keep[:, :, None].expand(-1, -1, p**3))
            place = place.gather(1, keep[:, :, None].expand(-1, -1, self.config.width))
        hidden = self.embed(patches) + place
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))

    def forward(self, view: VolumeView) -> Tensor:
        """Latents [rows, latent] of a view: the mean over tokens of each crop, or every kept token."""
        tokens = self.tokens(view.voxels, view.keep)
        return tokens.mean(dim=1) if view.read == "cell" else tokens.flatten(0, 1)


def sincos_places(grid: tuple[int, int, int], width: int, device: torch.device) -> Tensor:
    """Fixed code [1, N, width] of the places of a token grid in raster order: width/3 numbers an axis."""
    frequencies = torch.exp(torch.linspace(0.0, -6.0, width // 6, device=device))
    axes = []
    for n in grid:
        angle = torch.arange(n, device=device, dtype=torch.float32)[:, None] * frequencies
        axes.append(torch.cat([angle.sin(), angle.cos()], dim=1))
    x, y, z = (axis.shape[0] for axis in axes)
    spread = [
        axes[0][:, None, None].expand(x, y, z, -1),
        axes[1][None, :, None].expand(x, y, z, -1),
        axes[2][None, None].expand(x, y, z, -1),
    ]
    return torch.cat(spread, dim=-1).reshape(1, x * y * z, width)
