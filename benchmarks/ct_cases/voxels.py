"""DICOM files whose voxels are wrong, padded, encoded in their own way or in one file of many frames."""

from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from .base import CASES, Build, Slices, case, enhanced, save, stored, without_meta


@case
def constant(folder: Path, slices: Slices) -> None:
    for part in slices:
        stored(part, np.full_like(part.pixel_array, 5))
    save(folder, slices)


def _padded(slices: Slices, value: int) -> Slices:
    for part in slices:
        raw = part.pixel_array.astype(np.int64)
        raw[:4] = value % (1 << 16)
        stored(part, raw)
    return slices


CASES["padding_wrapped_undeclared"] = lambda folder, slices: save(folder, _padded(slices, -2000))
CASES["padding_wrapped_declared"] = lambda folder, slices: save(folder, declared(_padded(slices, -2000), 63536))
CASES["padding_like_metal_declared"] = lambda folder, slices: save(folder, declared(_padded(slices, 4000), 4000))


def declared(slices: Slices, *ends: int) -> Slices:
    """PixelPaddingValue and, given a second value, PixelPaddingRangeLimit."""
    for part in slices:
        for tag, end in zip((0x00280120, 0x00280121), ends, strict=False):
            part.add_new(tag, "SS" if part.PixelRepresentation else "US", end)
    return slices


@case
def padding_range(folder: Path, slices: Slices) -> None:
    for k, part in enumerate(slices):
        _padded([part], 4000 + k)
    save(folder, declared(slices, 4000, 4095))


@case
def padding_signed(folder: Path, slices: Slices) -> None:
    for part in slices:
        raw = part.pixel_array.astype(np.int64) - 1024
        raw[:3] = -2000
        part.PixelRepresentation, part.RescaleIntercept = 1, 0
        stored(part, raw)
    save(folder, declared(slices, -2000))


def packed(syntax: UID) -> Build:
    """A case in another transfer syntax."""

    def build(folder: Path, slices: Slices) -> None:
        for part in slices:
            if syntax.is_encapsulated:
                part.compress(syntax, generate_instance_uid=False)
            part.file_meta.TransferSyntaxUID = syntax
        for k, part in enumerate(slices):
            pydicom.dcmwrite(folder / f"a_{k}.dcm", part, enforce_file_format=True)

    return build


CASES["implicit_little_endian"] = packed(ImplicitVRLittleEndian)
CASES["deflated"] = packed(DeflatedExplicitVRLittleEndian)
CASES["run_length"] = packed(RLELossless)


@case
def explicit_big_endian(folder: Path, slices: Slices) -> None:
    for k, part in enumerate(slices):
        plain = without_meta(part)
        plain.PixelData = part.pixel_array.byteswap().tobytes()
        plain["PixelData"].VR = "OW"
        plain.file_meta = pydicom.dataset.FileMetaDataset()
        plain.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        pydicom.dcmwrite(folder / f"a_{k}.dcm", plain, implicit_vr=False, little_endian=False, enforce_file_format=True)


@case
def voxels_of_the_other_byte_order(folder: Path, slices: Slices) -> None:
    for part in slices:
        part.PixelData = part.pixel_array.byteswap().tobytes()
    save(folder, slices)


@case
def header_of_the_other_byte_order(folder: Path, slices: Slices) -> None:
    explicit_big_endian(folder, slices)
    for path in folder.iterdir():
        content = path.read_bytes()
        path.write_bytes(content.replace(b"1.2.840.10008.1.2.2\0", b"1.2.840.10008.1.2.1\0"))


def claiming(side: int, syntax: UID | None = None) -> Build:
    """A case whose few bytes claim ``side`` x ``side`` voxels a slice; with 65535 that is 69 GB a series."""

    def build(folder: Path, slices: Slices) -> None:
        for part in slices:
            if syntax:
                part.compress(syntax, generate_instance_uid=False)
            part.Rows = part.Columns = side
        save(folder, slices)

    return build


CASES["run_length_bomb"] = claiming(65535, RLELossless)
CASES["uncompressed_bomb"] = claiming(65535)
CASES["run_length_too_short"] = claiming(512, RLELossless)
CASES["uncompressed_too_short"] = claiming(512)
CASES["jpeg2000_of_another_size"] = claiming(512, JPEG2000Lossless)
CASES["enhanced_two_stacks"] = lambda folder, slices: save(folder, [enhanced(slices, stacks=2)])
CASES["enhanced_whole"] = lambda folder, slices: save(folder, [enhanced(slices)])
CASES["enhanced_without_rescale"] = lambda folder, slices: save(folder, [enhanced(slices, rescale=False)])


@case
def enhanced_frame_missing(folder: Path, slices: Slices) -> None:
    save(folder, [enhanced(slices[:3] + slices[4:])])


@case
def enhanced_cut(folder: Path, slices: Slices) -> None:
    path = save(folder, [enhanced(slices)])[0]
    path.write_bytes(path.read_bytes()[:-500])
