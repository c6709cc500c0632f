"""From slices to stacks: what belongs together, in which order, and whether it is a volume at all."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pydicom

from mmjepa.ct.dicom import ENHANCED, Slice, check_decoder, quiet, read_hu
from mmjepa.ct.volume import Candidate, Settings, Volume, canonical, check_hu
from mmjepa.identity import Crosswalk
from mmjepa.refusal import Refusal

_SAME_PLACE_MM = 1e-3
_ORTHONORMAL = 1e-3
_CHEST = {"CHEST", "LUNG", "LUNGS", "THORAX"}
_PHOTOMETRIC = {"MONOCHROME1", "RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"}
_RESCALE_TYPES = {"OD", "US", "MGML", "Z_EFF", "ED", "EDW", "HU_MOD", "PCT"}


def without_copies(slices: Sequence[Slice]) -> list[Slice]:
    """Leave out files that repeat another one: SOPInstanceUID, header and voxels alike."""
    kept: list[Slice] = []
    seen: dict[Slice, list[Slice]] = defaultdict(list)
    for part in slices:
        twins = seen[replace(part, path=Path(), number=0)]
        if part.sop_uid and twins and _pixel_hash(part) in map(_pixel_hash, twins):
            continue
        twins.append(part)
        kept.append(part)
    return kept


def _pixel_hash(part: Slice) -> str:
    """Hash of the stored voxels; a file that cannot be read equals nothing but itself."""
    try:
        with quiet():
            return hashlib.sha256(pydicom.dcmread(part.path, force=True).PixelData).hexdigest()
    except MemoryError:
        raise
    except Exception:  # the reader of voxels will refuse it with its code
        return f"unreadable {part.number}"


def candidates(slices: Sequence[Slice], crosswalk: Crosswalk, settings: Settings) -> list[Candidate]:
    """Group slices into stacks and judge each by its headers. One SeriesInstanceUID may hold several stacks."""
    series: dict[str, list[Slice]] = defaultdict(list)
    for part in slices:
        series[part.series_uid].append(part)
    found = []
    for uid, parts in series.items():
        try:
            _check_series(parts)
        except Refusal as refusal:
            found.append(Candidate(crosswalk.image_id(uid), "dicom", refusal=refusal))
            continue
        stacks = split(parts)
        for k, stack in enumerate(stacks, start=1):
            image_id = crosswalk.image_id(uid if len(stacks) == 1 else f"{uid}#{k}")
            found.append(_judge(image_id, stack, len(stacks), crosswalk, settings))
    return found


def _check_series(parts: Sequence[Slice]) -> None:
    patients = {part.patient_id for part in parts}
    if len(patients) > 1:
        raise Refusal("CT_SUBJECT_MIXED", f"series has {len(patients)} patient ids, want 1")
    if "" in patients:
        raise Refusal("CT_SUBJECT_MISSING", "series has no patient id")
    if any(part.sop_class in ENHANCED for part in parts):
        raise Refusal(
            "CT_ENHANCED_UNSUPPORTED", "enhanced multi-frame CT is not read", "Export it as classic CT images"
        )
    fields = {
        "ImageOrientationPatient": "orientation",
        "ImagePositionPatient": "position",
        "PixelSpacing": "pixel_spacing",
    }
    for tag, name in fields.items():
        missing = sum(getattr(part, name) is None for part in parts)
        if missing:
            raise Refusal("CT_NO_GEOMETRY", f"{tag} missing in {missing} slices")
    if any(min(part.pixel_spacing or (0.0,)) <= 0 or min(part.shape) <= 0 for part in parts):
        raise Refusal("CT_NO_GEOMETRY", "PixelSpacing, Rows and Columns must be positive")


def split(parts: Sequence[Slice]) -> list[list[Slice]]:
    """Stacks of one geometry (orientation, pixel spacing, matrix), in the order of that geometry.

    Where positions repeat and the acquisition (or temporal position) tells them apart, it splits the stack further.
    """
    by_geometry: dict[tuple, list[Slice]] = defaultdict(list)
    for part in parts:
        orientation = tuple(round(value, 4) + 0.0 for value in part.orientation or ())
        by_geometry[(orientation, part.pixel_spacing, part.shape)].append(part)
    stacks = []
    for key in sorted(by_geometry):
        stack = by_geometry[key]
        by_acquisition: dict[tuple, list[Slice]] = defaultdict(list)
        for part in stack:
            by_acquisition[part.acquisition].append(part)
        finer = [by_acquisition[name] for name in sorted(by_acquisition)]
        stacks += finer if _repeats(stack) and not any(map(_repeats, finer)) else [stack]
    return stacks


def _normal(part: Slice) -> np.ndarray:
    cosines = np.array(part.orientation)
    return np.cross(cosines[:3], cosines[3:])


def _heights_mm(stack: Sequence[Slice]) -> np.ndarray:
    """Positions along the stack's normal."""
    return np.array([part.position for part in stack]) @ _normal(stack[0])


def _repeats(stack: Sequence[Slice]) -> int:
    return int((np.diff(np.sort(_heights_mm(stack))) <= _SAME_PLACE_MM).sum())


def _judge(image_id: str, stack: Sequence[Slice], siblings: int, crosswalk: Crosswalk, settings: Settings) -> Candidate:
    first = stack[0]
    flags = ["CT_SPLIT_SERIES"] if siblings > 1 else []
    if "DERIVED" in first.image_type[:1] or "SECONDARY" in first.image_type[1:2]:
        flags.append("CT_DERIVED")
    found = Candidate(image_id, "dicom", flags=tuple(flags))
    subject = crosswalk.subject_id(first.patient_id)
    try:
        if subject is None:
            raise Refusal("CT_SUBJECT_UNKNOWN", "the patient is not in the crosswalk", "Add a row for this patient")
        _check_tags(stack, settings)
        ordered = _check_geometry(stack, settings.min_slices)
    except Refusal as refusal:
        return replace(found, refusal=refusal)
    moments = [
        min(known) for level in zip(*(part.time for part in stack), strict=True) if (known := [t for t in level if t])
    ]
    return replace(
        found,
        parts=tuple(ordered),
        subject_id=subject,
        time=moments[0] + timedelta(days=crosswalk.date_shift_days(first.patient_id)) if moments else None,
        kernel=first.kernel,
        thickness_mm=first.thickness_mm,
        chest=first.body_part in _CHEST,
        flags=found.flags if moments else (*found.flags, "CT_NO_TIME"),
    )


def _check_tags(stack: Sequence[Slice], settings: Settings) -> None:
    """What the headers say about the voxels. Raises CT_BURNED_IN, CT_NOT_MONOCHROME, CT_NOT_HU, CT_NO_RESCALE, CT_DECODER_MISSING."""
    if any(part.burned_in for part in stack):
        raise Refusal("CT_BURNED_IN", "BurnedInAnnotation is YES", "Text in the image may identify; remove it first")
    others = Counter(part.photometric for part in stack if part.photometric != "MONOCHROME2")
    if others:
        name = min(others)
        shown = name if name in _PHOTOMETRIC else "unknown"
        raise Refusal("CT_NOT_MONOCHROME", f"photometric {shown}, want MONOCHROME2")
    types = {part.rescale_type for part in stack} - {"HU", ""}
    if types:
        name = min(types)
        raise Refusal("CT_NOT_HU", f"rescale type {name if name in _RESCALE_TYPES else 'unknown'}, want HU")
    missing = sum(part.rescale is None for part in stack)
    if missing and settings.rescale is None:
        raise Refusal(
            "CT_NO_RESCALE",
            f"no rescale slope and intercept in {missing} slices",
            "Set rescale=slope,intercept if you know them",
        )
    for syntax in sorted({part.syntax for part in stack}):
        check_decoder(syntax)


def _check_geometry(stack: Sequence[Slice], min_slices: int) -> list[Slice]:
    """The slices sorted along the normal. Raises the codes of an invalid, short, doubled, gappy or tilted stack."""
    cosines = np.array([part.orientation for part in stack])
    row, column = cosines[:, :3], cosines[:, 3:]
    products = [(row * row).sum(1) - 1, (column * column).sum(1) - 1, (row * column).sum(1)]
    error = max(float(np.abs(product).max()) for product in products)
    if error > _ORTHONORMAL:
        raise Refusal("CT_ORIENTATION_INVALID", f"direction cosines not orthonormal ({error:.3g})")
    if len(stack) < min_slices:
        raise Refusal("CT_TOO_FEW_SLICES", f"{len(stack)} slices, want >= {min_slices}")
    order = np.argsort(_heights_mm(stack), kind="stable")
    ordered = [stack[i] for i in order]
    _check_steps(ordered)
    return ordered


def _check_steps(ordered: Sequence[Slice]) -> None:
    steps = np.diff(_heights_mm(ordered))
    repeats = int((steps <= _SAME_PLACE_MM).sum())
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
    moves = np.diff(np.array([part.position for part in ordered]), axis=0)
    sideways = np.linalg.norm(moves - steps[:, None] * _normal(ordered[0]), axis=1)
    if sideways.max() > 0.05 * median:
        degrees = float(np.degrees(np.arctan2(np.median(sideways), median)))
        raise Refusal(
            "CT_GANTRY_TILT", f"slices shift sideways by {degrees:.1f} degrees", "Straighten the series first"
        )


def affine_ras(ordered: Sequence[Slice]) -> np.ndarray:
    """4 x 4 affine of (column, row, slice) indices to RAS mm. DICOM's own axes are LPS: x and y change sign."""
    first = ordered[0]
    cosines, spacing = np.array(first.orientation), np.array(first.pixel_spacing)
    steps = np.diff(_heights_mm(ordered))
    step = float(np.median(steps))
    affine = np.eye(4)
    affine[:3, 0] = cosines[:3] * spacing[1]
    affine[:3, 1] = cosines[3:] * spacing[0]
    affine[:3, 2] = _normal(first) * step
    affine[:3, 3] = np.array(first.position)
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def source_hash(ordered: Sequence[Slice]) -> str:
    """Hash of the files of a stack, in their order along it."""
    return _digest(hashlib.sha256(part.path.read_bytes()).digest() for part in ordered)


def _digest(hashes: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(hashes)).hexdigest()


def read_volume(found: Candidate, settings: Settings) -> Volume:
    """Decode an accepted candidate. Raises CT_PIXEL_CORRUPT, CT_CONSTANT, CT_HU_IMPLAUSIBLE."""
    rows, columns = found.parts[0].shape
    stack = np.empty((len(found.parts), rows, columns), dtype=np.int16)
    hashes = []
    for k, part in enumerate(found.parts):
        stack[k], file_hash = read_hu(part, k + 1, settings.rescale)
        hashes.append(file_hash)
    check_hu(stack, settings.chest_p5_hu if found.chest else None)
    hu, affine = canonical(stack.transpose(2, 1, 0), affine_ras(found.parts))
    return Volume(hu, affine, _digest(hashes))
