"""Voxels that need no decoder are read from the file's bytes, and are what pydicom decodes."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

from mmjepa.ct.dicom import CT_IMAGE, read_header
from mmjepa.ct.pixels import Opened
from mmjepa.refusal import Refusal

SHAPE = (5, 7)


def write(path: Path, words: np.ndarray, bits: int, signed: bool, syntax: str, shape=SHAPE) -> None:
    data = pydicom.Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = CT_IMAGE, generate_uid(), generate_uid()
    data.PatientID, data.Modality = "P", "CT"
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = *shape, 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, bits, bits - 1, int(signed)
    data.RescaleSlope, data.RescaleIntercept = 1, 0
    data.PixelData = words.astype("<u2").tobytes()
    buffer = BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    path.write_bytes(buffer.getvalue())


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(1, 16),
    signed=st.booleans(),
    syntax=st.sampled_from([ExplicitVRLittleEndian, ImplicitVRLittleEndian]),
    seed=st.integers(0, 2**31),
)
def test_words_of_any_width_and_sign_equal_pydicoms_even_with_rubbish_in_unused_bits(
    bits, signed, syntax, seed, tmp_path_factory
):
    path = tmp_path_factory.mktemp("plain") / "a.dcm"
    write(path, np.random.default_rng(seed).integers(0, 2**16, SHAPE), bits, signed, syntax)
    part = read_header(path, 1)
    assert part.plain is not None
    found = part.plain.voxels(path.read_bytes(), part.shape)
    np.testing.assert_array_equal(found, pydicom.dcmread(path).pixel_array)


@pytest.mark.parametrize("cut", [1, 40, 69])
def test_a_file_cut_in_its_voxels_is_corrupt(cut, tmp_path):
    write(tmp_path / "a.dcm", np.zeros(SHAPE), 12, False, ExplicitVRLittleEndian)
    part = read_header(tmp_path / "a.dcm", 1)
    (tmp_path / "a.dcm").write_bytes((tmp_path / "a.dcm").read_bytes()[:-cut])
    with pytest.raises(Refusal, match="CT_PIXEL_CORRUPT"):
        Opened(part, 1).hu(part, 1, None)


def test_voxels_of_another_size_than_the_header_says_are_left_to_the_decoder(tmp_path):
    write(tmp_path / "a.dcm", np.zeros((5, 6)), 16, True, ExplicitVRLittleEndian)
    part = read_header(tmp_path / "a.dcm", 1)
    assert part.plain.voxels((tmp_path / "a.dcm").read_bytes(), SHAPE) is None
    with pytest.raises(Refusal, match="CT_PIXEL_CORRUPT"):
        Opened(part, 1).hu(part, 1, None)


def test_a_file_that_changed_since_its_header_was_read_is_not_believed(tmp_path):
    words = np.arange(35).reshape(SHAPE)
    write(tmp_path / "a.dcm", words, 16, False, ExplicitVRLittleEndian)
    part = read_header(tmp_path / "a.dcm", 1)
    content = (tmp_path / "a.dcm").read_bytes()
    assert part.plain.voxels(b"\0\0" + content, SHAPE) is None
    np.testing.assert_array_equal(part.plain.voxels(content, SHAPE), words)
