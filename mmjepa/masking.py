"""What is hidden: cells (a modality at a date), places in a volume, the future.

Every draw is a pure function of its arguments and a numpy generator keyed by (seed, epoch, subject); batch size, workers
and ranks never decide anything. The sampling rules are our reconstruction of arXiv 2509.15470.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

Mode = Literal["cross_modal", "temporal", "random_cells", "patches", "events"]
MODES: tuple[Mode, ...] = get_args(Mode)
WITHIN = ("patches", "events")
MODALITIES = ("ct", "ehr")


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
    """block: edge of a target block as a share of the token grid's edge. blocks: how many blocks (they may overlap).
    visible: share of the whole grid that stays visible, drawn at random outside the blocks."""

    block: float = 0.5
    blocks: int = 2
    visible: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.block < 1 or not 0 < self.visible < 1 or self.blocks < 1:
            raise ValueError(
                f"block={self.block} and visible={self.visible} lie in (0, 1) and blocks={self.blocks} >= 1"
            )


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


def visible_count(grid: tuple[int, int, int], config: PatchMaskConfig) -> int:
    """How many tokens stay visible: the same for every draw, so that a batch of masked volumes is rectangular."""
    return max(1, round(config.visible * int(np.prod(grid))))


def check_patches(grid: tuple[int, int, int], config: PatchMaskConfig) -> None:
    """Whether every draw leaves enough tokens visible. Raises ValueError if blocks that do not overlap hide too much."""
    hidden = config.blocks * int(np.prod([max(1, round(config.block * n)) for n in grid]))
    left = int(np.prod(grid)) - hidden
    if left < visible_count(grid, config):
        raise ValueError(
            f"blocks may hide {hidden} of {int(np.prod(grid))} tokens and {visible_count(grid, config)} should stay visible; "
            "lower block, blocks or visible"
        )


def draw_patches(
    grid: tuple[int, int, int], rng: np.random.Generator, config: PatchMaskConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Visible and target places of a token grid: int64 [K] and int64 [M], raster indices, disjoint.

    Block starts are uniform over 0..n-b inclusive. The visible ones are a random subset of what lies outside the blocks
    (never a prefix in raster order, which would blind the model to the last slices).
    """
    edges = [max(1, round(config.block * n)) for n in grid]
    hidden = np.zeros(grid, dtype=bool)
    for _ in range(config.blocks):
        start = [int(rng.integers(n - b + 1)) for n, b in zip(grid, edges, strict=True)]
        hidden[tuple(slice(s, s + b) for s, b in zip(start, edges, strict=True))] = True
    outside = np.flatnonzero(~hidden)
    keep = visible_count(grid, config)
    if keep > len(outside):
        raise ValueError(
            f"{keep} tokens should stay visible but only {len(outside)} lie outside the blocks; lower visible"
        )
    return np.sort(rng.permutation(outside)[:keep]), np.flatnonzero(hidden)


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
