"""DICOM files whose headers are wrong or odd."""

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from .base import CASES, Build, Slices, bytes_of, case, save, synthetic_series, tagged, without_meta

CASES["no_patient_id"] = tagged(PatientID=None)
CASES["two_patients_one_series"] = tagged(0, 1, 2, PatientID="P2")
CASES["position_missing_in_one"] = tagged(4, ImagePositionPatient=None)
CASES["pixel_spacing_missing"] = tagged(PixelSpacing=None)
CASES["pixel_spacing_zero"] = tagged(PixelSpacing=[0, 0.8])
CASES["orientation_not_orthonormal"] = tagged(ImageOrientationPatient=[1, 0.2, 0, 0, 1, 0])
CASES["orientation_zero"] = tagged(ImageOrientationPatient=[0, 0, 0, 0, 0, 0])
CASES["monochrome1"] = tagged(PhotometricInterpretation="MONOCHROME1")
CASES["burned_in"] = tagged(2, BurnedInAnnotation="YES")
CASES["spectral_map"] = tagged(RescaleType="Z_EFF")
CASES["rescale_absent_in_one"] = tagged(3, RescaleIntercept=None)
CASES["raw_values_of_a_chest"] = tagged(RescaleIntercept=0)
CASES["three_samples"] = tagged(SamplesPerPixel=3)
CASES["frames_in_a_classic_image"] = tagged(NumberOfFrames=3)
CASES["eight_bits_declared"] = tagged(BitsAllocated=8, BitsStored=8, HighBit=7)
CASES["thirty_two_bits_declared"] = tagged(BitsAllocated=32, BitsStored=32, HighBit=31)
CASES["derived_reformat"] = tagged(ImageType=["DERIVED", "SECONDARY", "AXIAL"])
CASES["thickness_lies"] = tagged(SliceThickness=5, SpacingBetweenSlices=0.3, SliceLocation=7)
CASES["future_dates"] = tagged(AcquisitionDate="29991231", SeriesDate="29991231", StudyDate="29991231")
CASES["very_long_strings"] = tagged(StudyDescription="x" * 60_000, ConvolutionKernel="K" * 5_000)
CASES["pixel_data_absent_in_one"] = tagged(2, PixelData=None)
CASES["series_uid_absent"] = tagged(SeriesInstanceUID=None)


@case
def rgb(folder: Path, slices: Slices) -> None:
    for part in slices:
        part.PixelData *= 3
    tagged(PhotometricInterpretation="RGB", SamplesPerPixel=3, PlanarConfiguration=0)(folder, slices)


def spoiled(text: bytes, other: bytes, *which: int) -> Build:
    """A case that replaces bytes by as many others in the files of some slices, all when none is named."""

    def build(folder: Path, slices: Slices) -> None:
        paths = save(folder, slices)
        for path in [paths[k] for k in which] or paths:
            content = path.read_bytes()
            if text not in content or len(text) != len(other):
                raise ValueError(f"{text!r} cannot be replaced")
            path.write_bytes(content.replace(text, other))

    return build


CASES["decimal_comma"] = spoiled(b"0.8\\0.6", b"0,8\\0,6")
CASES["pixel_spacing_nan"] = spoiled(b"0.8\\0.6", b"nan\\0.6")
CASES["unknown_transfer_syntax"] = spoiled(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.9.9\0")
CASES["odd_length_field"] = lambda folder, slices: _odd(save(folder, slices))
CASES["header_cut"] = lambda folder, slices: save(folder, slices)[3].write_bytes(bytes_of(slices[3])[:300])
CASES["zero_byte_slice"] = lambda folder, slices: (save(folder, slices), (folder / "x.dcm").write_bytes(b""))
CASES["no_preamble_implicit"] = lambda folder, slices: [
    part.save_as(folder / f"a_{k}", implicit_vr=True, little_endian=True)
    for k, part in enumerate(map(without_meta, slices))
]


def _odd(paths: list[Path]) -> None:
    """A kernel of three letters with length 3: the standard wants even lengths, old writers do not care."""
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(content.replace(b"SH\x04\0B40F", b"SH\x03\0B40"))


@case
def private_tags(folder: Path, slices: Slices) -> None:
    for part in slices:
        block = part.private_block(0x0029, "SOME MAKER", create=True)
        block.add_new(0x10, "OB", bytes(range(256)) * 40)
        block.add_new(0x11, "SQ", [Dataset()])
    save(folder, slices)


@case
def oblique_and_sagittal(folder: Path, slices: Slices) -> None:
    other = synthetic_series("b")
    for stack, cosines in ((slices, [0.8, 0.6, 0, -0.6, 0.8, 0]), (other, [0, 1, 0, 0, 0, -1])):
        normal = np.cross(cosines[:3], cosines[3:])
        for k, part in enumerate(stack):
            part.ImageOrientationPatient, part.ImagePositionPatient = cosines, [float(10 + 2 * k * n) for n in normal]
    save(folder, slices)
    save(folder, other, "b")
