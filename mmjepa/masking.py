"""What is hidden: cells (a modality at a date), places in a volume, the future.

Every draw is a pure function of its arguments and a numpy generator keyed by (seed, epoch, subject); batch size, workers
and ranks never decide anything. The sampling rules are our reconstruction of arXiv 2509.15470.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, get_args

import numpy as np

Mode = Literal["cross_modal", "temporal", "random_cells", "patches", "events"]
MODES: tuple[Mode, ...] = get_args(Mode)
WITHIN = ("patches", "events")
MODALITIES = ("ct", "ehr")
PatchSampler = Literal["equal_blocks", "varied_blocks", "subset"]
Grid = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class CellMaskConfig:
    """probability: of each mode, re-normalised over the modes that a subject allows. hide: least and largest share of
    the cells that ``random_cells`` hides."""

    probability: dict[str, float] = field(
        default_factory=lambda: {
            "cross_modal": 0.5,
            "temporal": 0.3,
            "random_cells": 0.2,
            "patches": 0.0,
            "events": 0.0,
        }
    )
    hide: tuple[float, float] = (0.3, 0.5)

    def __post_init__(self) -> None:
        unknown = set(self.probability) - set(MODES)
        if unknown:
            raise ValueError(f"probability names the unknown mode {sorted(unknown)[0]!r}; the modes are {MODES}")
        if not all(0 <= share < float("inf") for share in self.probability.values()):
            raise ValueError(f"probability={self.probability} holds a share that is negative or no number")
        if not 0 < self.hide[0] <= self.hide[1] < 1:
            raise ValueError(f"hide={self.hide} must satisfy 0 < least <= largest < 1")


@dataclass(frozen=True, kw_only=True)
class PatchMaskConfig:
    """What of a volume's token grid is hidden, and what stays visible.

    sampler: ``equal_blocks`` hides blocks of one size; ``varied_blocks`` draws the size and the aspect of each block;
    ``subset`` hides single places at random, as many as equal blocks without overlap would.
    blocks: how many blocks (they may overlap). block: edge of an equal block as a share of the grid's edge.
    scale, aspect: of varied blocks, the least and largest share of the grid that one takes, and the largest ratio
    between two of its edges, each edge a share of the grid's.
    visible: share of the whole grid that stays visible, drawn at random from what is not hidden.
    """

    sampler: PatchSampler = "equal_blocks"
    block: float = 0.5
    blocks: int = 2
    scale: tuple[float, float] = (0.1, 0.2)
    aspect: float = 1.5
    visible: float = 0.25

    def __post_init__(self) -> None:
        if self.sampler not in get_args(PatchSampler):
            raise ValueError(f"sampler={self.sampler!r} is none of {get_args(PatchSampler)}")
        if not 0 < self.block < 1 or not 0 < self.visible < 1 or self.blocks < 1:
            raise ValueError(
                f"block={self.block} and visible={self.visible} lie in (0, 1) and blocks={self.blocks} >= 1"
            )
        if not 0 < self.scale[0] <= self.scale[1] < 1:
            raise ValueError(f"scale={self.scale} must satisfy 0 < least <= largest < 1")
        if not 1 <= self.aspect < float("inf"):
            raise ValueError(f"aspect={self.aspect} must be a number from 1 on")


@dataclass(frozen=True)
class CellMask:
    """context, target: bool [T, 2] over (date, modality in MODALITIES); disjoint, both subsets of what is present."""

    mode: Mode
    context: np.ndarray
    target: np.ndarray


def feasible(present: np.ndarray) -> list[Mode]:
    """The modes that a subject's cells allow. present: bool [T, 2]."""
    modes: list[Mode] = []
    if present.any(axis=0).all():
        modes.append("cross_modal")
    if present.any(axis=1).sum() >= 2:
        modes.append("temporal")
    if present.sum() >= 3:
        modes.append("random_cells")
    if present[:, 0].any():
        modes.append("patches")
    if present[:, 1].any():
        modes.append("events")
    return modes


def draw_cells(present: np.ndarray, rng: np.random.Generator, config: CellMaskConfig) -> CellMask | None:
    """Draw a mode, then what it hides. None if no mode of positive probability is feasible.

    ``patches`` and ``events`` hide inside one cell, and every cell is context for the caller to choose from. A subject
    with a single cell, whom no other mode fits, is used by them even where their probability is 0.
    """
    modes = feasible(present)
    weights = np.array([config.probability.get(mode, 0.0) for mode in modes])
    if present.sum() == 1:
        weights = np.ones(1)
    if weights.sum() <= 0:
        return None
    mode = modes[int(rng.choice(len(modes), p=weights / weights.sum()))]
    if mode in WITHIN:
        return CellMask(mode, present.copy(), np.zeros_like(present))
    draw = {"cross_modal": _cross_modal, "temporal": _temporal, "random_cells": _random_cells}[mode]
    target = draw(present, rng, config) & present
    return CellMask(mode, present & ~target, target)


def _cross_modal(present: np.ndarray, rng: np.random.Generator, config: CellMaskConfig) -> np.ndarray:
    """All cells of one modality, on every date (half the time) or on one date."""
    target = np.zeros_like(present)
    modality = int(rng.integers(2))
    dates = np.flatnonzero(present[:, modality])
    target[dates if rng.random() < 0.5 else rng.choice(dates), modality] = True
    return target


def _temporal(present: np.ndarray, rng: np.random.Generator, config: CellMaskConfig) -> np.ndarray:
    """Both modalities of one date; the last date half of the time, which is forecasting."""
    target = np.zeros_like(present)
    dates = np.flatnonzero(present.any(axis=1))
    target[dates[-1] if rng.random() < 0.5 else rng.choice(dates[:-1])] = True
    return target


def _random_cells(present: np.ndarray, rng: np.random.Generator, config: CellMaskConfig) -> np.ndarray:
    """A share of all present cells."""
    cells = np.flatnonzero(present.ravel())
    hidden = int(np.clip(round(rng.uniform(*config.hide) * len(cells)), 1, len(cells) - 1))
    target = np.zeros(present.size, dtype=bool)
    target[rng.permutation(cells)[:hidden]] = True
    return target.reshape(present.shape)


def visible_count(grid: Grid, config: PatchMaskConfig) -> int:
    """How many tokens stay visible: the same for every draw, so that a batch of masked volumes is rectangular."""
    return max(1, round(config.visible * math.prod(grid)))


@lru_cache(maxsize=64)
def block_shapes(grid: Grid, config: PatchMaskConfig) -> tuple[Grid, ...]:
    """The block shapes, in tokens, that a draw chooses from with equal chances.

    One for equal blocks (and for ``subset``, which hides as much). For varied blocks all whose share of the grid lies in
    ``scale`` and whose edges, as shares of the grid's, differ by ``aspect`` at most; an axis of one token, which no block
    can divide, does not count. Raises ValueError if there is none.
    """
    if config.sampler != "varied_blocks":
        x, y, z = (max(1, round(config.block * n)) for n in grid)
        return ((x, y, z),)
    shapes = np.stack(np.meshgrid(*(np.arange(1, n + 1) for n in grid), indexing="ij"), axis=-1).reshape(-1, 3)
    edges = shapes / np.array(grid)
    divided = edges[:, np.array(grid) > 1]
    share, ratio = edges.prod(axis=1), divided.max(axis=1, initial=0) / divided.min(axis=1, initial=1)
    slack = 1e-9  # 3/4 over 1/2 is an aspect of 1.5
    low, high = config.scale
    fits = (share >= low - slack) & (share <= high + slack) & (ratio <= config.aspect + slack)
    if not fits.any():
        raise ValueError(
            f"no block of a {grid} grid takes a share of it in scale={config.scale} within aspect={config.aspect}; "
            "widen scale or aspect"
        )
    return tuple((x, y, z) for x, y, z in shapes[fits].tolist())


def most_hidden(grid: Grid, config: PatchMaskConfig) -> int:
    """How many tokens the largest blocks hide where none overlap."""
    return config.blocks * max(map(math.prod, block_shapes(grid, config)))


def check_patches(grid: Grid, config: PatchMaskConfig) -> None:
    """Whether every draw leaves enough tokens visible and every token is visible in some draw.

    Raises ValueError if blocks that do not overlap hide too much, if every block covers the grid's centre, or if no
    block fits ``scale`` and ``aspect``.
    """
    hidden, tokens = most_hidden(grid, config), math.prod(grid)
    if tokens - hidden < visible_count(grid, config):
        raise ValueError(
            f"blocks may hide {hidden} of {tokens} tokens and {visible_count(grid, config)} should stay visible; "
            f"lower {'scale' if config.sampler == 'varied_blocks' else 'block'}, blocks or visible"
        )
    covered = all(2 * b > n for edges in block_shapes(grid, config) for b, n in zip(edges, grid, strict=True))
    if covered and config.sampler != "subset":
        raise ValueError(f"every block covers the centre of a {grid} grid, which would never be visible; hide less")


def draw_patches(grid: Grid, rng: np.random.Generator, config: PatchMaskConfig) -> tuple[np.ndarray, np.ndarray]:
    """Visible and target places of a token grid: int64 [K] and int64 [M], ascending raster indices, disjoint.

    K is the same for every draw; M differs where blocks overlap or vary, and is never cut. Raises ValueError if fewer
    than K places lie outside the targets.
    """
    if config.sampler == "subset":
        hidden = np.zeros(math.prod(grid), dtype=bool)
        hidden[subsample(np.arange(hidden.size), most_hidden(grid, config), rng)] = True
    else:
        hidden = _blocks(grid, rng, config).ravel()
    outside = np.flatnonzero(~hidden)
    keep = visible_count(grid, config)
    if keep > len(outside):
        raise ValueError(
            f"{keep} tokens should stay visible but only {len(outside)} lie outside the blocks; lower visible"
        )
    return subsample(outside, keep, rng), np.flatnonzero(hidden)


def _blocks(grid: Grid, rng: np.random.Generator, config: PatchMaskConfig) -> np.ndarray:
    """Union of the blocks, bool [X, Y, Z]. Starts are uniform over 0..n-b inclusive."""
    shapes = block_shapes(grid, config)
    hidden = np.zeros(grid, dtype=bool)
    for _ in range(config.blocks):
        edges = shapes[int(rng.integers(len(shapes)))]
        start = [int(rng.integers(n - b + 1)) for n, b in zip(grid, edges, strict=True)]
        hidden[tuple(slice(s, s + b) for s, b in zip(start, edges, strict=True))] = True
    return hidden


def subsample(places: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """``size`` of the places, each equally likely, ascending. How ragged sets reach a common size: a prefix in raster
    order would blind the model to the last slices."""
    return np.sort(rng.permutation(places)[:size])


def draw_events(count: int, rng: np.random.Generator, visible: float = 0.5) -> np.ndarray:
    """Which of an EHR cell's events stay visible: bool [count], a random share, at least one on either side.

    Raises ValueError for fewer than two events.
    """
    if count < 2:
        raise ValueError("one event cannot be split into a visible and a hidden part")
    shown = np.zeros(count, dtype=bool)
    shown[rng.permutation(count)[: int(np.clip(round(visible * count), 1, count - 1))]] = True
    return shown


def draw_rollout_start(hours: int, rng: np.random.Generator) -> int:
    """First hour (0-based) of a two-step training rollout: uniform on 1..hours-3; -1 if the window is shorter than 4."""
    return int(rng.integers(1, hours - 2)) if hours >= 4 else -1
