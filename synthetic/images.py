"""Image files: NIfTI or DICOM series that read back to the rendered HU and geometry exactly."""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import nibabel
import numpy as np
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_data_element
from pydicom.tag import Tag
from pydicom.uid import PYDICOM_IMPLEMENTATION_UID, UID, CTImageStorage, ExplicitVRLittleEndian

from synthetic.draws import Array, generator

FORMATS = ("nifti", "dicom")
_INTERCEPT_HU = -1024


@dataclass(frozen=True)
class Scan:
    """One CT as a hospital holds it: source patient and date, voxels int16 HU [X, Y, Z] in RAS+.

    name: made-up name of the file or folder. sex: F, M or empty. uid: SeriesInstanceUID (DICOM only). origin_mm: RAS of voxel (0, 0, 0).
    protocol: contrast, thickness_mm, kernel and voxel_mm (in the plane; slices are 1 mm apart), one record of
    ``synthetic.ct.parameters``.
    """

    name: str
    uid: UID
    patient_id: str
    sex: str
    time: datetime
    origin_mm: tuple[float, float, float]
    voxels: Array
    protocol: dict

    @property
    def affine(self) -> Array:
        """RAS+ affine, [4, 4]."""
        affine = np.diag([self.protocol["voxel_mm"], self.protocol["voxel_mm"], 1.0, 1.0])
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
    # a slice differs from the next in few elements: the others are encoded once
    meta, header = _encoded(_file_meta()), _encoded(_series_header(scan))
    (x, y, z), mm = scan.origin_mm, scan.protocol["voxel_mm"]
    columns, rows, depth = scan.voxels.shape
    # DICOM is LPS: a row of pixels runs to the patient's left and the rows to the back, so both RAS axes are flipped
    corner = [round(-(x + (columns - 1) * mm), 6), round(-(y + (rows - 1) * mm), 6)]
    stored = (scan.voxels[::-1, ::-1].transpose(2, 1, 0).astype(np.int32) - _INTERCEPT_HU).astype("<u2")
    for k in range(depth):
        name, own = uid(scan.uid, k), Dataset()
        own.SOPInstanceUID = name
        own.InstanceNumber, own.SliceLocation = depth - k, z + k
        own.ImagePositionPatient = [*corner, z + k]
        own.add(DataElement(Tag("PixelData"), "OW", stored[k].tobytes()))
        named = FileMetaDataset()
        named.MediaStorageSOPInstanceUID = name
        preface = _joined(meta | _encoded(named))
        length = FileMetaDataset()
        length.FileMetaInformationGroupLength = len(preface)
        whole = [bytes(128), b"DICM", _joined(_encoded(length)), preface, _joined(header | _encoded(own))]
        (series / f"{depth - k:04d}.dcm").write_bytes(b"".join(whole))


def _joined(elements: dict[int, bytes]) -> bytes:
    return b"".join(elements[tag] for tag in sorted(elements))


def _encoded(dataset: Dataset) -> dict[int, bytes]:
    """Each element in explicit little endian, by tag."""
    encoded = {}
    for element in dataset:
        buffer = DicomBytesIO()
        buffer.is_little_endian, buffer.is_implicit_VR = True, False
        write_data_element(buffer, element)
        encoded[int(element.tag)] = buffer.getvalue()
    return encoded


def _file_meta() -> FileMetaDataset:
    """File meta information but for its length and the slice's own UID."""
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\0\1"
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
    meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
    return meta


def _series_header(scan: Scan) -> Dataset:
    """Everything the slices of a series share."""
    header = Dataset()
    header.SOPClassUID = CTImageStorage
    header.SpecificCharacterSet = "ISO_IR 192"
    header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    header.Modality, header.BodyPartExamined, header.PatientPosition = "CT", "CHEST", "HFS"
    header.Manufacturer, header.ManufacturerModelName = "Synthetic", "World"
    header.PatientID, header.PatientName, header.PatientBirthDate = scan.patient_id, "", ""
    header.PatientSex = scan.sex
    for part in ("Study", "Series", "Acquisition", "Content"):
        setattr(header, f"{part}Date", scan.time.strftime("%Y%m%d"))
        setattr(header, f"{part}Time", scan.time.strftime("%H%M%S"))
    header.AccessionNumber, header.ReferringPhysicianName, header.StudyID = "", "", "1"
    header.StudyInstanceUID, header.SeriesInstanceUID = uid(scan.uid, "study"), scan.uid
    header.FrameOfReferenceUID, header.PositionReferenceIndicator = uid(scan.uid, "frame"), ""
    header.SeriesNumber, header.AcquisitionNumber = 1, 1
    header.KVP, header.ConvolutionKernel = 120, scan.protocol["kernel"].upper()
    if scan.protocol["contrast"]:
        header.ContrastBolusAgent = "IODINE"
    header.SliceThickness = scan.protocol["thickness_mm"]
    header.PixelSpacing, header.ImageOrientationPatient = [scan.protocol["voxel_mm"]] * 2, [1, 0, 0, 0, 1, 0]
    header.Columns, header.Rows = scan.voxels.shape[:2]
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 16, 15, 0
    header.RescaleIntercept, header.RescaleSlope, header.RescaleType = _INTERCEPT_HU, 1, "HU"
    header.WindowCenter, header.WindowWidth = -600, 1500
    header.BurnedInAnnotation = "NO"
    return header
