"""Image files: NIfTI or DICOM series that read back to the rendered HU and geometry exactly."""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import nibabel
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from synthetic.draws import Array, generator

FORMATS = ("nifti", "dicom")
_INTERCEPT_HU = -1024


@dataclass(frozen=True)
class Scan:
    """One CT as a hospital holds it: source patient and date, voxels int16 HU [X, Y, Z] in RAS+, 1 mm.

    name: made-up name of the file or folder. uid: SeriesInstanceUID (DICOM only). origin_mm: RAS of voxel (0, 0, 0).
    protocol: contrast, thickness_mm and kernel, one record of ``synthetic.ct.parameters``.
    """

    name: str
    uid: UID
    patient_id: str
    female: bool
    time: datetime
    origin_mm: tuple[float, float, float]
    voxels: Array
    protocol: dict

    @property
    def affine(self) -> Array:
        """RAS+ affine, [4, 4]."""
        affine = np.eye(4)
        affine[:3, 3] = self.origin_mm
        return affine


def digest(*key: int | str) -> bytes:
    """32 bytes that depend on every part of the key."""
    return hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()


def uid(*key: int | str) -> UID:
    """A DICOM UID under the 2.25 root (a 128-bit number), fixed by the key."""
    return UID(f"2.25.{int.from_bytes(digest('uid', *key)[:16], 'big')}")


def origin_mm(seed: int, subject: int) -> tuple[float, float, float]:
    """A place in the chest for the patch's first voxel, on a half-millimetre grid."""
    x, y, z = np.round(generator(seed, "ct/place", subject).uniform((-120, -100, -250), (90, 60, 0)) * 2) / 2
    return float(x), float(y), float(z)


def image_id(salt: str, scan_key: str) -> str:
    """The cohort's id of an image: salted hash of its SeriesInstanceUID, or of its path relative to images.csv."""
    return hashlib.sha256((salt + scan_key).encode()).hexdigest()[:16]


def write_nifti(scan: Scan, folder: Path) -> None:
    """``<name>.nii`` with both transforms set."""
    image = nibabel.Nifti1Image(scan.voxels, scan.affine)
    image.set_sform(scan.affine, code=1)
    image.set_qform(scan.affine, code=1)
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, folder / f"{scan.name}.nii")


def write_dicom(scan: Scan, folder: Path) -> None:
    """``<name>/0001.dcm`` ...: one axial slice a file, numbered from the head down as scanners do."""
    series = folder / scan.name
    series.mkdir()
    header = _series_header(scan)
    x, y, z = scan.origin_mm
    columns, rows, depth = scan.voxels.shape
    # DICOM is LPS: a row of pixels runs to the patient's left and the rows to the back, so both RAS axes are flipped
    stored = (scan.voxels[::-1, ::-1].transpose(2, 1, 0).astype(np.int32) - _INTERCEPT_HU).astype("<u2")
    for k in range(depth):
        header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = uid(scan.uid, k)
        header.InstanceNumber = depth - k
        header.ImagePositionPatient = [-(x + columns - 1), -(y + rows - 1), z + k]
        header.SliceLocation = z + k
        header.PixelData = stored[k].tobytes()
        header.save_as(series / f"{depth - k:04d}.dcm", enforce_file_format=True)


def _series_header(scan: Scan) -> Dataset:
    """Everything the slices of a series share."""
    header, meta = Dataset(), FileMetaDataset()
    meta.MediaStorageSOPClassUID = header.SOPClassUID = CTImageStorage
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta = meta
    header.SpecificCharacterSet = "ISO_IR 192"
    header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    header.Modality, header.BodyPartExamined, header.PatientPosition = "CT", "CHEST", "HFS"
    header.Manufacturer, header.ManufacturerModelName = "Synthetic", "World"
    header.PatientID, header.PatientName, header.PatientBirthDate = scan.patient_id, "", ""
    header.PatientSex = "F" if scan.female else "M"
    for part in ("Study", "Series", "Acquisition", "Content"):
        setattr(header, f"{part}Date", scan.time.strftime("%Y%m%d"))
        setattr(header, f"{part}Time", scan.time.strftime("%H%M%S"))
    header.AccessionNumber, header.ReferringPhysicianName, header.StudyID = "", "", "1"
    header.StudyInstanceUID, header.SeriesInstanceUID = uid(scan.uid, "study"), scan.uid
    header.FrameOfReferenceUID, header.PositionReferenceIndicator = uid(scan.uid, "frame"), ""
    header.SeriesNumber, header.AcquisitionNumber = 1, 1
    header.KVP, header.ConvolutionKernel = 120, scan.protocol["kernel"].upper()
    header.ContrastBolusAgent = "IODINE" if scan.protocol["contrast"] else ""
    header.SliceThickness = scan.protocol["thickness_mm"]
    header.PixelSpacing, header.ImageOrientationPatient = [1, 1], [1, 0, 0, 0, 1, 0]
    header.Columns, header.Rows = scan.voxels.shape[:2]
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 16, 15, 0
    header.RescaleIntercept, header.RescaleSlope, header.RescaleType = _INTERCEPT_HU, 1, "HU"
    header.BurnedInAnnotation = "NO"
    return header
