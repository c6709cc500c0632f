"""The bytes of a DICOM file: the header of a usual one many times faster than by a general parser, plain voxels, deflated files.

Standard: DICOM PS3.5 sections 7.1 (elements), 7.5 (sequences), A.5 (deflated); PS3.10 section 7.1 (file meta). What is not strictly
as the standard says (an order, a representation, a length, a character) is not judged here: a general parser reads it.
"""

import re
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.filereader import read_dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

TEXTS = (
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "PatientID", "Modality", "PhotometricInterpretation",
    "BurnedInAnnotation", "RescaleType", "BodyPartExamined", "AcquisitionDateTime", "AcquisitionDate", "AcquisitionTime",
    "SeriesDate", "SeriesTime", "StudyDate", "StudyTime", "AcquisitionNumber", "TemporalPositionIdentifier",
)  # fmt: skip
OTHERS = (
    "ImageType", "ConvolutionKernel", "ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "SliceThickness",
    "RescaleSlope", "RescaleIntercept", "PixelPaddingValue", "PixelPaddingRangeLimit", "Rows", "Columns", "BitsAllocated",
    "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel", "NumberOfFrames", "KVP", "Manufacturer",
)  # fmt: skip
HEADER_BYTES = 64 << 20  # what a deflated header may unpack to
_PIECE = 1 << 16
_META = ("MediaStorageSOPClassUID", "TransferSyntaxUID")
PIXELS = b"\xe0\x7f\x10\x00"  # tag (7FE0,0010) in little-endian order
_SHORT = {b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FL", b"FD", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS",
          b"ST", b"TM", b"UI", b"UL", b"US"}  # fmt: skip
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_WANTED = {int(tag_for_keyword(name) or 0): (name, dictionary_VR(name)) for name in (*_META, *TEXTS, *OTHERS)}
_AMBIGUOUS = "US or SS"
_SEVERAL = {"ImageType", "ConvolutionKernel", "ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing"}
_TEXT = re.compile(rb"[ -~]*\0?")
_WHOLE = re.compile(r"0|[1-9]\d{0,8}")
_DECIMAL = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_META_GROUP, _META_END, _PIXEL_GROUP = 0x00020000, 0x0002FFFF, 0x7FE00000
_DEEPEST = 16
_explicit, _implicit = struct.Struct("<HH2sH").unpack_from, struct.Struct("<HHI").unpack_from
_length = struct.Struct("<I").unpack_from


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
        whole = header[:4] == PIXELS and (not self.explicit or header[4:8] in (b"OW\0\0", b"OB\0\0"))
        if not whole or int.from_bytes(length, "little") != size or self.offset + start + size > len(content):
            return None
        words = np.frombuffer(content, "<i2" if self.signed else "<u2", size // 2, self.offset + start).reshape(shape)
        unused = 16 - self.bits
        return (words << unused) >> unused if unused else words


class Header(NamedTuple):
    """Wanted values by keyword, as pydicom would give them; ``end``: where the voxels' element begins."""

    meta: dict[str, Any]
    values: dict[str, Any]
    end: int


class _Unusual(Exception):
    """Left to a general parser."""


def read(content: bytes) -> Header | None:
    """The header at the start of ``content``; None where it is unusual, deflated, cut off, or no voxels follow it."""
    try:
        meta, start = _file_meta(content)
        syntax = meta.get("TransferSyntaxUID", "")
        if syntax in ("", DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian):
            return None
        explicit = syntax != ImplicitVRLittleEndian
        if not explicit and content[start + 4 : start + 6].isalpha():  # explicit, whatever the syntax says
            return None
        values, end = _walk(content, start, explicit, _META_END, _PIXEL_GROUP)
        if content[end : end + 4] != PIXELS:
            return None
        if not explicit and "PixelPaddingValue" in values and values.get("BitsAllocated") != 16:  # its sign matters
            return None
        return Header(meta, values, end)
    except (_Unusual, struct.error):
        return None


def _file_meta(content: bytes) -> tuple[dict[str, Any], int]:
    """The file meta, and where the data set begins."""
    if content[128:132] != b"DICM":
        raise _Unusual
    if content[132:140] != b"\x02\0\0\0UL\x04\0":  # it does not say how long it is
        return _walk(content, 132, True, _META_GROUP, _META_END)
    end = 144 + _length(content, 140)[0]
    meta, at = _walk(content[:end], 144, True, _META_GROUP, _META_END)
    if at != end:
        raise _Unusual
    return meta, end


def _walk(content: bytes, at: int, explicit: bool, last: int, stop: int, depth: int = 0) -> tuple[dict[str, Any], int]:
    """Wanted values of tags above ``last``, from ``at`` to the first tag from ``stop`` on or to the end of ``content``, and
    where that is."""
    found: dict[str, Any] = {}
    size = len(content)
    while at != size:
        group, element, kind, length = _explicit(content, at)
        tag = group << 16 | element
        if tag <= last:
            raise _Unusual
        if tag >= stop:
            break
        last, start = tag, at + 8
        if not explicit:
            kind, length = b"", _implicit(content, at)[2]
        elif kind in _LONG:
            length, start = _length(content, start)[0], at + 12
        elif kind not in _SHORT:
            raise _Unusual
        if length == _UNDEFINED:
            if kind not in (b"SQ", b""):
                raise _Unusual
            at = _past_items(content, start, explicit, depth)
        else:
            at = start + length
        if at > size:
            raise _Unusual
        if not depth and tag in _WANTED:
            name, usual = _WANTED[tag]
            found[name] = _value(content[start:at], name, usual, kind)
    return found, at


def _past_items(content: bytes, at: int, explicit: bool, depth: int) -> int:
    """Where a sequence of undefined length ends."""
    if depth == _DEEPEST:
        raise _Unusual
    while True:
        group, element, length = _implicit(content, at)
        tag, at = group << 16 | element, at + 8
        if tag == _SEQUENCE_END and not length:
            return at
        if tag != _ITEM:
            raise _Unusual
        if length != _UNDEFINED:
            at += length
            continue
        _, at = _walk(content, at, explicit, _META_END, _ITEM_END, depth + 1)
        if _implicit(content, at) != (0xFFFE, 0xE00D, 0):
            raise _Unusual
        at += 8


def _value(raw: bytes, name: str, usual: str, kind: bytes) -> Any:
    """A value of the representation ``usual``; ``kind`` is the one that the file names, if any."""
    if usual == "US" or usual == _AMBIGUOUS:
        if len(raw) != 2 or kind not in (b"US", b"", b"SS" if usual == _AMBIGUOUS else b"US"):
            raise _Unusual
        return int.from_bytes(raw, "little", signed=kind == b"SS")
    if (kind and kind != usual.encode()) or not _TEXT.fullmatch(raw):
        raise _Unusual
    parts = [part.strip(" ") for part in raw.decode("ascii").rstrip("\0").split("\\")]
    if len(parts) > 1 and name not in _SEVERAL:
        raise _Unusual
    if usual in ("DS", "IS") and parts != [""]:
        if not all((_DECIMAL if usual == "DS" else _WHOLE).fullmatch(part) for part in parts):
            raise _Unusual
        if usual == "DS":
            parts = list(map(float, parts))
    return parts if len(parts) > 1 else parts[0]


def inflated(content: bytes, most: int) -> tuple[bytes, bool] | None:
    """A deflated file as the uncompressed file that it stands for, up to ``most`` bytes of its data set, and whether the stream came
    to its end: not where it is cut, damaged or longer. None for a file that is not deflated. A small file may unpack to any size.
    """
    try:
        meta, start = _file_meta(content)
    except (_Unusual, struct.error):
        meta, start = _general_meta(content)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return None
    plain = _uid(0x02, meta.get("MediaStorageSOPClassUID", "")) + _uid(0x10, ExplicitVRLittleEndian)
    data = bytearray(bytes(128) + b"DICM\x02\0\0\0UL\x04\0" + struct.pack("<I", len(plain)) + plain)
    most += len(data)
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    with suppress(zlib.error):  # what came before it may hold the header
        for at in range(start, len(content), _PIECE):
            data += stream.decompress(content[at : at + _PIECE], most - len(data))
            if stream.eof or stream.unconsumed_tail or len(data) >= most:
                break
    return bytes(data), stream.eof


def _general_meta(content: bytes) -> tuple[dict[str, Any], int]:
    """``_file_meta`` by the general parser; nothing where it fails too."""
    if content[128:132] != b"DICM":
        return {}, 0
    handle = BytesIO(content[132:])
    try:
        meta = read_dataset(handle, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
        return {name: str(meta[name].value) for name in _META if name in meta}, 132 + handle.tell()
    except Exception:  # whatever broken bytes lead it to
        return {}, 0


def _uid(element: int, text: str) -> bytes:
    value = text.encode() + b"\0" * (len(text) % 2)
    return struct.pack("<HH2sH", 2, element, b"UI", len(value)) + value
