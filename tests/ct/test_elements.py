"""A header read straight from its bytes says what pydicom says, or is left to pydicom; what is deflated stays within bounds."""

import tracemalloc
import zlib
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

from mmjepa.ct import elements
from mmjepa.ct.dicom import CT_IMAGE, Slice, read_header
from mmjepa.ct.ingest import ingest_images
from mmjepa.ct.volume import shifted_hu, to_hu
from mmjepa.identity import Crosswalk
from mmjepa.refusal import Refusal

SHAPE = (5, 7)
DECIMALS = st.one_of(st.integers(-3000, 3000).map(str), st.floats(-1e4, 1e4).map(lambda x: f"{x:.6g}"), st.sampled_from(
    ["", "nan", "1_0", "1e400", " 2.5 ", "+.5", "x", "1\\2", "-1024.000000000000000"]))  # fmt: skip
WORDS = st.one_of(st.text("AB 9_\\", max_size=8), st.sampled_from(["é", "CT", "\x1b", " a\0 ", "a\0"]))


def image(syntax=ExplicitVRLittleEndian, uid=None, place=0, **tags):
    data = pydicom.Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = CT_IMAGE, generate_uid(), uid or generate_uid()
    data.PatientID, data.Modality, data.ImageType = "P", "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 2.0 * place]
    data.PixelSpacing, data.AcquisitionNumber = [0.7, 0.7], 3
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = *SHAPE, 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    data.PixelData = np.random.default_rng(place).integers(0, 3000, SHAPE).astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    return data


def content_of(data) -> bytes:
    buffer = BytesIO()
    with pydicom.config.disable_value_validation():
        data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def both(path: Path, content: bytes):
    """The header as bytes tell it and as pydicom does; and whether the bytes were enough."""
    path.write_bytes(content)
    quick, general = elements.read, []
    for read in (quick, lambda content: None):
        elements.read = read
        try:
            general.append(read_header(path, 1))
        except Refusal as refusal:
            general.append((refusal.code, refusal.message))
        finally:
            elements.read = quick
    return (*general, quick(content) is not None)


def nested(undefined_items=True):
    inner = pydicom.Dataset()
    inner.CodeMeaning, inner.PixelSpacing = "inside", [9, 9]
    middle = pydicom.Dataset()
    middle.ConceptNameCodeSequence = Sequence([inner, inner])
    for sequence in (middle, inner):
        sequence.is_undefined_length_sequence_item = undefined_items
    middle["ConceptNameCodeSequence"].is_undefined_length = True
    return Sequence([middle])


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize(("undefined", "items"), [(True, True), (True, False), (False, True), (False, False)])
def test_usual_headers_with_sequences_need_no_general_parser(tmp_path, syntax, undefined, items):
    data = image(
        syntax, AnatomicRegionSequence=nested(items), SourceImageSequence=Sequence([]), PixelPaddingValue=63536
    )
    data["AnatomicRegionSequence"].is_undefined_length = undefined
    quick, general, enough = both(tmp_path / "a", content_of(data))
    assert enough
    assert isinstance(quick, Slice)
    assert quick == general


@pytest.mark.filterwarnings("ignore:Found unknown escape")
@settings(deadline=None, max_examples=100)
@given(
    tags=st.fixed_dictionaries({}, optional={
        "PatientID": WORDS, "BodyPartExamined": WORDS, "ConvolutionKernel": WORDS, "ImageType": WORDS, "Modality": WORDS,
        "Manufacturer": WORDS, "RescaleType": WORDS, "RescaleSlope": DECIMALS, "RescaleIntercept": DECIMALS,
        "SliceThickness": DECIMALS, "PixelSpacing": st.lists(DECIMALS, max_size=3).map("\\".join),
        "AcquisitionNumber": st.sampled_from(["", "007", "3 ", "-1", "4", "5\\6"]),
        "AcquisitionDateTime": st.sampled_from(["20200301101500.5", "2020", "20200301", "20201301101561"]),
    }),
    syntax=st.sampled_from([ExplicitVRLittleEndian, ImplicitVRLittleEndian]),
)  # fmt: skip
def test_any_values_are_read_as_pydicom_reads_them(tags, syntax, tmp_path_factory):
    data = image(syntax)
    with pydicom.config.disable_value_validation():
        for name, value in tags.items():
            vr = pydicom.datadict.dictionary_VR(name)
            raw = value.encode("latin-1")
            raw += b" " * (len(raw) % 2)
            tag = pydicom.tag.Tag(name)
            implicit = syntax == ImplicitVRLittleEndian
            data._dict[tag] = pydicom.dataelem.RawDataElement(tag, vr, len(raw), raw, 0, implicit, True)
    quick, general, _ = both(tmp_path_factory.mktemp("values") / "a", content_of(data))
    assert quick == general


def test_a_value_of_another_representation_than_usual_is_read_as_what_it_is(tmp_path):
    data = image(AcquisitionNumber=7)
    data["AcquisitionNumber"].VR = "US"
    data["AcquisitionNumber"].value = int.from_bytes(b"12", "little")
    quick, general, _ = both(tmp_path / "a", content_of(data))
    assert quick == general
    assert quick.acquisition[0] == "12849"


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 2**32), flips=st.integers(1, 4), cut=st.booleans())
def test_damaged_headers_are_read_as_pydicom_reads_them(seed, flips, cut, tmp_path_factory):
    rng = np.random.default_rng(seed)
    syntax = [ExplicitVRLittleEndian, ImplicitVRLittleEndian][seed % 2]
    content = bytearray(content_of(image(syntax, AnatomicRegionSequence=nested())))
    for place in rng.integers(128, len(content) - 70, flips):
        content[place] = rng.integers(256)
    if cut:
        del content[rng.integers(128, len(content)) :]
    path = tmp_path_factory.mktemp("damage") / "a"
    quick, general, enough = both(path, bytes(content))
    if enough:
        assert quick == general


@pytest.mark.real_data
def test_every_real_header_needs_no_general_parser(data_folder):
    paths = sorted((data_folder / "chest_ct").rglob("*.dcm"))
    assert paths
    for path in paths[::5]:
        head = path.read_bytes()[:16384]
        header = elements.read(head)
        assert header is not None
        part = read_header(path, 1, head)
        assert replace(part, plain=None) == replace(read_header(path, 1), plain=None)
        assert header.values["SOPInstanceUID"] == pydicom.dcmread(path).SOPInstanceUID


def write_deflated(folder: Path, stretch, count: int = 4):
    """A deflated series; ``stretch`` edits the first one's data set before it is deflated."""
    folder.mkdir()
    uid = generate_uid()
    for k in range(count):
        content = content_of(image(uid=uid, place=k))
        start = 144 + int.from_bytes(content[140:144], "little")
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        buffer = BytesIO(bytes(128) + b"DICM")
        buffer.seek(132)
        pydicom.filewriter.write_file_meta_info(buffer, meta, enforce_standard=False)
        packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        for piece in stretch(content[start:]) if k == 0 else [content[start:]]:
            buffer.write(packer.compress(piece))
        (folder / f"{k}.dcm").write_bytes(buffer.getvalue() + packer.flush())


def zeros():
    return (bytes(1 << 20) for _ in range(150))


def after_the_voxels(content):
    yield content
    yield b"\xfc\xff\xfc\xff" + b"OB\0\0" + (150 << 20).to_bytes(4, "little")
    yield from zeros()


def before_the_voxels(content):
    yield content[:-82]
    yield b"\xe0\x6f\x10\x00" + b"OB\0\0" + (150 << 20).to_bytes(4, "little")
    yield from zeros()
    yield content[-82:]


@pytest.mark.parametrize("stretch", [after_the_voxels, before_the_voxels])
def test_a_small_deflated_file_that_unpacks_to_much_is_refused_in_little_memory(tmp_path, stretch):
    write_deflated(tmp_path / "source", stretch)
    assert (tmp_path / "source/0.dcm").stat().st_size < 1 << 20
    tracemalloc.start()
    try:
        manifest = ingest_images(tmp_path / "source", tmp_path / "out", crosswalk=Crosswalk.none("salt for tests"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert manifest["refused"]["CT_OUT_OF_LIMITS"] == 1
    assert manifest["accepted"] == 0
    assert peak < 145 << 20


@pytest.mark.parametrize("frames", [b"-9999999", b"999999999999"])
def test_a_deflated_file_that_announces_an_impossible_size_stops_no_run(tmp_path, frames):
    number = (
        b"\x28\0\x08\0IS"
        + len(frames + b" " * (len(frames) % 2)).to_bytes(2, "little")
        + frames.ljust(-(-len(frames) // 2) * 2)
    )
    write_deflated(
        tmp_path / "source", lambda content: [content.replace(b"\x28\0\x10\0US", number + b"\x28\0\x10\0US")]
    )
    manifest = ingest_images(tmp_path / "source", tmp_path / "out", crosswalk=Crosswalk.none("salt for tests"))
    assert manifest["accepted"] + sum(manifest["refused"].values()) == 1


def test_an_honest_deflated_series_loads(tmp_path):
    write_deflated(tmp_path / "source", lambda content: [content])
    assert (
        ingest_images(tmp_path / "source", tmp_path / "out", crosswalk=Crosswalk.none("salt for tests"))["accepted"]
        == 1
    )


@given(
    raw=st.lists(st.integers(-(2**15), 2**16 - 1), min_size=1, max_size=20),
    signed=st.booleans(),
    shift=st.integers(-70000, 70000),
    padding=st.none() | st.integers(-(2**15), 2**16 - 1),
)
def test_sixteen_bits_give_the_same_hu_as_floats(raw, signed, shift, padding):
    words = np.array([word % 2**16 for word in raw], np.uint16).view(np.int16 if signed else np.uint16)
    mask = None if padding is None else words == padding
    exact = shifted_hu(words, float(shift), mask)
    if exact is not None:
        np.testing.assert_array_equal(exact, to_hu(words.astype(np.float32) + np.float32(shift), mask))
        assert exact.dtype == np.int16
    assert exact is not None or not -2000 <= shift <= 0 or int(words.max()) > 32767
