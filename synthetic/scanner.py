"""The CT scanner of the rendered patches: voxel grid, random fields on it, blur and noise as Fourier spectra.

All spectra are functions of physical frequency (per mm), so that anatomy and scanner are the same at any size and spacing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from scipy.fft import irfftn, rfftn

from synthetic.draws import Array

SIZES = (32, 48, 64)  # voxels of a patch along each axis
KERNELS = ("smooth", "standard", "sharp")
_BLUR_MM = {"smooth": 1.1, "standard": 0.75, "sharp": 0.5}
_NOISE_CUTOFF = {"smooth": 0.18, "standard": 0.28, "sharp": 0.45}  # per mm
_NOISE_HU = {"smooth": 15.0, "standard": 25.0, "sharp": 40.0}
_MARGIN_MM = 3.0
_FAST = (32, 36, 40, 48, 54, 60, 64, 72, 80, 90)  # even lengths of quick transforms


@dataclass(frozen=True)
class Grid:
    """Voxels a patch is made on: ``size`` along each axis, ``voxel_mm`` apart in the plane and 1 mm across, and a margin.

    The Fourier blur wraps round into the margin, which ``crop`` cuts off.
    """

    size: int
    voxel_mm: float = 1.0

    @cached_property
    def spacing_mm(self) -> tuple[float, float, float]:
        return self.voxel_mm, self.voxel_mm, 1.0

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Voxels with the margin."""
        x, y, z = (next(n for n in _FAST if n >= self.size + 2 * _MARGIN_MM / mm) for mm in self.spacing_mm)
        return x, y, z

    @cached_property
    def axes_mm(self) -> tuple[Array, Array, Array]:
        """Places of the voxels along x, y and z, float32; the patch's centre is 0."""
        x, y, z = (
            ((np.arange(n) - (n - 1) / 2) * mm).astype(np.float32)
            for n, mm in zip(self.shape, self.spacing_mm, strict=True)
        )
        return x, y, z

    @cached_property
    def half_mm(self) -> Array:
        """From the patch's centre to its faces, [3]."""
        return self.size / 2 * np.array(self.spacing_mm)

    @property
    def softness(self) -> float:
        """Factor on soft edges: a coarse voxel averages over its width."""
        return max(1.0, self.voxel_mm)

    def crop(self, volume: Array) -> Array:
        """The patch without its margin."""
        x, y, z = (slice((n - self.size) // 2, (n - self.size) // 2 + self.size) for n in self.shape)
        return volume[x, y, z]

    def near(self, centre_mm: Array, reach_mm: float) -> tuple[tuple[slice, slice, slice], tuple[Array, Array, Array]]:
        """The box within ``reach_mm`` of a place, and its voxels' distances from it along each axis (broadcastable)."""
        boxes, away = zip(*self._spans(centre_mm, reach_mm), strict=True)
        x, y, z = away
        return (boxes[0], boxes[1], boxes[2]), (x[:, None, None], y[None, :, None], z[None, None, :])

    def _spans(self, centre_mm: Array, reach_mm: float) -> Iterator[tuple[slice, Array]]:
        for axis, centre in zip(self.axes_mm, np.asarray(centre_mm, np.float32), strict=True):
            span = slice(*np.searchsorted(axis, (centre - reach_mm, centre + reach_mm)))
            yield span, axis[span] - centre


@lru_cache
def grid(size: int, voxel_mm: float) -> Grid:
    """The one grid of a size and spacing."""
    return Grid(size, voxel_mm)


def scan(
    anatomy: Array, at: Grid, kernel: str, thickness_mm: float, gain: float, white: Array, quality: float
) -> Array:
    """Blurred anatomy (HU) times ``gain`` about -1000 HU, plus noise of ``quality`` times the kernel's strength; cropped."""
    spectrum = rfftn(anatomy)
    spectrum *= _transfer(at, kernel, thickness_mm)
    if gain != 1:
        spectrum *= np.float32(gain)
    spectrum += white * (noise_amplitude(at, kernel, thickness_mm) * np.float32(quality))
    scanned = at.crop(irfftn(spectrum, s=at.shape))
    if gain != 1:
        scanned += np.float32(1000 * (gain - 1))
    return scanned


def white(at: Grid, draw: np.random.Generator) -> Array:
    """Fourier half spectrum of white noise, E|w|^2 = 2."""
    x, y, z = at.shape
    return draw.standard_normal((x, y, z // 2 + 1, 2), dtype=np.float32).view(np.complex64)[..., 0]


def field(at: Grid, draw: np.random.Generator, power: float) -> Array:
    """Gaussian random field whose spectral density falls as f^-power, [shape]; unit variance on the default grid."""
    spectrum = white(at, draw)
    spectrum *= _power_law(at, power)
    return irfftn(spectrum, s=at.shape)


@lru_cache
def _frequencies(at: Grid) -> tuple[Array, Array]:
    """In-plane |f_xy| and f_z per mm, broadcastable over the half spectrum."""
    x, y, z = at.shape
    f_x, f_y = np.fft.fftfreq(x, at.voxel_mm), np.fft.fftfreq(y, at.voxel_mm)
    return np.hypot(f_x[:, None, None], f_y[None, :, None]), np.fft.rfftfreq(z)[None, None, :]


def _hermitian(amplitude: Array) -> tuple[Array, float]:
    """The amplitude with its edge planes raised, and the variance of irfftn(white * it).

    The planes f_z = 0 and Nyquist keep only the Hermitian half of independent noise, hence their factor sqrt 2.
    """
    raised = amplitude.copy()
    raised[:, :, [0, -1]] *= np.sqrt(2)
    voxels = amplitude.shape[0] * amplitude.shape[1] * 2 * (amplitude.shape[2] - 1)
    return raised, float(4 * (amplitude**2).sum() - 2 * (amplitude[:, :, [0, -1]] ** 2).sum()) / voxels**2


@lru_cache
def _power_law(at: Grid, power: float) -> Array:
    """Amplitude of ``field``; below the lowest frequency of the default grid the density is flat, at 0 it is nothing."""
    reference = Grid(SIZES[0])
    f = np.hypot(*_frequencies(reference))
    f[0, 0, 0] = np.inf
    _, variance = _hermitian(f ** (-power / 2))
    f = np.maximum(np.hypot(*_frequencies(at)), 1 / reference.shape[0])
    f[0, 0, 0] = np.inf
    raised, _ = _hermitian(f ** (-power / 2))
    # equal density: the amplitude of one frequency goes with voxels / sqrt(volume)
    scale = np.prod(at.shape) / np.prod(reference.shape) / np.sqrt(np.prod(at.shape) * at.voxel_mm**2)
    return (raised * scale * np.sqrt(np.prod(reference.shape) / variance)).astype(np.float32)


@lru_cache
def _transfer(at: Grid, kernel: str, thickness_mm: float) -> Array:
    """Blur of the scanner: Gaussian in the plane, a box of the slice thickness across."""
    f_xy, f_z = _frequencies(at)
    return (np.exp(-2 * (np.pi * _BLUR_MM[kernel] * f_xy) ** 2) * np.sinc(f_z * thickness_mm)).astype(np.float32)


@lru_cache
def noise_amplitude(at: Grid, kernel: str, thickness_mm: float) -> Array:
    """Spectrum of a scan's noise: what ``white`` is multiplied by so that irfftn gives noise of the kernel's HU."""
    f_xy, f_z = _frequencies(at)
    amplitude = np.sqrt(f_xy + 0.001) * np.exp(-((f_xy / _NOISE_CUTOFF[kernel]) ** 2)) * np.sinc(f_z * thickness_mm)
    raised, variance = _hermitian(np.abs(amplitude))
    return (raised * (_NOISE_HU[kernel] / np.sqrt(variance))).astype(np.float32)
