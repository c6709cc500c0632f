"""CT patch of one lung nodule: readout t_image plus label-free noise to int16 Hounsfield units.

``parameters`` links the readout to named physical quantities; ``render`` turns one row of them into a volume [X, Y, Z] at
1 mm in RAS+. Anatomy is fixed per subject; the noise is fresh per scan; the protocol (contrast, slice thickness, kernel) is
static over a subject's scans and never touches the nodule's shape.
"""

from functools import lru_cache

import numpy as np
import pandas as pd
from scipy.fft import irfftn, rfftn
from scipy.special import expit, ndtr

from synthetic import signs
from synthetic.draws import Array, generator
from synthetic.presets import Site

SIZES = (32, 48, 64)
SIZE = 32  # voxels of 1 mm along each axis
_PAD = 2  # rendered margin, cut off at the end: the Fourier blur wraps round
_FULL = SIZE + 2 * _PAD
_AXIS = (np.arange(_FULL) - (_FULL - 1) / 2).astype(np.float32)
_X, _Y, _Z = _AXIS[:, None, None], _AXIS[None, :, None], _AXIS[None, None, :]
KERNELS = ("smooth", "standard", "sharp")
_NEUTRAL = Site(name="", offset=0, rho=0.0)
_BLUR_MM = {"smooth": 1.1, "standard": 0.75, "sharp": 0.5}
_NOISE_CUTOFF = {"smooth": 0.18, "standard": 0.28, "sharp": 0.45}  # per mm
_NOISE_HU = {"smooth": 15.0, "standard": 25.0, "sharp": 40.0}
_LOBES, _SPICULES, _MOST_VESSELS = 6, 14, 6


def parameters(
    t: Array, names: list[str], protocol: Array, site: Site = _NEUTRAL, concepts: Array | None = None
) -> pd.DataFrame:
    """Physical quantities of n patches, one row each; ``signs`` holds the names of a subject's signs.

    t: [n, q] image readout whose coordinates are ``names``. protocol: [n, 3] uniforms of each subject's scan protocol, from
    which the site's acquisition knobs make contrast, slice thickness and kernel. concepts: [n, 24] bool, the image columns
    (``synthetic.concepts.IN_IMAGE``) of the sparse concepts.
    """
    seen = np.zeros((len(t), len(signs.NAMES)), bool) if concepts is None else concepts
    quality = 1.0 if site.noise_image == 1 else site.noise_image
    at = {name: t[:, j] for j, name in enumerate(names)}
    pathway = expit(1.5 * at["c1"])
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
            "noise_factor": np.exp(0.15 * at["b2"] - 0.15 * at["c1"]) * quality,
            "contrast": protocol[:, 0] < pathway,
            "thickness_mm": np.where(protocol[:, 1] < pathway, 1.0, site.thick_mm),
            "kernel": np.array(KERNELS)[np.searchsorted(np.cumsum(site.kernel_mix)[:2], protocol[:, 2])],
            "gain": site.gain,
            "hu_bias": site.hu_bias,
            "cup_hu": site.cup_hu,
            "voxel_mm": site.voxel_mm,
            "signs": [tuple(name for name, has in zip(signs.NAMES, row, strict=True) if has) for row in seen],
        }
    )


def render(row: dict, seed: int, subject: int, scan: int = 0, size: int = SIZE) -> Array:
    """One patch, int16 HU [32, 32, 32] in RAS+. row: one record of ``parameters``."""
    anatomy = generator(seed, "ct/anatomy", subject)
    noise = generator(seed, f"ct/noise/{scan}", subject)
    volume = _lung(row, anatomy)
    _add_vessels(volume, row, anatomy)
    _add_nodule(volume, row, anatomy)
    spectrum = rfftn(volume) * _transfer(row["kernel"], row["thickness_mm"])
    spectrum += _white(noise) * (_noise_amplitude(row["kernel"], row["thickness_mm"]) * np.float32(row["noise_factor"]))
    scanned = irfftn(spectrum, s=volume.shape)[_PAD:-_PAD, _PAD:-_PAD, _PAD:-_PAD]
    return np.rint(np.clip(scanned, -1024, 3071)).astype(np.int16)


def _lung(row: dict, draw: np.random.Generator) -> Array:
    """Parenchyma with texture, and emphysema holes that grow in number with its extent."""
    texture, holes = _field(draw, 3.0), _field(draw, 3.5)
    emphysema = row["emphysema"]
    volume = texture * np.float32(row["texture_hu"])
    volume += np.float32(-860 - 60 * emphysema + row["density_hu"])
    volume[holes > 1.6 - 1.6 * emphysema] = -960
    return volume


def _add_vessels(volume: Array, row: dict, draw: np.random.Generator) -> None:
    """Straight cylinders with soft edges; contrast raises them by 150 HU."""
    centres = draw.uniform(-12, 12, (_MOST_VESSELS, 3)).astype(np.float32)
    directions = _unit(draw, _MOST_VESSELS)
    radii = draw.uniform(0.7, 1.8, _MOST_VESSELS).astype(np.float32) * np.float32(row["vessel_factor"])
    depth = np.full(volume.shape, -np.inf, np.float32)
    for k in range(row["vessels"]):
        x, y, z = _X - centres[k, 0], _Y - centres[k, 1], _Z - centres[k, 2]
        along = x * directions[k, 0] + y * directions[k, 1] + z * directions[k, 2]
        square = (x * x + y * y) + z * z
        square -= along * along
        np.maximum(square, 0, out=square)
        np.maximum(depth, radii[k] - np.sqrt(square, out=square), out=depth)
    near = depth > -2.5  # beyond, the soft edge is below one thousandth
    volume[near] += (30.0 + 150.0 * row["contrast"] - volume[near]) * expit(depth[near] / np.float32(0.35))


def _add_nodule(volume: Array, row: dict, draw: np.random.Generator) -> None:
    """A lobulated, spiculated ellipsoid, solid to ground glass."""
    weights = draw.standard_normal(_LOBES, dtype=np.float32) / np.float32(np.sqrt(_LOBES))
    lobes, spicules = _unit(draw, _LOBES), _unit(draw, _SPICULES)
    stretch = np.float32(row["elongation"])
    half = np.float32(row["diameter_mm"] / 2)
    x, y, z = (g - np.float32(row[f"offset_{a}_mm"]) for a, g in (("x", _X), ("y", _Y), ("z", _Z)))
    across = 1 / np.sqrt(stretch)
    rr = np.sqrt(((x * stretch) ** 2 + (y * across) ** 2) + (z * across) ** 2)
    reach = half * (1 + row["lobulation"] * 2 * np.abs(weights).sum() + 0.6 * row["spiculation"] * 2) + 4
    near = np.nonzero(rr < reach)
    points = np.stack([x[near[0], 0, 0], y[0, near[1], 0], z[0, 0, near[2]]], axis=1)
    points /= np.maximum(np.sqrt((points * points).sum(1, keepdims=True)), np.float32(1e-3))
    shape = 1 + np.float32(row["lobulation"]) * ((3 * (points @ lobes.T) ** 2 - 1) @ weights)
    shape += np.float32(0.6 * row["spiculation"]) * np.exp(60 * (points @ spicules.T - 1)).sum(1)
    mask = expit((half * shape - rr[near]) / np.float32(0.6))
    target = np.float32(20 * (1 - row["ground_glass"]) - 550 * row["ground_glass"])
    volume[near] += (target - volume[near]) * mask


def _unit(draw: np.random.Generator, count: int) -> Array:
    vectors = draw.standard_normal((count, 3), dtype=np.float32)
    return vectors / np.sqrt((vectors**2).sum(1, keepdims=True))


def _white(draw: np.random.Generator) -> Array:
    """Fourier half spectrum of white noise, E|w|^2 = 2."""
    return draw.standard_normal((_FULL, _FULL, _FULL // 2 + 1, 2), dtype=np.float32).view(np.complex64)[..., 0]


def _field(draw: np.random.Generator, power: float) -> Array:
    """Gaussian random field of unit expected variance whose power falls as f^-power."""
    return irfftn(_white(draw) * _power_law(power), s=(_FULL,) * 3)


@lru_cache
def _frequencies() -> tuple[Array, Array]:
    """In-plane |f_xy| and f_z per mm, broadcastable over the half spectrum."""
    f = np.fft.fftfreq(_FULL)
    return np.hypot(f[:, None, None], f[None, :, None]), np.fft.rfftfreq(_FULL)[None, None, :]


def _to_unit_variance(amplitude: Array) -> Array:
    """Scale so that irfftn(_white * amplitude) has expected variance 1.

    The planes f_z = 0 and Nyquist keep only the Hermitian half of independent noise, hence their factor sqrt 2.
    """
    edge = np.zeros(amplitude.shape[2], bool)
    edge[[0, -1]] = True
    power = 2 * (amplitude[:, :, edge] ** 2).sum() + 4 * (amplitude[:, :, ~edge] ** 2).sum()
    scaled = amplitude * (_FULL**3 / np.sqrt(power))
    scaled[:, :, edge] *= np.sqrt(2)
    return scaled.astype(np.float32)


@lru_cache
def _power_law(power: float) -> Array:
    f_xy, f_z = _frequencies()
    f = np.hypot(f_xy, f_z)
    f[0, 0, 0] = np.inf
    return _to_unit_variance(f ** (-power / 2))


@lru_cache
def _transfer(kernel: str, thickness_mm: float) -> Array:
    """Blur of the scanner: Gaussian in the plane, a box of the slice thickness across."""
    f_xy, f_z = _frequencies()
    return (np.exp(-2 * (np.pi * _BLUR_MM[kernel] * f_xy) ** 2) * np.sinc(f_z * thickness_mm)).astype(np.float32)


@lru_cache
def _noise_amplitude(kernel: str, thickness_mm: float) -> Array:
    """Spectrum of the scan's noise in HU."""
    f_xy, f_z = _frequencies()
    amplitude = (
        np.sqrt(f_xy + 0.001) * np.exp(-((f_xy / _NOISE_CUTOFF[kernel]) ** 2)) * np.abs(np.sinc(f_z * thickness_mm))
    )
    return _NOISE_HU[kernel] * _to_unit_variance(amplitude)
