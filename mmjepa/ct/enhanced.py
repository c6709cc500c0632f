"""Enhanced and Legacy Converted Enhanced CT: one file of many frames, each with its own geometry and rescale.

Standard: DICOM PS3.3 C.7.6.16 (multi-frame functional groups: a frame's own group comes before the shared one) and C.8.15.3
(CT functional groups). The root of such a file says nothing about geometry or HU, and what it says there is not used.
"""

from collections.abc import Sequence
from dataclasses import replace

import pydicom

from mmjepa.ct.dicom import Left, Slice, header_file, kernel_of, kernel_text_of, quiet, rescale_of
from mmjepa.ct.values import floats_of, many_of, moment_of, text_of
from mmjepa.refusal import Refusal

_SHARED, _PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"


def frames(part: Slice) -> list[Slice] | Left:
    """One Slice for each frame of the file that ``part`` describes, or why the file is skipped.

    A file without one functional group for each frame comes back as it is, without a frame number.
    Raises Refusal CT_UNREADABLE.
    """
    try:
        with quiet(), header_file(part.path) as handle:
            tags = [_SHARED, _PER_FRAME, "NumberOfFrames"]
            data = pydicom.dcmread(handle, stop_before_pixels=True, specific_tags=list(tags), force=True)
            groups, shared = many_of(data, _PER_FRAME), many_of(data, _SHARED)
            if not groups or floats_of(data, "NumberOfFrames", 1) != (len(groups),):
                return [part]
            found = [_frame(part, k, [group, *shared]) for k, group in enumerate(groups)]
    except (Refusal, MemoryError):
        raise
    except Exception:  # pydicom raises whatever the broken bytes lead to, and quotes them
        raise Refusal("CT_UNREADABLE", f"functional groups of file {part.number} cannot be parsed") from None
    if all(_is_localizer(frame) for frame in found):
        return Left("CT_LOCALIZER", part.series_uid)
    return [replace(frame, stack=f"{frame.stack} localizer") if _is_localizer(frame) else frame for frame in found]


def _is_localizer(frame: Slice) -> bool:
    return frame.image_type[2:3] == ("LOCALIZER",)


def _frame(part: Slice, number: int, groups: Sequence[pydicom.Dataset]) -> Slice:
    content, measures = _macro(groups, "FrameContentSequence"), _macro(groups, "PixelMeasuresSequence")
    transform = _macro(groups, "PixelValueTransformationSequence")
    kind = many_of(_macro(groups, "CTImageFrameTypeSequence"), "FrameType")
    thickness = floats_of(measures, "SliceThickness", 1)
    kvp = floats_of(_macro(groups, "CTXRayDetailsSequence"), "KVP", 1)
    region = _macro([_macro(groups, "FrameAnatomySequence")], "AnatomicRegionSequence")
    acquisition = text_of(content, "FrameAcquisitionNumber"), text_of(content, "TemporalPositionIndex")
    reconstruction = _macro(groups, "CTReconstructionSequence")
    return replace(
        part,
        frame=number,
        stack=text_of(content, "StackID"),
        time=(moment_of(text_of(content, "FrameAcquisitionDateTime")) or part.time[0], *part.time[1:]),
        image_type=tuple(str(value).strip().upper() for value in kind) or part.image_type,
        kernel=kernel_of(reconstruction),
        kernel_text=kernel_text_of(reconstruction),
        body_part=part.body_part or text_of(region, "CodeMeaning").upper(),
        thickness_mm=thickness[0] if thickness else None,
        orientation=floats_of(_macro(groups, "PlaneOrientationSequence"), "ImageOrientationPatient", 6),
        position=floats_of(_macro(groups, "PlanePositionSequence"), "ImagePositionPatient", 3),
        pixel_spacing=floats_of(measures, "PixelSpacing", 2),
        acquisition=(acquisition[0] or part.acquisition[0], acquisition[1] or part.acquisition[1]),
        rescale=rescale_of(transform),
        rescale_type=text_of(transform, "RescaleType").upper(),
        kvp=kvp[0] if kvp else None,
    )


def _macro(groups: Sequence[pydicom.Dataset], name: str) -> pydicom.Dataset:
    """The item of one functional group, an empty one where no group holds it."""
    return next((items[0] for group in groups if (items := many_of(group, name))), pydicom.Dataset())
