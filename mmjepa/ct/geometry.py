"""The geometry of a stack of slices: order, steps, tilt, affine."""

from collections.abc import Sequence

import numpy as np

from mmjepa.ct.dicom import Slice
from mmjepa.ct.resample import deshear_hu
from mmjepa.ct.volume import SPACING_MM, Settings
from mmjepa.refusal import Refusal

SAME_PLACE_MM = 1e-3
_ORTHONORMAL = 1e-3


def _normal(part: Slice) -> np.ndarray:
    cosines = np.array(part.orientation)
    return np.cross(cosines[:3], cosines[3:])


def heights_mm(stack: Sequence[Slice]) -> np.ndarray:
    """Positions along the stack's normal."""
    return np.array([part.position for part in stack]) @ _normal(stack[0])


def check_geometry(stack: Sequence[Slice], settings: Settings) -> tuple[list[Slice], bool]:
    """The slices sorted along the normal, and whether they are tilted (and may be).

    Raises the codes of an invalid, short, doubled, gappy, oversized or tilted stack.
    """
    cosines = np.array([part.orientation for part in stack])
    row, column = cosines[:, :3], cosines[:, 3:]
    products = [(row * row).sum(1) - 1, (column * column).sum(1) - 1, (row * column).sum(1)]
    error = max(float(np.abs(product).max()) for product in products)
    if not error <= _ORTHONORMAL:
        raise Refusal("CT_ORIENTATION_INVALID", f"direction cosines not orthonormal ({error:.3g})")
    if len(stack) < settings.min_slices:
        raise Refusal(
            "CT_TOO_FEW_SLICES",
            f"{len(stack)} slices, want >= {settings.min_slices}",
            "Set min_slices (--min-slices) lower if so few are a volume to you",
        )
    settings.check_size((len(stack), *stack[0].shape))
    order = np.argsort(heights_mm(stack), kind="stable")
    ordered = [stack[i] for i in order]
    _check_steps(ordered)
    return ordered, _is_tilted(ordered, settings.tilt)


def _check_steps(ordered: Sequence[Slice]) -> None:
    steps = np.diff(heights_mm(ordered))
    repeats = int((steps <= SAME_PLACE_MM).sum())
    if repeats:
        raise Refusal(
            "CT_DUPLICATE_POSITION",
            f"{repeats} positions held twice; several reconstructions?",
            "Keep one of them in the series",
        )
    median = float(np.median(steps))
    if np.abs(steps - median).max() > max(0.1 * median, 0.05):
        raise Refusal(
            "CT_SPACING_IRREGULAR",
            f"steps {steps.min():.3f}..{steps.max():.3f} mm, median {median:.3f}",
            "Are slices missing?",
        )
    heights = heights_mm(ordered)
    drift = float(np.abs(heights - heights[0] - median * np.arange(len(heights))).max())
    if drift > 0.5 * median:  # one affine would put a slice where its neighbour is
        raise Refusal(
            "CT_SPACING_IRREGULAR",
            f"slices lie up to {drift:.3f} mm from even steps of {median:.3f} mm",
            "Steps that differ a little add up; were two scans joined?",
        )
    if median > SPACING_MM[1]:
        raise Refusal("CT_OUT_OF_LIMITS", f"slice step {median:.3g} mm, limit {SPACING_MM[1]:g}")


def _is_tilted(ordered: Sequence[Slice], tilt: str) -> bool:
    """Whether slices shift sideways by more than 5 % of a step, or by more than half a pixel in all.

    Raises CT_GANTRY_TILT unless that is one even tilt to resample.
    """
    heights = heights_mm(ordered)
    steps = np.diff(heights)
    moves = np.array([part.position for part in ordered]) - np.array(ordered[0].position)
    away = moves - (heights - heights[0])[:, None] * _normal(ordered[0])
    sideways = np.diff(away, axis=0)
    limit = 0.05 * float(np.median(steps))
    half_pixel_mm = 0.5 * min(ordered[0].pixel_spacing or (0.0,))
    if np.linalg.norm(sideways, axis=1).max() <= limit and np.linalg.norm(away, axis=1).max() <= half_pixel_mm:
        return False
    even = np.median(sideways, axis=0)
    if np.linalg.norm(sideways - even, axis=1).max() > max(limit, 0.05):
        raise Refusal(
            "CT_GANTRY_TILT", "slices shift sideways unevenly: not one tilt", "Are slices of another scan here?"
        )
    if tilt == "refuse":
        degrees = float(np.degrees(np.arctan2(np.linalg.norm(even), np.median(steps))))
        raise Refusal(
            "CT_GANTRY_TILT",
            f"tilt {degrees:.1f} degrees",
            "Straighten such series with tilt=resample (--tilt resample)",
        )
    return True


def affine_ras(ordered: Sequence[Slice]) -> np.ndarray:
    """4 x 4 affine of (column, row, slice) indices to RAS mm. DICOM's own axes are LPS: x and y change sign."""
    first = ordered[0]
    cosines, spacing = np.array(first.orientation), np.array(first.pixel_spacing)
    steps = np.diff(heights_mm(ordered))
    step = float(np.median(steps))
    affine = np.eye(4)
    affine[:3, 0] = cosines[:3] * spacing[1]
    affine[:3, 1] = cosines[3:] * spacing[0]
    affine[:3, 2] = _normal(first) * step
    affine[:3, 3] = np.array(first.position)
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def straighten(stack: np.ndarray, affine: np.ndarray, ordered: Sequence[Slice]) -> tuple[np.ndarray, np.ndarray]:
    """Slices of a tilted gantry [slices, rows, columns], moved within their planes onto one upright grid, and its affine.

    Every slice stays at its height; the grid is the first slice's, made as large as all slices need.
    """
    first = ordered[0]
    moves = np.array([part.position for part in ordered]) - np.array(first.position)
    along_row, along_column = np.array(first.orientation).reshape(2, 3)
    row_mm, column_mm = first.pixel_spacing or (1.0, 1.0)
    straight, (row, column) = deshear_hu(
        stack, np.stack([moves @ along_column / row_mm, moves @ along_row / column_mm], 1)
    )
    origin = np.eye(4)
    origin[:2, 3] = column, row
    return straight, affine @ origin
