"""What adds up or hides along a volume: small drifts, mixed reconstructions, surplus and odd voxels, lost end slices."""

import os
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

from .base import CASES, Slices, case, save, stored, synthetic_series, tagged
from .voxels import declared, packed

CASES["body_part_head"] = tagged(BodyPartExamined="HEAD")
CASES["date_in_the_year_one"] = tagged(AcquisitionDate="00010101")
CASES["more_rows_than_announced"] = tagged(Rows=20)


def _placed(slices: Slices, sideways_mm: float, heights_mm: list[float]) -> Slices:
    for k, (part, height) in enumerate(zip(slices, heights_mm, strict=True)):
        part.ImagePositionPatient = [-20.5, 31.0 + sideways_mm * k, -100.0 + float(height)]
    return slices


@case
def sideways_drift(folder: Path, slices: Slices) -> None:
    """Under 5 % of a step each, two voxels in all."""
    save(folder, _placed(synthetic_series(depth=40), 0.049, [float(k) for k in range(40)]))


@case
def steps_that_add_up(folder: Path, slices: Slices) -> None:
    heights = [0.0, *np.cumsum([1.0] * 20 + [1.09] * 19)]
    save(folder, _placed(synthetic_series(depth=40), 0, heights))


@case
def steps_that_differ_a_little(folder: Path, slices: Slices) -> None:
    steps = [1.0, 1.0, 1.0, 1.04, 1.0, 1.0, 1.04]
    save(folder, _placed(slices, 0, [0.0, *np.cumsum(steps)][: len(slices)]))


@case
def interleaved_reconstructions(folder: Path, slices: Slices) -> None:
    for part in slices[1::2]:
        part.ConvolutionKernel, part.SliceThickness = "B70F", 1
    save(folder, slices[::2])
    save(folder, slices[1::2], "b")


@case
def rounding_noise(folder: Path, slices: Slices) -> None:
    for k, part in enumerate(slices):
        cosine = 0.80005001 if k % 2 else 0.80004999
        sine = round((1 - cosine**2) ** 0.5, 8)
        part.ImageOrientationPatient = [cosine, sine, 0, -sine, cosine, 0]
        part.PixelSpacing = [0.8, 0.6000001 if k % 2 else 0.6]
    save(folder, slices)


@case
def torn_by_its_spacing(folder: Path, slices: Slices) -> None:
    for part in slices[1::2]:
        part.PixelSpacing = [0.8, 0.601]
    save(folder, slices)


@case
def run_length_that_expands(folder: Path, slices: Slices) -> None:
    """Two segments that unpack to 64 MB each, in a slice of a few thousand voxels."""
    segment = b"\x81\x00" * (1 << 19)
    frame = np.array([2, 64, 64 + len(segment), *[0] * 13], "<u4").tobytes() + 2 * segment
    for part in slices:
        part.compress(RLELossless, generate_instance_uid=False)
        part.PixelData = pydicom.encaps.encapsulate([frame])
    save(folder, slices)


@case
def deflated_stream_cut(folder: Path, slices: Slices) -> None:
    packed(DeflatedExplicitVRLittleEndian)(folder, slices)
    path = folder / "a_3.dcm"
    path.write_bytes(path.read_bytes()[:-60] + bytes(60))


@case
def sparse_tail(folder: Path, slices: Slices) -> None:
    os.truncate(save(folder, slices)[2], 3 << 30)


@case
def end_slice_empty(folder: Path, slices: Slices) -> None:
    save(folder, slices[:-1])
    (folder / "x").touch()


@case
def end_slice_cut(folder: Path, slices: Slices) -> None:
    save(folder, slices[:-1])
    path = save(folder, slices[-1:], "x")[0]
    path.write_bytes(path.read_bytes()[:200])


@case
def padding_among_values(folder: Path, slices: Slices) -> None:
    """A value that many voxels and their neighbours by one hold."""
    for part in slices:
        raw = part.pixel_array.copy()
        raw[:9] = np.arange(9 * raw.shape[1]).reshape(9, -1) % 5 + 1022
        stored(part, raw)
    save(folder, declared(slices, 1024))


@case
def rubbish_in_unused_bits(folder: Path, slices: Slices) -> None:
    """In some voxels, and never so high that no gate would take them for HU."""
    for part in slices:
        raw = part.pixel_array.astype(np.uint16)
        part.BitsStored, part.HighBit = 12, 11
        stored(part, raw | (np.arange(raw.size).reshape(raw.shape) % 64 // 57 << 12).astype(np.uint16))
    save(folder, slices)


@case
def fractional_slope(folder: Path, slices: Slices) -> None:
    for part in slices:
        part.RescaleSlope, part.RescaleIntercept = 0.7, -1023.9
    save(folder, slices)


@case
def stored_in_32_bits(folder: Path, slices: Slices) -> None:
    for part in slices:
        raw = part.pixel_array.astype("<i4") + 1_000_000_000
        part.BitsAllocated, part.BitsStored, part.HighBit, part.PixelRepresentation = 32, 32, 31, 1
        part.PixelData, part.RescaleIntercept = raw.tobytes(), -1_000_001_024
    save(folder, slices)
