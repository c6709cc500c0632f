"""Enhanced multi-frame CT: one file of many frames becomes the volume that its frames would be as single images."""

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    LegacyConvertedEnhancedCTImageStorage,
    RLELossless,
    generate_uid,
)

from mmjepa.ct.ingest import ingest_images
from mmjepa.ct.store import VolumeStore
from mmjepa.identity import Crosswalk

SALT = "a salt for tests"
ROWS, COLUMNS = 10, 12


def group(**macros):
    """A functional group; each macro is a sequence of one item."""
    found = Dataset()
    for name, tags in macros.items():
        item = Dataset()
        for tag, value in tags.items():
            setattr(item, tag, value)
        setattr(found, name, [item])
    return found


def make_frames(n=6, order=None):
    """Per-frame groups (2 mm apart, each with a rescale of its own) and stored values, in any order of frames."""
    raw = np.random.default_rng(1).integers(0, 3000, (n, ROWS, COLUMNS)).astype("<u2")
    order = list(order or range(n))
    groups = [
        group(
            FrameContentSequence={"FrameAcquisitionDateTime": f"2020030110150{k}", "StackID": "1"},
            PlanePositionSequence={"ImagePositionPatient": [-5.0, 3.0, 2.0 * k]},
            PixelValueTransformationSequence={
                "RescaleSlope": 0.5 + k,
                "RescaleIntercept": -1000 - k,
                "RescaleType": "HU",
            },
        )
        for k in order
    ]
    hu = raw * (0.5 + np.arange(n))[:, None, None] - 1000 - np.arange(n)[:, None, None]
    return groups, raw[order], np.rint(np.clip(hu, -1024, 3071)).astype(np.int16)


def make_file(groups, raw, sop_class=EnhancedCTImageStorage, uid=None):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = sop_class, generate_uid(), uid or generate_uid()
    data.PatientID, data.Modality, data.ImageType = "P1", "CT", ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    data.FrameOfReferenceUID = generate_uid()
    data.PerFrameFunctionalGroupsSequence = groups
    data.SharedFunctionalGroupsSequence = [
        group(
            PixelMeasuresSequence={"PixelSpacing": [0.7, 0.8], "SliceThickness": 3.0},
            PlaneOrientationSequence={"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
            CTReconstructionSequence={"ConvolutionKernel": "B30f"},
            CTImageFrameTypeSequence={"FrameType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]},
        )
    ]
    data.NumberOfFrames, data.Rows, data.Columns = raw.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.PixelData = raw.tobytes()
    return data


def ingest(tmp_path, *files, **options):
    (tmp_path / "source").mkdir()
    for n, file in enumerate(files):
        file.save_as(tmp_path / "source" / f"{n}.dcm", enforce_file_format=True)
    return ingest_images(tmp_path / "source", tmp_path / "out", crosswalk=Crosswalk.none(SALT), **options)


def stack_of(tmp_path):
    """The one volume as [slices, rows, columns]."""
    store = VolumeStore(tmp_path / "out")
    (image_id,) = store.index["image_id"]
    return np.asarray(store.hu(image_id))[::-1, ::-1].transpose(2, 1, 0), store, image_id


@pytest.mark.parametrize("sop_class", [EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage])
def test_frames_are_sorted_and_rescaled_each_by_its_own_group(tmp_path, sop_class):
    groups, raw, hu = make_frames(order=[3, 0, 5, 1, 4, 2])
    manifest = ingest(tmp_path, make_file(groups, raw, sop_class))
    assert (manifest["accepted"], manifest["refused"], manifest["skipped"], manifest["files"]) == (1, {}, {}, 1)
    stack, store, image_id = stack_of(tmp_path)
    np.testing.assert_array_equal(stack, hu)
    assert store.spacing_mm(image_id) == pytest.approx((0.8, 0.7, 2.0))
    lps = np.array([-5.0 + 0.8 * (COLUMNS - 1), 3.0 + 0.7 * (ROWS - 1), 0.0])
    np.testing.assert_allclose(store.affine(image_id)[:3, 3], lps * [-1, -1, 1])
    (row,) = store.index.to_dict("records")
    assert (row["kernel"], row["thickness_mm"], row["n_slices"]) == ("B30f", 3.0, 6)
    assert row["time"].strftime("%H%M%S") == "101500"


def test_highdicom_reads_the_same_volume(tmp_path):
    highdicom = pytest.importorskip("highdicom")
    groups, raw, _ = make_frames(order=[3, 0, 5, 1, 4, 2])
    for one in groups:  # whole numbers: it does not round
        one.PixelValueTransformationSequence[0].RescaleSlope = 1
    ingest(tmp_path, make_file(groups, raw))
    image = highdicom.imread(tmp_path / "source" / "0.dcm")
    volume = image.get_volume(apply_real_world_transform=False, apply_modality_transform=True)
    theirs = volume.to_patient_orientation("RAS")
    _, store, image_id = stack_of(tmp_path)
    np.testing.assert_array_equal(store.hu(image_id), np.clip(theirs.array, -1024, 3071))
    np.testing.assert_allclose(store.affine(image_id), np.diag([-1, -1, 1, 1]) @ theirs.affine, atol=1e-6)


def test_two_frames_are_a_volume_where_two_slices_suffice(tmp_path):
    groups, raw, hu = make_frames(2)
    assert ingest(tmp_path, make_file(groups, raw), min_slices=2)["accepted"] == 1
    np.testing.assert_array_equal(stack_of(tmp_path)[0], hu)


def test_a_volume_in_several_files_is_one_volume(tmp_path):
    groups, raw, hu = make_frames()
    uid = generate_uid()
    files = [make_file(groups[part], raw[part], uid=uid) for part in (slice(0, None, 2), slice(1, None, 2))]
    assert ingest(tmp_path, *files)["accepted"] == 1
    np.testing.assert_array_equal(stack_of(tmp_path)[0], hu)


def test_compressed_frames_read_as_the_same_voxels_and_a_second_run_decodes_nothing(tmp_path, monkeypatch):
    groups, raw, hu = make_frames()
    file = make_file(groups, raw)
    file.compress(RLELossless)
    ingest(tmp_path, file)
    np.testing.assert_array_equal(stack_of(tmp_path)[0], hu)
    monkeypatch.setattr("mmjepa.ct.series.Opened", None)
    again = ingest_images(tmp_path / "source", tmp_path / "out", crosswalk=Crosswalk.none(SALT))
    assert (again["accepted"], again["unchanged"]) == (1, 1)


def test_a_copy_of_the_file_is_one_copy_not_one_for_each_frame(tmp_path):
    file = make_file(*make_frames()[:2])
    manifest = ingest(tmp_path, file, file)
    assert (manifest["accepted"], manifest["skipped"]) == (1, {"CT_DUPLICATE_FILE": 1})


def two_stacks(groups):
    for one in groups[3:]:
        one.FrameContentSequence[0].StackID = "2"


def two_planes(groups):
    for one in groups[3:]:
        one.PlaneOrientationSequence = group(X={}).X
        one.PlaneOrientationSequence[0].ImageOrientationPatient = [0, 1, 0, 0, 0, -1]


def two_moments(groups):
    for k, one in enumerate(groups):
        one.FrameContentSequence[0].TemporalPositionIndex = k // 3 + 1
        one.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 2.0 * (k % 3)]


def localizer_inside(groups):
    groups[0].CTImageFrameTypeSequence = group(X={"FrameType": ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]}).X


def gap(groups):
    groups[5].PlanePositionSequence[0].ImagePositionPatient = [-5, 3, 14]


def repeat(groups):
    groups[5].PlanePositionSequence[0].ImagePositionPatient = [-5, 3, 8]


def tilt(groups):
    for k, one in enumerate(groups):
        one.PlanePositionSequence[0].ImagePositionPatient = [-5, 3 + 0.6 * k, 2 * k]


def no_rescale(groups):
    del groups[2].PixelValueTransformationSequence


def no_position(groups):
    del groups[2].PlanePositionSequence


def no_hu(groups):
    groups[2].PixelValueTransformationSequence[0].RescaleType = "Z_EFF"


def frame_undescribed(groups):
    groups.pop()


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (two_stacks, "CT_ENHANCED_UNSUPPORTED"),
        (two_planes, "CT_ENHANCED_UNSUPPORTED"),
        (two_moments, "CT_ENHANCED_UNSUPPORTED"),
        (localizer_inside, "CT_ENHANCED_UNSUPPORTED"),
        (frame_undescribed, "CT_ENHANCED_UNSUPPORTED"),
        (gap, "CT_SPACING_IRREGULAR"),
        (repeat, "CT_DUPLICATE_POSITION"),
        (tilt, "CT_GANTRY_TILT"),
        (no_rescale, "CT_NO_RESCALE"),
        (no_position, "CT_NO_GEOMETRY"),
        (no_hu, "CT_NOT_HU"),
    ],
)
def test_frames_are_checked_as_slices_are(tmp_path, edit, code):
    groups, raw, _ = make_frames()
    edit(groups)
    manifest = ingest(tmp_path, make_file(groups, raw))
    assert (manifest["accepted"], manifest["refused"]) == (0, {code: 1})


def test_the_root_of_the_file_says_nothing_about_geometry_or_hu(tmp_path):
    groups, raw, _ = make_frames()
    for one in groups:
        del one.PixelValueTransformationSequence
    file = make_file(groups, raw)
    file.RescaleSlope, file.RescaleIntercept = 1, -1024
    assert ingest(tmp_path, file)["refused"] == {"CT_NO_RESCALE": 1}


def test_a_file_of_localizers_is_skipped_and_one_cut_in_its_voxels_refused(tmp_path):
    scout = make_file(*make_frames()[:2])
    scout.SharedFunctionalGroupsSequence[0].CTImageFrameTypeSequence[0].FrameType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    cut = make_file(*make_frames()[:2])
    cut.PixelData = cut.PixelData[:-400]
    manifest = ingest(tmp_path, scout, cut)
    assert (manifest["refused"], manifest["skipped"]) == ({"CT_PIXEL_CORRUPT": 1}, {"CT_LOCALIZER": 1})
