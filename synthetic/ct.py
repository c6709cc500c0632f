"""CT patch of one lung nodule: readout t_image plus label-free noise to int16 Hounsfield units.

``parameters`` links the readout to named physical quantities; ``render`` turns one row of them into a volume [X, Y, Z] in
RAS+, 1 mm across and ``voxel_mm`` in the plane. Anatomy is fixed per subject: of a later scan's row only ``diameter_mm``
differs, and the noise is fresh. The protocol (contrast, slice thickness, kernel) is static over a subject's scans and never
touches the nodule's shape. Lengths are physical: a larger patch shows the same nodule and the same vessels about it, more
vessels around those, and lung of the same density and texture (another draw of it).
"""

import numpy as np
import pandas as pd
from scipy.special import expit, ndtr

from synthetic import scanner, signs
from synthetic.draws import Array, generator
from synthetic.presets import Site
from synthetic.scanner import KERNELS, SIZES, Grid

SIZE = SIZES[0]
_LOBES, _SPICULES, _MOST_VESSELS = 6, 14, 6
_HALVED_MM = 40.0  # a vessel's radius halves along this way
_CORE = np.float32(0.6)  # radius of a nodule's core over its own
_EDGES = 2.1  # mm beyond a tube's wall that its soft edge reaches
_FARTHEST = 8.0  # sd of a readout beyond which noise alone would swell vessels over the patch
_CORE_MM = 14.0  # vessels of the smallest patch pass within about this distance of its centre


def parameters(t: Array, names: list[str], protocol: Array, site: Site, concepts: Array) -> pd.DataFrame:
    """Physical quantities of n patches, one row each; ``signs`` holds the names of a subject's signs.

    t: [n, q] image readout whose coordinates are ``names``. protocol: [n, 3] uniforms of each subject's scan protocol, from
    which the site's acquisition knobs make contrast, slice thickness and kernel. concepts: [n, 24] bool, the image columns
    (``synthetic.concepts.IN_IMAGE``) of the sparse concepts.
    """
    at = {name: np.clip(t[:, j], -_FARTHEST, _FARTHEST) for j, name in enumerate(names)}
    pathway = expit(1.5 * at["c1"])
    noise = np.exp(0.15 * at["b2"] - 0.15 * at["c1"])
    return pd.DataFrame(
        {
            "diameter_mm": np.clip(np.exp(np.log(9) + 0.35 * at["u_image2"]), 4, 22),
            "spiculation": expit(at["u_image1"]),
            "lobulation": 0.25 * expit(at["n_image1"]),
            "ground_glass": expit(at["s2"] - 1.5),
            "emphysema": ndtr(at["s1"]) / 2,
            "elongation": 1 + 0.4 * expit(at["n_image2"]),
            "offset_x_mm": 2.5 * np.tanh(at["n_image3"] / 2),
            "offset_y_mm": 2.5 * np.tanh(at["n_image4"] / 2),
            "offset_z_mm": 2.5 * np.tanh(at["n_image5"] / 2),
            "upper_lobe": at["n_image5"] > 0,
            "density_hu": 12 * at["b1"],
            "vessels": 2 + np.minimum(np.floor(5 * ndtr(at["n_image6"])), _MOST_VESSELS - 2).astype(np.int64),
            "texture_hu": 25 * np.exp(0.15 * at["n_image7"]),
            "vessel_factor": np.exp(0.15 * at["n_image8"]),
            "noise_factor": noise if site.noise_image == 1 else noise * site.noise_image,
            "contrast": protocol[:, 0] < pathway,
            "thickness_mm": np.where(protocol[:, 1] < pathway, 1.0, site.thick_mm),
            "kernel": np.array(KERNELS)[np.searchsorted(np.cumsum(site.kernel_mix)[:2], protocol[:, 2])],
            "gain": site.gain,
            "hu_bias": site.hu_bias,
            "cup_hu": site.cup_hu,
            "voxel_mm": site.voxel_mm,
            "signs": [tuple(name for name, has in zip(signs.NAMES, row, strict=True) if has) for row in concepts],
        }
    )


def render(row: dict, seed: int, subject: int, scan: int = 0, size: int = SIZE) -> Array:
    """One patch, int16 HU [size, size, size] in RAS+. row: one record of ``parameters``; size: one of ``SIZES``."""
    return np.rint(np.clip(_measured(row, seed, subject, scan, size), -1024, 3071)).astype(np.int16)


def _measured(row: dict, seed: int, subject: int, scan: int, size: int) -> Array:
    """What the scanner measures in HU, before it is rounded."""
    grid = scanner.grid(size, row["voxel_mm"])
    volume = _lung(grid, row, generator(seed, "ct/lung", subject))
    _add_vessels(volume, grid, row, generator(seed, "ct/vessels", subject))
    _add_nodule(volume, grid, row, generator(seed, "ct/nodule", subject))
    for name in row["signs"]:
        signs.draw(
            volume, grid, name, _centre(row), row["diameter_mm"] / 2, generator(seed, f"ct/sign/{name}", subject)
        )
    noise = scanner.white(grid, generator(seed, f"ct/noise/{scan}", subject))
    protocol = row["kernel"], row["thickness_mm"], row["gain"]
    measured = scanner.scan(volume, grid, *protocol, noise, row["noise_factor"])
    if row["hu_bias"]:
        measured += np.float32(row["hu_bias"])
    if row["cup_hu"]:
        x, y, _ = grid.axes_mm
        plane = x[:, None, None] ** 2 + y[None, :, None] ** 2
        measured += grid.crop(np.broadcast_to(plane, grid.shape)) * np.float32(row["cup_hu"] / 16**2)
    return measured


def _centre(row: dict) -> Array:
    return np.array([row["offset_x_mm"], row["offset_y_mm"], row["offset_z_mm"]], np.float32)


def _lung(grid: Grid, row: dict, draw: np.random.Generator) -> Array:
    """Parenchyma with texture, and emphysema holes that grow in number with its extent."""
    texture, holes = scanner.field(grid, draw, 3.0), scanner.field(grid, draw, 3.5)
    emphysema = row["emphysema"]
    volume = texture * np.float32(row["texture_hu"])
    volume += np.float32(-860 - 60 * emphysema + row["density_hu"])
    volume[holes > 1.6 - 1.6 * emphysema] = -960
    return volume


def _add_vessels(volume: Array, grid: Grid, row: dict, draw: np.random.Generator) -> None:
    """Curved tubes that taper and give off two branches each; contrast raises them by 150 HU.

    ``row["vessels"]`` of them cross the smallest patch. A larger one has more, which pass it by further out; their number grows
    with the square of the patch's width, as that of straight lines does.
    """
    depth = np.full(grid.shape, -np.inf, np.float32)
    factor = row["vessel_factor"]
    core = draw.uniform(-12, 12, (_MOST_VESSELS, 3))
    _add_trees(depth, grid, core, _unit(draw, _MOST_VESSELS), factor, draw, row["vessels"])
    wide = max(grid.half_mm) / (SIZE / 2)
    more = round(row["vessels"] * (wide**2 - 1))
    if more > 0:
        along = _unit(draw, more)
        away = np.cross(along, _unit(draw, more))
        away /= np.linalg.norm(away, axis=1, keepdims=True)
        away *= _CORE_MM * np.sqrt(draw.uniform(1, wide**2, (more, 1)))
        _add_trees(depth, grid, away, along, factor, draw, more)
    edge = 0.35 * grid.softness
    near = depth > -_EDGES * grid.softness
    volume[near] += (30.0 + 150.0 * row["contrast"] - volume[near]) * expit(depth[near] / np.float32(edge))


def _add_trees(
    depth: Array, grid: Grid, through: Array, along: Array, factor: float, draw: np.random.Generator, count: int
) -> None:
    """Raise ``depth``, mm inside a vessel, by the first ``count`` vessels that pass [m, 3] ``through`` and run ``along``."""
    radii = draw.uniform(0.7, 1.8, len(through)) * factor
    bends = draw.standard_normal((len(through), 3)) / 60  # per mm
    bends[np.arange(len(through)), np.abs(along).argmax(1)] = 0  # a tube is a function of its main axis
    forks = draw.uniform(-12, 12, (len(through), 2))
    turns = 0.8 * draw.standard_normal((len(through), 2, 3))
    for k in range(count):
        _add_tube(depth, grid, through[k], along[k], bends[k], radii[k], -np.inf)
        for s, turn in zip(forks[k], turns[k], strict=True):
            side = along[k] + turn
            fork = through[k] + s * along[k] + s**2 / 2 * bends[k]
            _add_tube(
                depth, grid, fork, side / np.linalg.norm(side), bends[k], 0.7 * radii[k] * 2 ** (-s / _HALVED_MM), 0
            )


def _add_tube(
    depth: Array, grid: Grid, start: Array, along: Array, bend: Array, radius_mm: float, first_mm: float
) -> None:
    """One tube from ``first_mm`` beyond ``start`` onwards, cut by cut across its main axis."""
    a = int(np.abs(along).argmax())
    others = [i for i in range(3) if i != a]
    s = (grid.axes_mm[a] - start[a]) / along[a]
    cuts = np.nonzero(s >= first_mm)[0]
    s = s[cuts]
    radius = (radius_mm * 2 ** (-s / _HALVED_MM)).astype(np.float32)
    tilts = [((along[b] + bend[b] * s) / along[a]).astype(np.float32) for b in others]
    stretch = np.sqrt(1 + tilts[0] ** 2 + tilts[1] ** 2)
    reach = ((radius + np.float32(_EDGES * grid.softness)) * stretch).max(initial=0)
    away, at, inside = [], [], []
    for b in others:
        centre = start[b] + along[b] * s + bend[b] / 2 * s**2
        mm, first = grid.spacing_mm[b], grid.axes_mm[b][0]
        index = np.rint((centre - first) / mm).astype(np.int64)[:, None] + _window(int(reach / mm) + 1)
        away.append((index * mm + first - centre[:, None]).astype(np.float32))
        at.append(index * _stride(grid, b))
        inside.append((index >= 0) & (index < grid.shape[b]))
    (x, y), (t, u) = away, tilts
    along_tube = ((x * t[:, None])[:, :, None] + (y * u[:, None])[:, None, :]) / stretch[:, None, None]
    square = (x**2)[:, :, None] + (y**2)[:, None, :] - along_tube**2
    near = square < ((radius + np.float32(_EDGES * grid.softness)) ** 2)[:, None, None]
    near &= inside[0][:, :, None] & inside[1][:, None, :]
    i, j, k = np.nonzero(near)
    voxels = (cuts * _stride(grid, a))[i] + at[0][i, j] + at[1][i, k]
    value = radius[i] - np.sqrt(np.maximum(square[near], 0))
    flat = depth.reshape(-1)
    flat[voxels] = np.maximum(flat[voxels], value)


def _add_nodule(volume: Array, grid: Grid, row: dict, draw: np.random.Generator) -> None:
    """A lobulated, spiculated ellipsoid from 20 HU (solid) to -550 HU (ground glass), denser in the middle when part-solid.

    Vessels that are denser than the nodule show through its ground glass.
    """
    weights = 3 * draw.standard_normal(_LOBES, dtype=np.float32) / np.float32(np.sqrt(_LOBES))
    lobes, spicules, flat = _unit(draw, _LOBES), _unit(draw, _SPICULES), _unit(draw, 1)[0]
    half, stretch = np.float32(row["diameter_mm"] / 2), np.float32(row["elongation"])
    lobulation = np.float32(row["lobulation"])
    spiculation = np.float32(row["spiculation"] * (0.4 + 1.2 / half))
    sharp = 12 * half  # spicules thicken less than the nodule grows

    def shape(n: Array) -> Array:
        """Radius over the mean one in directions n, [m, 3]."""
        bumps = ((1 + n @ lobes.T) / 2) ** 8 - np.float32(1 / 9)
        return 1 + lobulation * (bumps @ weights) + spiculation * np.exp(sharp * (n @ spicules.T - 1)).sum(1)

    soft = np.float32(0.6 * grid.softness)
    reach = 1.05 * half * max(np.float32(1), shape(np.concatenate([lobes, spicules])).max()) + 6 * soft
    box, (x, y, z) = grid.near(_centre(row), float(reach * np.sqrt(stretch)))
    # flattened by the stretch along one direction, drawn out by its root across it: the volume stays
    along = x * flat[0] + y * flat[1] + z * flat[2]
    rr = np.sqrt((x * x + y * y + z * z) / stretch + along * along * (stretch * stretch - 1 / stretch))
    near = np.nonzero(rr < reach)
    rr = rr[near]
    points = np.stack([x[near[0], 0, 0], y[0, near[1], 0], z[0, 0, near[2]]], axis=1)
    points /= np.maximum(np.sqrt((points * points).sum(1, keepdims=True)), np.float32(1e-3))
    surface = half * shape(points)
    inside = expit((surface - rr) / soft)
    glass = np.float32(row["ground_glass"])
    core = expit((_CORE * surface - rr) / soft)
    # the mean over the nodule's volume is the stated share whatever the core's
    share = glass**3 * core + (glass - _CORE**3 * glass**3) / (1 - _CORE**3) * (1 - core)
    target = 20 - 570 * share
    here = volume[box][near]
    target += glass * np.maximum(here - target, 0)
    volume[box][near] += (target - here) * inside


def _window(half: int) -> Array:
    return np.arange(-half, half + 1)


def _stride(grid: Grid, axis: int) -> int:
    """Voxels from one to the next along an axis of the flat volume."""
    return int(np.prod(grid.shape[axis + 1 :]))


def _unit(draw: np.random.Generator, count: int) -> Array:
    vectors = draw.standard_normal((count, 3), dtype=np.float32)
    return vectors / np.sqrt((vectors**2).sum(1, keepdims=True))
