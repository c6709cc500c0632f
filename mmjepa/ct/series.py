"""From slices to stacks: what belongs together, in which order, and whether it is a volume at all."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from mmjepa.ct.dicom import ENHANCED, Left, Slice
from mmjepa.ct.geometry import affine_ras, check_geometry, straighten
from mmjepa.ct.pixels import Opened, check_decoder
from mmjepa.ct.stacks import between, same_direction, split
from mmjepa.ct.volume import SPACING_MM, Candidate, Settings, Volume, canonical, check_hu
from mmjepa.identity import Crosswalk
from mmjepa.refusal import Refusal

_FARTHEST_MM = 1e5
_COULD_BE_SLICES = {"CT_NOT_CT", "CT_SOP_CLASS"}
_TISSUE_HU = (-500, 500)
_CHEST = {"CHEST", "LUNG", "LUNGS", "THORAX"}
_PHOTOMETRIC = {"MONOCHROME1", "RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"}
_RESCALE_TYPES = {"OD", "US", "MGML", "Z_EFF", "ED", "EDW", "HU_MOD", "PCT"}


def without_copies(slices: Sequence[Slice]) -> list[Slice]:
    """Leave out files that repeat another one: SOPInstanceUID, header and voxels alike."""
    kept: list[Slice] = []
    hashes: dict[Path, str] = {}

    def voxels(part: Slice) -> str:
        if part.path not in hashes:
            hashes[part.path] = _pixel_hash(part)
        return hashes[part.path]

    seen: dict[Slice, list[Slice]] = defaultdict(list)
    for part in slices:
        twins = seen[replace(part, path=Path(), number=0, plain=None)]
        if part.sop_uid and twins and voxels(part) in map(voxels, twins):
            continue
        twins.append(part)
        kept.append(part)
    return kept


def _pixel_hash(part: Slice) -> str:
    """Hash of the stored voxels; a file that cannot be read equals nothing but itself."""
    try:
        return Opened(part, part.number).voxel_hash(part)
    except MemoryError:
        raise
    except Exception:  # the reader of voxels will refuse it with its code
        return f"unreadable {part.number}"


def candidates(
    slices: Sequence[Slice], crosswalk: Crosswalk, settings: Settings, left: Sequence[Left] = ()
) -> list[Candidate]:
    """Group slices into stacks and judge each by its headers. One SeriesInstanceUID may hold several stacks.

    left: files that were skipped; a stack that one of them may have belonged to is flagged (CT_SKIPPED_IN_SERIES).
    """
    series: dict[str, list[Slice]] = defaultdict(list)
    for part in slices:
        series[part.series_uid].append(part)
    lost = defaultdict(list)
    for part in left:
        if part.code in _COULD_BE_SLICES and part.orientation:
            lost[part.series_uid].append(part.orientation)
    found = []
    for uid, parts in series.items():
        group = crosswalk.image_id(uid)
        try:
            _check_series(parts)
            stacks = split(parts)
            if len(stacks) > 1 and any(part.frame is not None for part in parts):
                raise Refusal(
                    "CT_ENHANCED_UNSUPPORTED",
                    f"enhanced CT has {len(stacks)} stacks",
                    "Export each stack as its own series",
                )
        except Refusal as refusal:
            found.append(Candidate(group, "dicom", refusal=refusal, group=group))
            continue
        for k, stack in enumerate(stacks, start=1):
            image_id = group if len(stacks) == 1 else crosswalk.image_id(f"{uid}#{k}")
            flags = ["CT_SPLIT_SERIES"] if len(stacks) > 1 else []
            own = stack[0].orientation or ()
            flags += ["CT_SKIPPED_IN_SERIES"] * any(same_direction(own, each) for each in lost[uid])
            one = _judge(image_id, stack, flags, crosswalk, settings)
            if between(stack, (other for other in stacks if len(other) >= settings.min_slices)):
                one = replace(one, refusal=one.refusal or _torn())
            found.append(replace(one, group=group))
    return found


def _torn() -> Refusal:
    return Refusal(
        "CT_SPACING_IRREGULAR",
        "slices of another, almost equal stack of the series lie between",
        "Does one volume have two orientations, pixel spacings or thicknesses?",
    )


def _check_series(parts: Sequence[Slice]) -> None:
    patients = {part.patient_id for part in parts}
    if len(patients) > 1:
        raise Refusal("CT_SUBJECT_MIXED", f"series has {len(patients)} patient ids, want 1")
    if "" in patients:
        raise Refusal("CT_SUBJECT_MISSING", "series has no patient id", "Export it with PatientID")
    if any(part.sop_class in ENHANCED and part.frame is None for part in parts):
        raise Refusal(
            "CT_ENHANCED_UNSUPPORTED",
            "enhanced CT without functional groups for each of its frames",
            "Export it as classic CT images",
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
    numbers = {
        "PixelSpacing": ([mm for part in parts for mm in part.pixel_spacing or ()], SPACING_MM),
        "ImagePositionPatient": ([mm for part in parts for mm in part.position or ()], (-_FARTHEST_MM, _FARTHEST_MM)),
    }
    for tag, (values, (low, high)) in numbers.items():
        for value in (min(values), max(values)):
            if not low <= value <= high:
                raise Refusal("CT_OUT_OF_LIMITS", f"{tag} {value:.3g} mm, limit {low:g}..{high:g}")


def _judge(
    image_id: str, stack: Sequence[Slice], flags: list[str], crosswalk: Crosswalk, settings: Settings
) -> Candidate:
    first = stack[0]
    if "DERIVED" in first.image_type[:1] or "SECONDARY" in first.image_type[1:2]:
        flags.append("CT_DERIVED")
    found = Candidate(image_id, "dicom", flags=tuple(flags))
    subject = crosswalk.subject_id(first.patient_id)
    try:
        if subject is None:
            raise Refusal("CT_SUBJECT_UNKNOWN", "the patient is not in the crosswalk", "Add a row for this patient")
        _check_tags(stack, settings)
        ordered, tilted = check_geometry(stack, settings)
    except Refusal as refusal:
        return replace(found, refusal=refusal)
    flags += ["CT_GANTRY_TILT"] * tilted + ["CT_NO_RESCALE"] * any(part.rescale is None for part in stack)
    flags += ["CT_PADDING_PLAUSIBLE"] * any(_pads_tissue(part, settings) for part in stack)
    flags += ["CT_BODY_PART"] * any(part.body_part not in ("", *_CHEST) for part in stack)
    moment = _shifted(first_moment(stack), crosswalk.date_shift_days(first.patient_id))
    return replace(
        found,
        parts=tuple(ordered),
        subject_id=subject,
        time=moment,
        kernel=first.kernel,
        thickness_mm=first.thickness_mm,
        chest=any(part.body_part in _CHEST for part in stack),
        kvp=first.kvp,
        maker=first.maker,
        flags=tuple(flags if moment else [*flags, "CT_NO_TIME"]),
    )


def _shifted(moment: datetime | None, days: int) -> datetime | None:
    """None too where the shift leads out of the calendar."""
    try:
        return moment + timedelta(days=days) if moment else None
    except OverflowError:
        return None


def _pads_tissue(part: Slice, settings: Settings) -> bool:
    """Whether the values declared as padding are HU of the body: the standard takes them for padding, a writer may have erred."""
    slope, intercept = part.rescale or settings.rescale or (1.0, 0.0)
    low, high = sorted(end * slope + intercept for end in part.padding or (-math.inf, -math.inf))
    return low <= _TISSUE_HU[1] and high >= _TISSUE_HU[0]


def first_moment(stack: Sequence[Slice]) -> datetime | None:
    """The earliest acquisition time of the slices, else series time, else study time, unshifted; None if unknown."""
    levels = zip(*(part.time for part in stack), strict=True)
    return next((min(known) for level in levels if (known := [moment for moment in level if moment])), None)


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
            "Set rescale=slope,intercept (--rescale SLOPE,INTERCEPT) if you know them",
        )
    for syntax in sorted({part.syntax for part in stack}):
        check_decoder(syntax)


def source_hash(ordered: Sequence[Slice]) -> str:
    """Hash of the files of a stack, in their order along it."""
    paths = dict.fromkeys(part.path for part in ordered)  # frames share their file
    return _digest(hashlib.sha256(path.read_bytes()).digest() for path in paths)


def _digest(hashes: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(hashes)).hexdigest()


def read_volume(found: Candidate, settings: Settings) -> Volume:
    """Decode an accepted candidate. Raises CT_PIXEL_CORRUPT, CT_CONSTANT, CT_HU_IMPLAUSIBLE."""
    stack = np.empty(0, dtype=np.int16)
    hashes: dict[Path, bytes] = {}
    opened, padding_voxels = None, 0
    for k, part in enumerate(found.parts):
        if opened is None or opened.path != part.path:  # frames of one file follow each other: it is read once
            opened = Opened(part, k + 1)
            hashes[part.path] = opened.sha256
        before = opened.padding_voxels
        values = opened.hu(part, k + 1, settings.rescale)
        padding_voxels += opened.padding_voxels - before
        if not k:  # not before one slice is what its header claims
            stack = np.empty((len(found.parts), *values.shape), dtype=np.int16)
        stack[k] = values
    hu_range = check_hu(stack, settings.chest_p5_hu if found.chest else None)
    affine = affine_ras(found.parts)
    if "CT_GANTRY_TILT" in found.flags:
        stack, affine = straighten(stack, affine, found.parts)
        hu_range = int(stack.min()), int(stack.max())
    hu, affine = canonical(stack.transpose(2, 1, 0), affine)
    return Volume(hu, affine, hu_range, _digest(hashes.values()), padding_voxels)
