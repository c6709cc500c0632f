"""DICOM headers: an allow-list of tags. The rest of a header is never read.

Standard: DICOM PS3.3 C.7.6.2 (image plane), C.8.2.1 (CT image), C.7.5.1.1.2 (pixel padding).
"""

import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pydicom
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from mmjepa.ct import elements
from mmjepa.ct.elements import HEADER_BYTES, OTHERS, PIXELS, TEXTS, Plain, inflated
from mmjepa.ct.values import Values, floats_of, many_of, moment_of, text_of
from mmjepa.refusal import Refusal

HEAD_BYTES = 1 << 14  # holds most headers
_LONG_HEAD_BYTES = 1 << 20
_MOST_VOXEL_BYTES = 1 << 40

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
_DICOMDIR = "1.2.840.10008.1.3.10"
_MAKERS = ("SIEMENS", "GE", "PHILIPS", "TOSHIBA", "CANON", "HITACHI", "FUJIFILM", "UIH", "NEUSOFT", "SAMSUNG")
_KERNEL_CHARACTERS = 12
_KERNEL = re.compile(  # B30f, Br40d 3, FC51-H, YA, STANDARD, BONEPLUS, B_SOFT_B, SHARP_C
    r"([A-Z]_)?([A-Z]{1,3}\d{1,3}[A-Z]{0,2}|[A-Z]{1,2}|\d{1,2}|STANDARD|STND|SMOOTH|SOFT|SHARP|BONE|LUNG|DETAIL|EDGE|CHST|ULTRA"
    r"|BODY|BRAIN|HEAD)(PLUS)?([-_+]([A-Z]{1,2}|\d))?( \d)?",
    re.ASCII | re.IGNORECASE,
)


@dataclass(frozen=True)
class Slice:
    """One CT image's header (or one frame's), as far as it is needed. Holds identifiers: never printed, never written."""

    path: Path
    number: int  # place in the sorted walk, from 1: how messages name a file
    sop_class: str
    sop_uid: str
    series_uid: str
    patient_id: str
    time: tuple[datetime | None, datetime | None, datetime | None]  # acquisition, series, study
    image_type: tuple[str, ...]
    kernel: str  # one of the known shapes, or empty
    kernel_text: str  # as the file has it
    body_part: str
    thickness_mm: float | None
    orientation: tuple[float, ...] | None
    position: tuple[float, ...] | None
    pixel_spacing: tuple[float, ...] | None  # between rows (y), between columns (x)
    shape: tuple[int, int]  # rows, columns
    acquisition: tuple[str, str]  # acquisition number, temporal position
    photometric: str
    burned_in: bool
    rescale: tuple[float, float] | None
    rescale_type: str
    padding: tuple[int, int] | None  # stored values, both ends included
    syntax: str
    kvp: float | None
    maker: str  # one of a few known names, or empty
    plain: Plain | None = None  # where the voxels need no decoder
    deflated: bool = False
    most_bytes: int = HEADER_BYTES  # what the data set may come to
    frame: int | None = None  # of a multi-frame file, from 0
    stack: str = ""  # what a multi-frame file says about which frames belong together


class Left(NamedTuple):
    """A file that is skipped and counted: the code, and where it would have belonged. Holds identifiers like a Slice."""

    code: str
    series_uid: str = ""
    orientation: tuple[float, ...] | None = None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence pydicom, whose warnings quote header values."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    if level > logging.CRITICAL:  # inside another one
        yield
        return
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def looks_like_dicom(head: bytes) -> bool:
    """By content: the DICM mark after the preamble, or a data set that begins with group 2 or 8 (no preamble)."""
    return head[128:132] == b"DICM" or (len(head) >= 132 and head[:2] in (b"\x02\x00", b"\x08\x00") and head[3] == 0)


def header_file(path: Path) -> BinaryIO:
    """A file from its start; a deflated one as the uncompressed file that it stands for, as far as a header may reach.

    Raises Refusal CT_OUT_OF_LIMITS.
    """
    with open(path, "rb") as handle:
        content = handle.read(_LONG_HEAD_BYTES)
        found = inflated(content, HEADER_BYTES)
        if found and PIXELS not in found[0] and len(content) == _LONG_HEAD_BYTES:
            found = None
            found = inflated(content + handle.read(HEADER_BYTES), HEADER_BYTES)
    if found is None:
        return open(path, "rb")
    content, whole = found
    if not whole and PIXELS not in content and len(content) >= HEADER_BYTES:
        raise Refusal("CT_OUT_OF_LIMITS", f"a header unpacks to more than {HEADER_BYTES} bytes")
    return BytesIO(content)


def read_header(path: Path, number: int, head: bytes = b"") -> Slice | Left:
    """The header of one file, or why the file is skipped and counted. head: the file's first bytes, if they were read already.

    Raises Refusal CT_UNREADABLE for a header that cannot be parsed or names no series, CT_OUT_OF_LIMITS.
    """
    try:
        head = head or _head(path, HEAD_BYTES)
        header = elements.read(head)
        if header is None and len(head) == HEAD_BYTES:  # there may be more
            header = elements.read(_head(path, _LONG_HEAD_BYTES))
        if header:
            return _judge(header.values, header.meta, path, number, header.end)
        with quiet(), header_file(path) as handle:
            data = pydicom.dcmread(handle, stop_before_pixels=True, specific_tags=[*TEXTS, *OTHERS], force=True)
            deflated = isinstance(handle, BytesIO)
            return _judge(data, data.file_meta, path, number, handle.tell(), bool(data.preamble), deflated)
    except Refusal:
        raise
    except MemoryError:
        raise
    except Exception:  # pydicom raises whatever the broken bytes lead to, and quotes them
        raise Refusal("CT_UNREADABLE", f"header of file {number} cannot be parsed") from None


def _head(path: Path, size: int) -> bytes:
    with open(path, "rb") as handle:
        return handle.read(size)


def _judge(
    data: Values, meta: Values, path: Path, number: int, end: int, marked: bool = True, deflated: bool = False
) -> Slice | Left:
    """end: where the header ended in the file. marked: whether the file says of itself that it is DICOM."""
    text = {name: text_of(data, name) for name in TEXTS}
    sop_class = text["SOPClassUID"] or text_of(meta, "MediaStorageSOPClassUID")
    if sop_class == _DICOMDIR or not (sop_class or text["Modality"] or marked):
        return Left("CT_NOT_DICOM")
    orientation = floats_of(data, "ImageOrientationPatient", 6)
    if text["Modality"] not in ("CT", ""):
        return Left("CT_NOT_CT", text["SeriesInstanceUID"], orientation)
    if not (sop_class or text["Modality"]) or not text["SeriesInstanceUID"]:
        raise Refusal(
            "CT_UNREADABLE", f"header of file {number} names no image class or series", "Is the file cut short?"
        )
    if sop_class not in (CT_IMAGE, *ENHANCED):
        return Left("CT_SOP_CLASS", text["SeriesInstanceUID"], orientation)
    image_type = tuple(str(part).strip().upper() for part in many_of(data, "ImageType"))
    if image_type[2:3] == ("LOCALIZER",):
        return Left("CT_LOCALIZER", text["SeriesInstanceUID"], orientation)
    rows, columns = floats_of(data, "Rows", 1) or (0,), floats_of(data, "Columns", 1) or (0,)
    thickness = floats_of(data, "SliceThickness", 1)
    kvp = floats_of(data, "KVP", 1)
    maker = text_of(data, "Manufacturer").upper()
    return Slice(
        path=path,
        number=number,
        sop_class=sop_class,
        sop_uid=text["SOPInstanceUID"],
        series_uid=text["SeriesInstanceUID"],
        patient_id=text["PatientID"],
        time=_times(text),
        image_type=image_type,
        kernel=kernel_of(data),
        kernel_text=kernel_text_of(data),
        body_part=text["BodyPartExamined"].upper(),
        thickness_mm=thickness[0] if thickness else None,
        orientation=orientation,
        position=floats_of(data, "ImagePositionPatient", 3),
        pixel_spacing=floats_of(data, "PixelSpacing", 2),
        shape=(int(rows[0]), int(columns[0])),
        acquisition=(text["AcquisitionNumber"], text["TemporalPositionIdentifier"]),
        photometric=text["PhotometricInterpretation"].upper(),
        burned_in=text["BurnedInAnnotation"].upper() == "YES",
        rescale=rescale_of(data),
        rescale_type=text["RescaleType"].upper(),
        padding=_padding(data),
        syntax=text_of(meta, "TransferSyntaxUID"),
        plain=_plain(data, text_of(meta, "TransferSyntaxUID"), end),
        deflated=deflated,
        most_bytes=_most_bytes(data),
        kvp=kvp[0] if kvp else None,
        maker=next((name for name in _MAKERS if re.match(rf"{name}\b", maker)), ""),
    )


def _plain(data: Values, syntax: str, end: int) -> Plain | None:
    tags = ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel")
    allocated, stored, high, signed, samples = ((floats_of(data, name, 1) or (math.nan,))[0] for name in tags)
    frames = text_of(data, "NumberOfFrames")
    usual = allocated == 16 and samples == 1 and signed in (0, 1) and 1 <= stored <= 16 and high == stored - 1
    if not usual or frames not in ("", "1") or syntax not in (ImplicitVRLittleEndian, ExplicitVRLittleEndian):
        return None
    return Plain(end, syntax == ExplicitVRLittleEndian, int(stored), signed == 1)


def _most_bytes(data: Values) -> int:
    """What a data set may come to, by its header: twice its voxels, as a codec may fail to compress, and all else."""
    tags = ("Rows", "Columns", "BitsAllocated", "SamplesPerPixel", "NumberOfFrames")
    voxels = math.prod(int((floats_of(data, name, 1) or (1,))[0]) for name in tags) // 4
    return HEADER_BYTES + min(max(voxels, 0), _MOST_VOXEL_BYTES)


def kernel_of(data: Values) -> str:
    """The convolution kernel's name; empty where it has no shape that scanners give it: free text may be a person's name."""
    kernel = kernel_text_of(data)
    return kernel if len(kernel) <= _KERNEL_CHARACTERS and _KERNEL.fullmatch(kernel) else ""


def kernel_text_of(data: Values) -> str:
    """The convolution kernel as the file has it, to be compared and not to be kept."""
    return " ".join(str(part).strip() for part in many_of(data, "ConvolutionKernel"))


def rescale_of(data: Values) -> tuple[float, float] | None:
    """(slope, intercept), None unless both are there and the slope is not 0."""
    slope, intercept = floats_of(data, "RescaleSlope", 1), floats_of(data, "RescaleIntercept", 1)
    return (slope[0], intercept[0]) if slope and intercept and slope[0] != 0 else None


def _padding(data: Values) -> tuple[int, int] | None:
    """The padding range in stored values: a -2000 declared for unsigned voxels is the 63536 that they hold."""
    value = floats_of(data, "PixelPaddingValue", 1)
    if value is None:
        return None
    limit = floats_of(data, "PixelPaddingRangeLimit", 1) or value
    bits = int((floats_of(data, "BitsAllocated", 1) or (16,))[0])
    signed = (floats_of(data, "PixelRepresentation", 1) or (0,))[0] == 1
    ends = []
    for end in (int(value[0]), int(limit[0])):
        end %= 1 << bits
        ends.append(end - (1 << bits) if signed and end >= 1 << (bits - 1) else end)
    return min(ends), max(ends)


def _times(text: dict[str, str]) -> tuple[datetime | None, datetime | None, datetime | None]:
    acquisition = moment_of(text["AcquisitionDateTime"]) or moment_of(text["AcquisitionDate"] + text["AcquisitionTime"])
    return (
        acquisition,
        moment_of(text["SeriesDate"] + text["SeriesTime"]),
        moment_of(text["StudyDate"] + text["StudyTime"]),
    )
