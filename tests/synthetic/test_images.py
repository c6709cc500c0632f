"""Image files read back to the same HU and geometry."""

import re
from dataclasses import replace
from datetime import datetime
from itertools import pairwise

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from synthetic import images
from synthetic.draws import generator

GEOMETRIES = [(32, 1.0), (48, 0.7), (64, 0.9), (32, 2.0)]
LPS = np.diag([-1.0, -1, 1, 1])
# type 1 and 2 elements of the modules of the CT Image IOD (PS3.3 A.3): these must have a value ...
VALUED = """
    SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID Modality PatientPosition FrameOfReferenceUID ImageType
    SamplesPerPixel PhotometricInterpretation Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation PixelData
    PixelSpacing ImageOrientationPatient ImagePositionPatient RescaleIntercept RescaleSlope RescaleType InstanceNumber
""".split()  # noqa: SIM905
# ... and these must be there
PRESENT = """
    PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime ReferringPhysicianName StudyID AccessionNumber
    SeriesNumber PositionReferenceIndicator Manufacturer AcquisitionNumber KVP SliceThickness ContentDate ContentTime
""".split()  # noqa: SIM905


def scan(size=32, voxel_mm=1.0, key=0, **protocol):
    voxels = generator(0, "voxels", key).integers(-1024, 3072, (size, size + 1, size - 2)).astype(np.int16)
    return images.Scan(
        name=f"scan{key}",
        uid=images.uid("series", key),
        patient_id="HX1234567",
        sex="F",
        time=datetime(2019, 3, 4, 5, 6, 7),
        origin_mm=images.origin_mm(0, key),
        voxels=voxels,
        protocol={"contrast": True, "kernel": "sharp", "thickness_mm": 2.5, "voxel_mm": voxel_mm} | protocol,
    )


def slices(folder):
    return [pydicom.dcmread(path) for path in sorted(folder.iterdir())]


def dataset_bytes(path):
    """What follows the file meta information, by its group length: 12 bytes of that element after the first 132."""
    return path.read_bytes()[144 + pydicom.dcmread(path).file_meta.FileMetaInformationGroupLength :]


@pytest.mark.parametrize(("size", "voxel_mm"), GEOMETRIES)
def test_nifti_reads_back_to_the_same_hu_and_affine(size, voxel_mm, tmp_path):
    one = scan(size, voxel_mm)
    images.write_nifti(one, tmp_path)
    read = nibabel.load(tmp_path / "scan0.nii")
    assert np.asarray(read.dataobj).dtype == np.int16
    assert (np.asarray(read.dataobj) == one.voxels).all()
    assert np.allclose(read.affine, one.affine, atol=1e-5)
    assert np.allclose(read.get_qform(), one.affine, atol=1e-5)
    assert np.allclose(read.header.get_zooms(), (voxel_mm, voxel_mm, 1))
    itk = SimpleITK.ReadImage(tmp_path / "scan0.nii")
    assert (one.voxels == SimpleITK.GetArrayFromImage(itk).T).all()
    assert np.allclose(itk.TransformIndexToPhysicalPoint((3, 5, 7)), (LPS @ one.affine @ [3, 5, 7, 1])[:3], atol=1e-4)


@pytest.mark.parametrize(("size", "voxel_mm"), GEOMETRIES)
def test_dicom_reads_back_to_the_same_hu_and_affine_in_two_readers(size, voxel_mm, tmp_path):
    one = scan(size, voxel_mm)
    images.write_dicom(one, tmp_path)
    columns, rows, _ = one.voxels.shape
    stack = sorted(slices(tmp_path / "scan0"), key=lambda s: s.ImagePositionPatient[2])
    hu = np.stack([s.pixel_array * float(s.RescaleSlope) + float(s.RescaleIntercept) for s in stack])
    assert (hu.transpose(2, 1, 0)[::-1, ::-1] == one.voxels).all()
    for k, s in enumerate(stack):
        far_corner = LPS @ one.affine @ [columns - 1, rows - 1, k, 1]  # its first pixel: both in-plane axes are flipped
        assert np.allclose([float(v) for v in s.ImagePositionPatient], far_corner[:3], atol=1e-6)
        assert [float(v) for v in s.PixelSpacing] == [voxel_mm, voxel_mm]
        assert s.SliceLocation == s.ImagePositionPatient[2]
        assert s.InstanceNumber == len(stack) - k
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "scan0")))
    itk = reader.Execute()
    assert (SimpleITK.GetArrayFromImage(itk) == hu).all()
    assert np.allclose(itk.GetSpacing(), (voxel_mm, voxel_mm, 1))
    first = itk.TransformIndexToPhysicalPoint((columns - 1, rows - 1, 0))
    assert np.allclose(first, (LPS @ one.affine)[:3, 3], atol=1e-5)


def test_every_slice_is_a_valid_ct_image(tmp_path):
    for key, contrast in enumerate((True, False)):
        images.write_dicom(scan(key=key, contrast=contrast), tmp_path)
        for s in slices(tmp_path / f"scan{key}"):
            assert all(s[name].value not in (None, "", b"") for name in VALUED)
            assert all(name in s for name in PRESENT)
            assert ("ContrastBolusAgent" in s) == contrast  # the module is there when an agent was given, and only then
            assert (s.SOPClassUID, s.Modality) == (CTImageStorage, "CT")
            assert (s.SamplesPerPixel, s.BitsAllocated, s.BitsStored, s.HighBit, s.PixelRepresentation) == (
                1,
                16,
                16,
                15,
                0,
            )
            assert len(s.PixelData) == s.Rows * s.Columns * 2
            tags = [e.tag for e in s]
            assert tags == sorted(tags)
            for element in s:
                if element.VR == "DS":
                    values = [element.value] if element.VM < 2 else element.value
                    assert all(len(str(v)) <= 16 for v in values)


def test_the_files_meta_information_is_whole_and_its_length_right(tmp_path):
    images.write_dicom(scan(), tmp_path)
    for path in (tmp_path / "scan0").iterdir():
        assert path.read_bytes()[:132] == bytes(128) + b"DICM"
        s = pydicom.dcmread(path)
        pydicom.dataset.validate_file_meta(s.file_meta, enforce_standard=True)
        assert dataset_bytes(path)[:4] == b"\x08\x00\x05\x00"  # its first element, the character set
        assert s.file_meta.MediaStorageSOPInstanceUID == s.SOPInstanceUID
        assert s.file_meta.MediaStorageSOPClassUID == CTImageStorage
        assert s.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian


def test_rewriting_a_slice_with_pydicom_changes_no_byte_of_its_dataset(tmp_path):
    images.write_dicom(scan(), tmp_path)
    path = tmp_path / "scan0" / "0007.dcm"
    pydicom.dcmread(path).save_as(tmp_path / "again.dcm", enforce_file_format=True)
    first, again = (dataset_bytes(p) for p in (path, tmp_path / "again.dcm"))
    assert first == again


def test_uids_are_valid_and_no_two_scans_share_one(tmp_path):
    seen = []
    for key in range(3):
        images.write_dicom(scan(key=key), tmp_path)
        stack = slices(tmp_path / f"scan{key}")
        assert len({(s.SeriesInstanceUID, s.StudyInstanceUID, s.FrameOfReferenceUID) for s in stack}) == 1
        first = stack[0]
        seen += [first.SeriesInstanceUID, first.StudyInstanceUID, first.FrameOfReferenceUID]
        seen += [s.SOPInstanceUID for s in stack]
    assert len(set(seen)) == len(seen)
    assert all(u.is_valid and re.fullmatch(r"2\.25\.[1-9]\d{0,38}", u) for u in seen)


def test_the_header_says_how_the_scan_was_made(tmp_path):
    images.write_dicom(scan(kernel="smooth", thickness_mm=4.0), tmp_path)
    s = slices(tmp_path / "scan0")[0]
    assert (s.ConvolutionKernel, s.SliceThickness, s.PatientID, s.PatientSex) == ("SMOOTH", 4, "HX1234567", "F")
    assert {
        s[f"{part}Date"].value + s[f"{part}Time"].value for part in ("Study", "Series", "Acquisition", "Content")
    } == {"20190304050607"}


def test_the_same_scan_gives_the_same_bytes(tmp_path):
    for where in ("a", "b"):
        (tmp_path / where).mkdir()
        images.write_dicom(scan(), tmp_path / where)
        images.write_nifti(replace(scan(), name="n"), tmp_path / where)
    a, b = ([p.read_bytes() for p in sorted((tmp_path / w).rglob("*")) if p.is_file()] for w in ("a", "b"))
    assert a == b


def test_slices_lie_one_millimetre_apart(tmp_path):
    images.write_dicom(scan(), tmp_path)
    z = [float(s.ImagePositionPatient[2]) for s in slices(tmp_path / "scan0")]
    assert all(above - below == 1 for above, below in pairwise(z))  # file 0001 is nearest the head
