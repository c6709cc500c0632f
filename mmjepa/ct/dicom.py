"""DICOM files: an allow-list of header tags, and one slice of voxels. The rest of a header is never read.

Standard: DICOM PS3.3 C.7.6.2 (image plane), C.8.2.1 (CT image), C.7.5.1.1.2 (pixel padding).
"""

import hashlib
import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.errors import BytesLengthException
from pydicom.pixels import get_decoder, pixel_array
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from mmjepa.ct.volume import to_hu
from mmjepa.refusal import Refusal

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
_DICOMDIR = "1.2.840.10008.1.3.10"
_TEXTS = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "PatientID", "Modality", "PhotometricInterpretation",
    "BurnedInAnnotation", "RescaleType", "BodyPartExamined", "AcquisitionDateTime", "AcquisitionDate", "AcquisitionTime",
    "SeriesDate", "SeriesTime", "StudyDate", "StudyTime", "AcquisitionNumber", "TemporalPositionIdentifier",
]  # fmt: skip
_OTHERS = [
    "ImageType", "ConvolutionKernel", "ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "SliceThickness",
    "RescaleSlope", "RescaleIntercept", "PixelPaddingValue", "PixelPaddingRangeLimit", "Rows", "Columns", "BitsAllocated",
    "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel", "NumberOfFrames", "KVP", "Manufacturer",
]  # fmt: skip
_PIXELS = b"\xe0\x7f\x10\x00"  # tag (7FE0,0010) in little-endian order
_MAKERS = ("SIEMENS", "GE", "PHILIPS", "TOSHIBA", "CANON", "HITACHI", "FUJIFILM", "UIH", "NEUSOFT", "SAMSUNG")
_KERNEL = re.compile(r"[\w.+/ -]{1,16}", re.ASCII)
_UNPARSABLE = (
    ValueError,
    TypeError,
    NotImplementedError,
    LookupError,
    AttributeError,
    OverflowError,
    BytesLengthException,
)


@dataclass(frozen=True)
class Plain:
    """One uncompressed little-endian image of 16-bit words. offset: of its element in the file; bits: stored, from the lowest."""

    offset: int
    explicit: bool
    bits: int
    signed: bool

    def voxels(self, content: bytes, shape: tuple[int, int]) -> np.ndarray | None:
        """Stored values [rows, columns] out of the file's bytes; None where they are not what the header says."""
        header, size = content[self.offset : self.offset + 12], shape[0] * shape[1] * 2
        start, length = (12, header[8:12]) if self.explicit else (8, header[4:8])
        whole = header[:4] == _PIXELS and (not self.explicit or header[4:8] in (b"OW\0\0", b"OB\0\0"))
        if not whole or int.from_bytes(length, "little") != size or self.offset + start + size > len(content):
            return None
        words = np.frombuffer(content, "<i2" if self.signed else "<u2", size // 2, self.offset + start).reshape(shape)
        unused = 16 - self.bits
        return (words << unused) >> unused if unused else words


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
    kernel: str
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
    plain: "Plain | None" = None  # where the voxels need no decoder
    frame: int | None = None  # of a multi-frame file, from 0
    stack: str = ""  # what a multi-frame file says about which frames belong together


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


def read_header(path: Path, number: int) -> Slice | str:
    """The header of one file, or the code under which the file is skipped and counted.

    Raises Refusal CT_UNREADABLE for a header that cannot be parsed or names no series.
    """
    try:
        with quiet(), open(path, "rb") as handle:
            data = pydicom.dcmread(handle, stop_before_pixels=True, specific_tags=[*_TEXTS, *_OTHERS], force=True)
            return _judge(data, path, number, handle.tell())
    except Refusal:
        raise
    except MemoryError:
        raise
    except Exception:  # pydicom raises whatever the broken bytes lead to, and quotes them
        raise Refusal("CT_UNREADABLE", f"header of file {number} cannot be parsed") from None


def _judge(data: pydicom.FileDataset, path: Path, number: int, end: int) -> Slice | str:
    """end: where the header ended in the file."""
    text = {name: text_of(data, name) for name in _TEXTS}
    meta = getattr(data, "file_meta", None) or pydicom.Dataset()
    sop_class = text["SOPClassUID"] or text_of(meta, "MediaStorageSOPClassUID")
    if sop_class == _DICOMDIR or not (sop_class or text["Modality"] or data.preamble):
        return "CT_NOT_DICOM"
    if text["Modality"] not in ("CT", ""):
        return "CT_NOT_CT"
    if not (sop_class or text["Modality"]) or not text["SeriesInstanceUID"]:
        raise Refusal(
            "CT_UNREADABLE", f"header of file {number} names no image class or series", "Is the file cut short?"
        )
    if sop_class not in (CT_IMAGE, *ENHANCED):
        return "CT_SOP_CLASS"
    image_type = tuple(str(part).strip().upper() for part in many_of(data, "ImageType"))
    if image_type[2:3] == ("LOCALIZER",):
        return "CT_LOCALIZER"
    rows, columns = floats_of(data, "Rows", 1) or (0,), floats_of(data, "Columns", 1) or (0,)
    thickness = floats_of(data, "SliceThickness", 1)
    kvp = floats_of(data, "KVP", 1)
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
        body_part=text["BodyPartExamined"].upper(),
        thickness_mm=thickness[0] if thickness else None,
        orientation=floats_of(data, "ImageOrientationPatient", 6),
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
        kvp=kvp[0] if kvp else None,
        maker=next((name for name in _MAKERS if re.match(rf"{name}\b", text_of(data, "Manufacturer").upper())), ""),
    )


def _plain(data: pydicom.Dataset, syntax: str, end: int) -> Plain | None:
    tags = ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel")
    allocated, stored, high, signed, samples = ((floats_of(data, name, 1) or (math.nan,))[0] for name in tags)
    frames = text_of(data, "NumberOfFrames")
    usual = allocated == 16 and samples == 1 and signed in (0, 1) and 1 <= stored <= 16 and high == stored - 1
    if not usual or frames not in ("", "1") or syntax not in (ImplicitVRLittleEndian, ExplicitVRLittleEndian):
        return None
    return Plain(end, syntax == ExplicitVRLittleEndian, int(stored), signed == 1)


def kernel_of(data: pydicom.Dataset) -> str:
    """The convolution kernel's name; empty where it is free text."""
    kernel = " ".join(str(part).strip() for part in many_of(data, "ConvolutionKernel"))
    return kernel if _KERNEL.fullmatch(kernel) else ""


def rescale_of(data: pydicom.Dataset) -> tuple[float, float] | None:
    """(slope, intercept), None unless both are there and the slope is not 0."""
    slope, intercept = floats_of(data, "RescaleSlope", 1), floats_of(data, "RescaleIntercept", 1)
    return (slope[0], intercept[0]) if slope and intercept and slope[0] != 0 else None


@lru_cache
def _tag(name: str) -> BaseTag:
    """The tag of a keyword: pydicom would look it up each time."""
    return Tag(name)


def value_of(data: pydicom.Dataset, name: str) -> Any:
    """A tag's value; a tag that cannot be parsed counts as absent, and what is absent has its own code."""
    try:
        tag = _tag(name)
        return data[tag].value if tag in data else None
    except _UNPARSABLE:
        return None


def text_of(data: pydicom.Dataset, name: str) -> str:
    """A tag's value as stripped text, empty where absent."""
    value = value_of(data, name)
    return "" if value is None else str(value).strip().strip("\0").strip()


def many_of(data: pydicom.Dataset, name: str) -> list[Any]:
    """A tag's values (items of a sequence too), empty where absent."""
    value = value_of(data, name)
    if value is None or value == "":
        return []
    return [value] if isinstance(value, (str, int, float)) else list(value)


def floats_of(data: pydicom.Dataset, name: str, count: int) -> tuple[float, ...] | None:
    """A tag's ``count`` finite numbers, None where there is anything else."""
    try:
        values = tuple(float(part) for part in many_of(data, name))
    except (ValueError, TypeError):
        return None
    return values if len(values) == count and all(map(math.isfinite, values)) else None


def _padding(data: pydicom.Dataset) -> tuple[int, int] | None:
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


def moment_of(text: str) -> datetime | None:
    """DICOM date and time, at least to the minute, in the clock of the site; a date alone is no moment."""
    found = re.fullmatch(r"(\d{8})(\d{4})(\d{2})?(?:\.(\d{1,6}))?(?:[+-]\d{4})?", text)
    if not found:
        return None
    day, minute, second, fraction = found.groups()
    try:
        return datetime.strptime(f"{day}{minute}{second or '00'}{(fraction or '0').ljust(6, '0')}", "%Y%m%d%H%M%S%f")
    except ValueError:
        return None


def check_decoder(syntax: str) -> None:
    """Refuse (CT_DECODER_MISSING) a transfer syntax that nothing installed here decodes."""
    uid = UID(syntax or ImplicitVRLittleEndian)
    try:
        available = get_decoder(uid).is_available
    except NotImplementedError:
        available = False
    if not available:
        name = uid.name if uid.is_transfer_syntax and not uid.is_private else "an unknown transfer syntax"
        raise Refusal("CT_DECODER_MISSING", f"no decoder for {name}", "Install the extra mmjepa[dicom]")


class Opened:
    """A file whose header was judged, with all its bytes; parsed anew only where its voxels need a decoder.

    Raises Refusal CT_PIXEL_CORRUPT when it cannot be read any more.
    """

    def __init__(self, part: Slice, place: int) -> None:
        self.path = part.path
        try:
            self._content = part.path.read_bytes()
        except OSError:
            raise _corrupt(place) from None
        self._data: pydicom.FileDataset | None = None

    def sha256(self) -> bytes:
        """Hash of the file."""
        return hashlib.sha256(self._content).digest()

    def hu(self, part: Slice, place: int, rescale: tuple[float, float] | None) -> np.ndarray:
        """Slice ``place`` of a stack as int16 HU [rows, columns]; ``part`` is of this file.

        rescale: stands in for absent tags. Raises Refusal CT_PIXEL_CORRUPT, CT_NO_RESCALE, CT_HU_IMPLAUSIBLE.
        """
        raw = part.plain.voxels(self._content, part.shape) if part.plain else None
        if raw is None:
            raw = self._decoded(part, place)
        factors = part.rescale or rescale
        if factors is None:
            raise Refusal(
                "CT_NO_RESCALE", "no rescale slope and intercept", "Set rescale=slope,intercept if you know them"
            )
        padding = None if part.padding is None else (raw >= part.padding[0]) & (raw <= part.padding[1])
        values = raw.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # what is no number then is refused
            values *= factors[0]
            values += factors[1]
        return to_hu(values, padding)

    def _decoded(self, part: Slice, place: int) -> np.ndarray:
        try:
            with quiet():
                if self._data is None:
                    self._data = self._parsed(part)
                raw = pixel_array(self._data, index=part.frame)
        except MemoryError:
            raise
        except Exception:  # every decoder has errors of its own; or the file changed since its header was read
            raise _corrupt(place) from None
        if raw.shape != part.shape:
            raise Refusal(
                "CT_PIXEL_CORRUPT", f"pixel data of slice {place} has shape {raw.shape}, header says {part.shape}"
            )
        return raw

    def _parsed(self, part: Slice) -> pydicom.FileDataset:
        data = pydicom.dcmread(BytesIO(self._content), force=True)
        if not part.syntax:  # a bare data set: its voxels can only be uncompressed
            data.file_meta = FileMetaDataset()
            data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        return data


def _corrupt(place: int) -> Refusal:
    return Refusal("CT_PIXEL_CORRUPT", f"pixel data of slice {place} truncated or undecodable")
