"""Several series, patients and other files in one folder."""

import gzip
from io import BytesIO
from pathlib import Path

import pydicom
from pydicom.uid import UID

from synthetic.images import uid

from .base import CASES, Slices, bytes_of, case, save, synthetic_series

MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"


@case
def two_patients(folder: Path, slices: Slices) -> None:
    save(folder, slices)
    save(folder, synthetic_series("b", "P2"), "b")


@case
def bad_beside_good(folder: Path, slices: Slices) -> None:
    save(folder / "good", slices)
    other = synthetic_series("b", "P2")
    save(folder / "bad", other[:3] + other[5:], "x")


def _acquisitions(folder: Path, slices: Slices, number: int) -> None:
    other = synthetic_series("b")
    for k, part in enumerate(other):
        part.SeriesInstanceUID, part.SOPInstanceUID = slices[0].SeriesInstanceUID, uid("second acquisition", k)
        part.AcquisitionNumber = number
    save(folder, slices)
    save(folder, other, "b")


CASES["two_acquisitions"] = lambda folder, slices: _acquisitions(folder, slices, 2)
CASES["two_acquisitions_of_one_number"] = lambda folder, slices: _acquisitions(folder, slices, 1)
CASES["copied_file"] = lambda folder, slices: (save(folder, slices), save(folder, slices[2:3], "x"))
CASES["names_not_ascii"] = lambda folder, slices: save(folder / "Größe 胸部 é\u0301", slices)
CASES["folder_named_dcm"] = lambda folder, slices: save(folder / "1.dcm" / "2.nii", slices)
CASES["folders_in_a_loop"] = lambda folder, slices: (save(folder, slices), (folder / "loop").symlink_to(folder))
CASES["link_to_itself"] = lambda folder, slices: (save(folder, slices), (folder / "x").symlink_to(folder / "x"))
CASES["link_to_nothing"] = lambda folder, slices: (save(folder, slices), (folder / "x").symlink_to(folder / "gone"))
CASES["gzip_of_dicom"] = lambda folder, slices: (folder / "a.dcm.gz").write_bytes(gzip.compress(bytes_of(slices[0])))


@case
def ten_thousand_tiny_files(folder: Path, slices: Slices) -> None:
    save(folder, slices)
    for k in range(10_000):
        (folder / f"{k:05d}").write_bytes(b"%d" % k)


@case
def dicomdir(folder: Path, slices: Slices) -> None:
    save(folder, slices)
    listing = pydicom.dcmread(BytesIO(bytes_of(slices[0])))
    listing.clear()
    listing.SOPClassUID = listing.file_meta.MediaStorageSOPClassUID = UID(MEDIA_DIRECTORY)
    listing.FileSetID, listing.DirectoryRecordSequence = "SET", []
    pydicom.dcmwrite(folder / "DICOMDIR", listing)
