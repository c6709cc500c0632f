"""The stacks of one series: a SeriesInstanceUID may hold several, and says nothing about which slice is of which.

Slices belong together where orientation, pixel spacing, matrix, named stack and reconstruction (kernel, slice thickness, the
first three values of ImageType) are the same. None of these varies within one reconstruction; what may vary from slice to slice
(rescale, tube voltage and current, times) separates nothing. Numbers are the same within a tolerance, not within a bin: a value
may lie on any bin's edge.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mmjepa.ct.dicom import Slice
from mmjepa.ct.geometry import SAME_PLACE_MM, heights_mm

SAME_COSINE = 1e-4
_SAME_PART = 1e-4  # of a length
_NEAR_COSINE, _NEAR_PART = 0.01, 0.01  # nobody makes two reconstructions that differ by this little


def split(parts: Sequence[Slice]) -> list[list[Slice]]:
    """Stacks of one geometry and one reconstruction, in the order of both.

    A kernel, thickness or ImageType that some slices do not state is the one that all others state, if that is one.
    Where positions repeat and the acquisition (or temporal position) tells them apart, it splits the stack further.
    """
    orientation = _classes((part.orientation or () for part in parts), SAME_COSINE)
    spacing = _classes((part.pixel_spacing or () for part in parts), 0, _SAME_PART)
    stacks = []
    for same_geometry in _grouped(
        parts,
        lambda part: (orientation[part.orientation or ()], spacing[part.pixel_spacing or ()], part.shape, part.stack),
    ):
        for stack in _grouped(same_geometry, _reconstruction_in(same_geometry)):
            finer = _grouped(stack, lambda part: part.acquisition)
            stacks += finer if _repeats(stack) and not any(map(_repeats, finer)) else [stack]
    return stacks


def _reconstruction_in(stack: Sequence[Slice]) -> Callable[[Slice], tuple]:
    """What names the reconstruction of a slice among those of one geometry."""
    thickness = _classes(map(_thickness, stack), 0, _SAME_PART)
    kernel_of, thickness_of = _stated(part.kernel_text for part in stack), _stated(thickness.values())
    type_of = _stated(part.image_type[:3] for part in stack)
    return lambda part: (
        kernel_of(part.kernel_text),
        thickness_of(thickness[_thickness(part)]),
        type_of(part.image_type[:3]),
    )


def between(stack: Sequence[Slice], others: Iterable[Sequence[Slice]]) -> bool:
    """Whether slices of another stack lie between those of this one though almost nothing tells the two apart: one volume, torn."""
    return any(_nearly_one(stack[0], other[0]) and _interleave(stack, other) for other in others if other is not stack)


def same_direction(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two orientations (six direction cosines) are one."""
    return bool(np.abs(np.subtract(one, other)).max() <= SAME_COSINE)


def _nearly_one(one: Slice, other: Slice) -> bool:
    if (one.shape, one.stack, one.kernel_text) != (other.shape, other.stack, other.kernel_text):
        return False
    if one.image_type[:3] != other.image_type[:3]:
        return False
    lengths = [(*(part.pixel_spacing or ()), *_thickness(part)) for part in (one, other)]
    return (
        len(lengths[0]) == len(lengths[1])
        and np.allclose(*lengths, rtol=_NEAR_PART, atol=0)
        and np.allclose(one.orientation or (), other.orientation or (), rtol=0, atol=_NEAR_COSINE)
    )


def _interleave(stack: Sequence[Slice], other: Sequence[Slice]) -> bool:
    """Whether ranges of heights overlap, and no height is held by both."""
    ours, theirs = np.sort(heights_mm(stack)), np.sort(heights_mm([stack[0], *other])[1:])
    if ours[-1] < theirs[0] or theirs[-1] < ours[0]:
        return False
    after = np.searchsorted(ours, theirs).clip(1, len(ours) - 1) if len(ours) > 1 else np.zeros(len(theirs), dtype=int)
    nearest = np.minimum(np.abs(ours[after] - theirs), np.abs(ours[after - 1] - theirs))
    return bool((nearest > SAME_PLACE_MM).all())


def _classes(
    values: Iterable[tuple[float, ...]], tolerance: float, relative: float = 0
) -> dict[tuple[float, ...], tuple[float, ...]]:
    """For each value the lowest one that it is the same as, each of its numbers within the tolerance."""
    first: dict[tuple[float, ...], tuple[float, ...]] = {}
    for size_values in _grouped(sorted(set(values)), len):
        lowest: list[tuple[float, ...]] = []
        known = np.empty(np.shape(size_values))
        for value in size_values:
            near = np.abs(known[: len(lowest)] - value) <= tolerance + relative * np.abs(value)
            found = np.flatnonzero(near.all(axis=1))
            if not found.size:
                known[len(lowest)] = value
                lowest.append(value)
            first[value] = lowest[found[0]] if found.size else value
    return first


def _grouped(items: Iterable, key: Callable) -> list[list]:
    """Items of one key together, in the order of the keys."""
    groups: dict[Any, list] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return [groups[name] for name in sorted(groups)]


def _stated(values: Iterable) -> Callable:
    """A function that gives what is stated, and for what is empty the one value that anything states."""
    stated = {value for value in values if value}
    (only,) = stated if len(stated) == 1 else (None,)
    return lambda value: only or value


def _thickness(part: Slice) -> tuple[float, ...]:
    return () if part.thickness_mm is None else (part.thickness_mm,)


def _repeats(stack: Sequence[Slice]) -> int:
    return int((np.diff(np.sort(heights_mm(stack))) <= SAME_PLACE_MM).sum())
