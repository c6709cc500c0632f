"""Radiological signs of the sparse concepts that images show: the first twelve at the nodule, the others elsewhere.

A sign is a few soft-edged primitives about an anchor, in textbook densities and round figures; their places and size vary from
subject to subject.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from synthetic.draws import Array
from synthetic.scanner import Grid

_EDGE_MM = 0.35
_CORNER_MM, _WALL_MM = 11.0, 4.0
_ENDLESS_MM = 120.0  # longer than the diagonal of a 64 mm patch
_MOST = 8  # primitives of one part
_OUTWARD = np.array([[0.0, -1, 0], [-1, 0, 0], [1, 0, 0]])  # to the back, left and right


@dataclass(frozen=True, kw_only=True)
class Part:
    """``count`` primitives of one density. Lengths are (mm, plus this share of the nodule's radius).

    shape: ``ball``, ``shell`` (a ball's wall) or ``tube`` (a cylinder along the sign's direction; a flat one is a plate).
    radius: of the ball, of the wall's middle, of the tube. length: of the tube; the wall's thickness. away: from the anchor to
    the primitive's centre, along the sign's direction for the first and anywhere for the others. aside: beside that direction.
    over: only where denser than what is there (else it replaces that).
    """

    shape: str
    hu: float
    radius: tuple[float, float]
    length: tuple[float, float] = (0, 0)
    away: tuple[float, float] = (0, 0)
    aside_mm: float = 0
    count: int = 1
    over: bool = False


def _ball(hu: float, radius: tuple[float, float], away: tuple[float, float] = (0, 0), count: int = 1) -> Part:
    return Part(shape="ball", hu=hu, radius=radius, away=away, count=count)


def _hole(radius_mm: float, wall_hu: float, away_mm: float = 0, count: int = 1) -> tuple[Part, Part]:
    """Air in a thin wall."""
    where = {"radius": (radius_mm, 0), "away": (away_mm, 0), "count": count}
    air = Part(shape="ball", hu=-980, **where)
    return air, Part(shape="shell", hu=wall_hu, length=(0.9, 0), over=True, **where)


def _added(hu: float, shape: str, radius_mm: float, length_mm: float = 0, away: tuple[float, float] = (0, 0)) -> Part:
    return Part(shape=shape, hu=hu, radius=(radius_mm, 0), length=(length_mm, 0), away=away, over=True)


_BEYOND = _added(12, "tube", _ENDLESS_MM, _ENDLESS_MM, (_ENDLESS_MM / 2, 0))  # all that lies outside a wall
_AT_NODULE: dict[str, tuple[Part, ...]] = {
    "central_calcification": (_ball(400, (0.6, 0.3)),),
    "eccentric_calcification": (_ball(400, (0.5, 0.2), (0, 0.55)),),
    "popcorn_calcification": (_ball(300, (0.4, 0.15), (0, 0.6), 6),),
    "fat": (_ball(-90, (0.4, 0.4), (0, 0.3)),),
    "cavity": (_ball(-980, (0, 0.55), (0, 0.15)),),
    "halo": (Part(shape="ball", hu=-600, radius=(2, 1.2), over=True),),
    "satellite_nodule": (Part(shape="ball", hu=20, radius=(2.4, 0), away=(6, 1), count=3, over=True),),
    "air_bronchogram": (Part(shape="tube", hu=-900, radius=(0.8, 0.05), length=(0, 2), count=2),),
    "pleural_tag": (_added(0, "tube", 0.8, 14, (7, 0.8)),),
    "feeding_vessel": (_added(40, "tube", 1.6, 24, (12, 0.8)),),
    "bubble_lucency": (_ball(-880, (0.5, 0.13), (0, 0.5), 3),),
    "septal_line": (_added(-200, "tube", 7, 0.9, (3, 1)), _added(-200, "tube", 7, 0.9, (6, 1))),
}
_AT_WALL: dict[str, tuple[Part, ...]] = {
    "pleural_effusion": (_BEYOND,),
    "pleural_plaque": (_BEYOND, _added(700, "tube", 8, 2.5)),
}
_AT_CORNER: dict[str, tuple[Part, ...]] = {
    "surgical_clip": (_added(8000, "tube", 0.8, 6),),
    "cyst": _hole(4, -400),
    "bronchiectasis": (
        _added(-50, "tube", 3.2, 18),
        Part(shape="tube", hu=-980, radius=(2.1, 0), length=(18, 0)),
        Part(shape="tube", hu=40, radius=(1.4, 0), length=(18, 0), aside_mm=4.4, over=True),
    ),
    "consolidation": (
        _added(30, "ball", 7.5),
        Part(shape="tube", hu=-900, radius=(0.9, 0), length=(10, 0), count=2),
    ),
    "atelectasis": (_added(30, "tube", 11, 3),),
    "granuloma": (_added(600, "ball", 2.2),),
    "honeycombing": _hole(2, -200, 6, _MOST),
    "bulla": _hole(8, -550),
    "lymph_node": (_added(50, "ball", 3.8), _ball(-70, (1.3, 0), (1.5, 0))),
    "wire": (_added(8000, "tube", 0.7, _ENDLESS_MM),),
}
_PARTS = _AT_NODULE | _AT_WALL | _AT_CORNER
NAMES = tuple(_PARTS)  # in the order of ``synthetic.concepts.IN_IMAGE``


def draw(volume: Array, grid: Grid, name: str, nodule_mm: Array, radius_mm: float, draw: np.random.Generator) -> None:
    """Add one sign to a volume (HU, float32). nodule_mm [3]: centre of the nodule of that radius."""
    jitter, size = draw.uniform(-1, 1, 3), draw.uniform(0.85, 1.15)
    ways = draw.standard_normal((_MOST, 3))
    ways /= np.linalg.norm(ways, axis=1, keepdims=True)
    ways[1:] *= draw.uniform(0.6, 1, (_MOST - 1, 1))
    if name in _AT_NODULE:
        anchor = nodule_mm
    elif name in _AT_CORNER:
        anchor = draw.choice([-1, 1], 3) * np.minimum(_CORNER_MM, grid.half_mm - 3) + jitter
    else:
        ways[0] = _OUTWARD[draw.integers(len(_OUTWARD))]
        anchor = ways[0] * (grid.half_mm - _WALL_MM + jitter) + 4 * jitter * (ways[0] == 0)
    for part in _PARTS[name]:
        length, away, radius = (mm + share * radius_mm for mm, share in (part.length, part.away, part.radius))
        for way in ways[: part.count]:
            _paint(volume, grid, part, anchor + away * way, way / np.linalg.norm(way), size * radius, length)


def _paint(volume: Array, grid: Grid, part: Part, centre: Array, along: Array, radius: float, length: float) -> None:
    soft = _EDGE_MM * grid.softness
    reach = radius + length if part.shape != "tube" else np.hypot(radius + part.aside_mm, length / 2)
    box, (x, y, z) = grid.near(centre, reach + 6 * soft)
    if part.shape == "tube":
        ahead = x * along[0] + y * along[1] + z * along[2]
        aside = np.cross(along, np.roll(along, 1))
        aside *= part.aside_mm / np.linalg.norm(aside)
        square = (x - aside[0]) ** 2 + (y - aside[1]) ** 2 + (z - aside[2]) ** 2
        depth = np.minimum(radius - np.sqrt(np.maximum(square - ahead**2, 0)), length / 2 - np.abs(ahead))
    else:
        depth = radius - np.sqrt(x**2 + y**2 + z**2)
        depth = length / 2 - np.abs(depth) if part.shape == "shell" else depth
    change = (part.hu - volume[box]) * expit(depth / soft)
    volume[box] += np.maximum(change, 0) if part.over else change
