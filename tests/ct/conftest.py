"""A small chest-like DICOM series, and the ingest of a folder of such."""

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from mmjepa.ct.ingest import ingest_images
from mmjepa.identity import Crosswalk


def make_series(n=6, uid=None, **tags):
    """Slices of 5 x 7 noisy voxels, 0.7 x 0.8 x 2 mm."""
    uid, found = uid or generate_uid(), []
    for k in range(n):
        data = pydicom.Dataset()
        data.file_meta, data.preamble = FileMetaDataset(), bytes(128)
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = CTImageStorage, generate_uid(), uid
        data.PatientID, data.Modality, data.ImageType = "P1", "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.AcquisitionDate, data.AcquisitionTime = "20200301", "101500"
        data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-20.5, -31.0, 100.0 + 2.0 * k]
        data.PixelSpacing, data.SliceThickness, data.ConvolutionKernel = [0.7, 0.8], 5.0, "B40f"
        data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 5, 7, 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        data.PixelData = np.random.default_rng(k).integers(0, 3000, (5, 7)).astype("<u2").tobytes()
        for name, value in tags.items():
            setattr(data, name, value)
        found.append(data)
    return found


def save_series(folder, slices, prefix="s"):
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{prefix}{k:03d}" for k in range(len(slices))]
    for path, part in zip(paths, slices, strict=True):
        pydicom.dcmwrite(path, part, enforce_file_format=True)
    return paths


@pytest.fixture
def series_of():
    return make_series


@pytest.fixture
def save():
    return save_series


@pytest.fixture
def ingest(tmp_path):
    """Ingest ``tmp_path/source`` into ``tmp_path/out``."""

    def run(**options):
        options = {"crosswalk": Crosswalk.none("a salt for tests"), **options}
        return ingest_images(tmp_path / "source", tmp_path / "out", **options)

    return run
