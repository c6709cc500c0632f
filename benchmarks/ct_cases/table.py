"""The twenty rows of the contract's table: edits of any chest series."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import JPEG2000Lossless, SecondaryCaptureImageStorage

from mmjepa.keyed import generator
from synthetic.images import uid

from .base import CASES, OPTIONS, Slices, case, enhanced, save, stored, tagged

_EARLIER = len(CASES)

CASES["clean"] = save
CASES["instance_number_absent"] = tagged(InstanceNumber=None)
CASES["rescale_absent"] = tagged(RescaleSlope=None, RescaleIntercept=None)
CASES["modality_mr"] = tagged(Modality="MR")
CASES["one_slice"] = lambda folder, slices: save(folder, slices[:1])
CASES["empty_folder"] = lambda folder, slices: None
CASES["two_slices_missing"] = lambda folder, slices: save(folder, slices[:3] + slices[5:])


@case
def duplicate_slice(folder: Path, slices: Slices) -> None:
    save(folder, slices)
    slices[3].SOPInstanceUID = uid("another")
    stored(slices[3], slices[3].pixel_array[::-1])
    save(folder, slices[3:4], "x")


@case
def two_reconstructions(folder: Path, slices: Slices) -> None:
    save(folder, slices)
    for k, part in enumerate(slices):
        part.SeriesInstanceUID, part.SOPInstanceUID = uid("other kernel"), uid("other kernel", k)
        stored(part, part.pixel_array[::-1])
    save(folder, slices, "b")


@case
def instance_number_scrambled(folder: Path, slices: Slices) -> None:
    for part, number in zip(slices, generator(0, "scrambled").permutation(len(slices)), strict=True):
        part.InstanceNumber = int(number)
    save(folder, slices)


@case
def one_truncated_file(folder: Path, slices: Slices) -> None:
    path = save(folder, slices)[4]
    path.write_bytes(path.read_bytes()[: -len(slices[4].PixelData) // 2])


@case
def junk_files(folder: Path, slices: Slices) -> None:
    save(folder, slices)
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" * 100)
    (folder / "readme.txt").write_text("nothing here")
    (folder / "x.dcm").write_bytes(b"not DICOM whatever its name says" * 20)


@case
def localizer_same_uid(folder: Path, slices: Slices) -> None:
    save(folder, slices)
    scout = slices[0]
    scout.ImageType, scout.SOPInstanceUID = ["ORIGINAL", "PRIMARY", "LOCALIZER"], uid("scout")
    scout.ImageOrientationPatient, scout.ImagePositionPatient = [1, 0, 0, 0, 0, -1], [-100, 0, 50]
    save(folder, [scout], "x")


@case
def intercept_per_slice(folder: Path, slices: Slices) -> None:
    for k, part in enumerate(slices):
        part.RescaleIntercept = -1024 - k % 5
    save(folder, slices)


@case
def one_slice_of_another_matrix(folder: Path, slices: Slices) -> None:
    stored(slices[3], slices[3].pixel_array[::2, ::2].copy())
    save(folder, slices)


def _placed(slices: Slices, heights_mm: Sequence[float], sideways: float) -> Slices:
    for part, height in zip(slices, heights_mm, strict=True):
        part.ImageOrientationPatient, part.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-100, sideways * height, height]
    return slices


@case
def tilted(folder: Path, slices: Slices) -> None:
    save(folder, _placed(slices, [2.371 * k for k in range(len(slices))], float(np.tan(np.radians(18.5)))))


@case
def tilted_and_irregular(folder: Path, slices: Slices) -> None:
    steps = [5.0 if k < len(slices) // 2 else 7.5 for k in range(len(slices))]
    save(folder, _placed(slices, list(np.cumsum(steps)), 0.3))


@case
def exam_summary(folder: Path, slices: Slices) -> None:
    page = slices[0]
    page.SOPClassUID = page.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    save(folder, [page])


@case
def jpeg2000_without_class(folder: Path, slices: Slices) -> None:
    for k, part in enumerate(slices[:8]):
        part.compress(JPEG2000Lossless, generate_instance_uid=False)
        part.SOPClassUID = ""
        pydicom.dcmwrite(folder / f"a_{k}.dcm", part)  # as it is: the class stays in the file meta alone


CASES["enhanced_two_frames"] = lambda folder, slices: save(folder, [enhanced(slices[2:4])])
TABLE = tuple(CASES)[_EARLIER:]
OPTIONS["enhanced_two_frames"] = {"min_slices": 2}
