"""A 3-D vision transformer over CT crops, built on MONAI's blocks, that computes only the tokens it may see."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmjepa.batch import VolumeView
from mmjepa.encoders.pooling import Pool, scan_pool
from mmjepa.refusal import Refusal


@dataclass(frozen=True, kw_only=True)
class ViT3DConfig:
    """patch: edge of a cubic token in voxels. channels: of a crop (HU windows). width, depth, heads, ffn: of the
    transformer. latent: output width. learned_grid: tokens along each axis on which places are learned, resampled for
    other grids; None: fixed sines and cosines. registers: learned tokens that are no place, attended to and dropped.
    pool: how the tokens of a crop become its latent. weights: a safetensors file with the weights of a MONAI ViT that a run
    begins with, which the sizes must fit; ``ViT3D`` does not read it, ``mmjepa.encoders.monai_weights`` does."""

    kind: Literal["vit3d"] = "vit3d"
    patch: int = 8
    channels: int = 1
    width: int = 96
    depth: int = 4
    heads: int = 4
    ffn: int = 384
    latent: int = 96
    learned_grid: tuple[int, int, int] | None = None
    registers: int = 0
    pool: Pool = "mean"
    weights: str | None = None

    def __post_init__(self) -> None:
        names = ("patch", "channels", "width", "depth", "heads", "ffn", "latent")
        sizes = {name: getattr(self, name) for name in names}
        if min(*sizes.values(), *(self.learned_grid or ())) < 1 or self.registers < 0:
            raise ValueError(
                f"every size must be at least 1, not {sizes}, learned_grid={self.learned_grid}; "
                f"registers={self.registers} at least 0"
            )
        if self.width % self.heads or (self.learned_grid is None and self.width % 6):
            raise ValueError(
                f"width={self.width} must be a multiple of heads={self.heads} and, unless places are learned, "
                "a multiple of 6 (three sin/cos axes)"
            )
        if self.weights is not None and (self.learned_grid is None or self.latent != self.width):
            raise ValueError(
                f"weights need learned_grid, the img_size of their ViT over patch={self.patch}, and latent={self.latent} "
                f"to be its width, {self.width}"
            )


class ViT3D(nn.Module):
    """Encodes crops [V, C, X, Y, Z] of voxels in 0..1 to latents. A new one begins as if they were centred, to -1..1;
    the weights of a MONAI ViT read them as they come, so its own intensities are those to give it.

    Fixed places are sines and cosines of a token's index, the same in every grid. Learned places are resampled to
    other grids (trilinear), so they tell where in the crop a token lies, whatever the crop's size. A MONAI
    TransformerBlock is used without dropout: with its fused attention, dropout would stay on in eval mode.
    """

    def __init__(self, config: ViT3DConfig) -> None:
        super().__init__()
        from monai.networks.blocks.transformerblock import TransformerBlock

        self.config = config
        self.embed = nn.Linear(config.channels * config.patch**3, config.width)
        with torch.no_grad():  # w (2x - 1) + b
            self.embed.bias.sub_(self.embed.weight.sum(dim=1))
            self.embed.weight.mul_(2)
        self.blocks = nn.ModuleList()
        for _ in range(config.depth):
            block = TransformerBlock(config.width, config.ffn, config.heads, qkv_bias=True, use_flash_attention=True)
            del block.norm_cross_attn  # never called; its parameters would get no gradient
            self.blocks.append(block)
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.latent)
        self.pool = scan_pool(config.pool, config.latent)
        if config.learned_grid is not None:
            x, y, z = config.learned_grid
            self.place = nn.Parameter(0.02 * torch.randn(1, x * y * z, config.width))
        if config.registers:
            self.register = nn.Parameter(0.02 * torch.randn(1, config.registers, config.width))

    @property
    def width(self) -> int:
        """Latent width."""
        return self.config.latent

    def grid(self, voxels: Tensor) -> tuple[int, int, int]:
        """Tokens along each axis for crops [V, C, X, Y, Z]. Raises ValueError if the patch does not divide an edge."""
        edges = tuple(voxels.shape[2:])
        if any(edge % self.config.patch for edge in edges):
            raise ValueError(f"crop {edges} is not a multiple of patch={self.config.patch}")
        x, y, z = (edge // self.config.patch for edge in edges)
        return x, y, z

    def places_mm(self, voxels: Tensor, spacing_mm: Tensor) -> Tensor:
        """Centres [V, N, 3] of all tokens of crops with ``spacing_mm`` [V, 3], in mm from the first voxel's centre."""
        return token_places_mm(self.grid(voxels), (self.config.patch,) * 3, spacing_mm)

    def tokens(self, voxels: Tensor, keep: Tensor | None = None) -> Tensor:
        """Token latents [V, K, latent] of the kept places (all of them: keep=None), in the order of ``keep``."""
        return self.head(self.hidden_states(voxels, keep))

    def hidden_states(self, voxels: Tensor, keep: Tensor | None = None) -> Tensor:
        """The transformer's normalised output [V, K, width] at the kept places, without the registers.

        Raises Refusal ENCODER_INPUT for another number of channels than the config's.
        """
        check_channels(voxels, self.config.channels)
        grid, p = self.grid(voxels), self.config.patch
        voxels = plain_tensor(voxels)
        patches = voxels.reshape(*voxels.shape[:2], grid[0], p, grid[1], p, grid[2], p)
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(len(voxels), -1, self.embed.in_features)
        place = self._places(grid).expand(len(voxels), -1, -1)
        if keep is not None:
            patches = patches.gather(1, keep[:, :, None].expand(-1, -1, patches.shape[2]))
            place = place.gather(1, keep[:, :, None].expand(-1, -1, self.config.width))
        hidden = self.embed(patches) + place
        if self.config.registers:
            hidden = torch.cat([self.register.expand(len(voxels), -1, -1), hidden], dim=1)
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden[:, self.config.registers :])

    def _places(self, grid: tuple[int, int, int]) -> Tensor:
        """Code [1, N, width] of the places of a token grid in raster order."""
        trained = self.config.learned_grid
        if trained is None:
            return sincos_places(grid, self.config.width, self.embed.weight.device)
        if grid == trained:
            return self.place
        volume = self.place.unflatten(1, trained).movedim(-1, 1)
        return F.interpolate(volume, size=grid, mode="trilinear").flatten(2).transpose(1, 2)

    def forward(self, view: VolumeView) -> Tensor:
        """Latents [rows, latent] of a view: the pooled tokens of each crop, or every kept token."""
        tokens = self.tokens(view.voxels, view.keep)
        return self.pool(tokens) if view.read == "cell" else tokens.flatten(0, 1)


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


def check_channels(voxels: Tensor, wanted: int) -> None:
    """Raises Refusal ENCODER_INPUT for crops that are not [V, wanted, X, Y, Z]."""
    if voxels.ndim != 5 or voxels.shape[1] != wanted:
        raise Refusal(
            "ENCODER_INPUT",
            f"crops of shape {list(voxels.shape)}, want [V, {wanted}, X, Y, Z]",
            "Channels are windows: give as many as the encoder was made for (vit3d: channels; slices25d: one)",
        )


def plain_tensor(voxels: Tensor) -> Tensor:
    """The same memory as a plain tensor: MONAI's MetaTensor would survive every layer, and slow it down."""
    return voxels if type(voxels) is Tensor else voxels.as_subclass(Tensor)


def token_places_mm(grid: tuple[int, int, int], token: tuple[int, int, int], spacing_mm: Tensor) -> Tensor:
    """Centres [V, N, 3] of the tokens of a grid in raster order, in mm along x, y, z from the first voxel's centre.

    token: voxels along each axis. spacing_mm: [V, 3], of each crop.
    """
    axes = [(torch.arange(n, device=spacing_mm.device) + 0.5) * size - 0.5 for n, size in zip(grid, token, strict=True)]
    return torch.cartesian_prod(*axes) * spacing_mm[:, None, :]
