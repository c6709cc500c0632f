"""HU to the last unit, and what a volume is flagged with."""

import json

import numpy as np
import pytest

from mmjepa.ct.dicom import kernel_of
from mmjepa.ct.store import VolumeStore
from mmjepa.identity import Crosswalk


def flags(manifest):
    (volume,) = manifest["volumes"]
    return set(volume["flags"])


def test_a_date_shifted_out_of_the_calendar_is_no_time_and_stops_no_run(series_of, save, ingest, tmp_path):
    save(tmp_path / "source/a", series_of(AcquisitionDate="00010101"))
    save(tmp_path / "source/b", series_of())
    manifest = ingest()
    assert manifest["accepted"] == 2
    assert sorted("CT_NO_TIME" in volume["flags"] for volume in manifest["volumes"]) == [False, True]


def put(slices, raw, kind):
    for part in slices:
        part.BitsAllocated = part.BitsStored = 8 * np.dtype(kind).itemsize
        part.HighBit, part.PixelRepresentation = part.BitsStored - 1, int(np.dtype(kind).kind == "i")
        part.PixelData = raw.astype(kind).tobytes()
    return slices


def test_stored_values_of_32_bits_keep_every_hu(series_of, save, ingest, tmp_path):
    hu = np.arange(35).reshape(5, 7) * 3 - 50
    slices = put(series_of(RescaleIntercept=-1_000_000_000), hu + 1_000_000_000, "<i4")
    save(tmp_path / "source", slices)
    assert ingest()["accepted"] == 1
    store = VolumeStore(tmp_path / "out")
    np.testing.assert_array_equal(np.asarray(store.hu(store.index.image_id[0]))[:, :, 0], hu.T[::-1, ::-1])


def test_a_fractional_slope_is_applied_in_double_precision(series_of, save, ingest, tmp_path):
    slope, intercept = 0.07, -2099.95
    raw = np.arange(20000, 60000)
    single = raw.astype("f4") * np.float32(slope) + np.float32(intercept)
    raw = raw[np.rint(single) != np.rint(raw * slope + intercept)][:35].reshape(5, 7)  # single precision is a unit off
    save(tmp_path / "source", put(series_of(RescaleSlope=slope, RescaleIntercept=intercept), raw, "<u2"))
    assert ingest()["accepted"] == 1
    store = VolumeStore(tmp_path / "out")
    want = np.rint((raw * slope + intercept).clip(-1024, 3071)).astype(int)
    np.testing.assert_array_equal(np.asarray(store.hu(store.index.image_id[0]))[:, :, 0], want.T[::-1, ::-1])


def test_padding_is_counted_and_flagged_where_its_value_is_one_of_tissue(series_of, save, ingest, tmp_path):
    raw = np.arange(35).reshape(5, 7) - 4
    slices = put(series_of(RescaleIntercept=0), raw, "<i2")
    for part in slices:
        part.add_new(0x00280120, "SS", 0)
    save(tmp_path / "source", slices)
    manifest = ingest()
    assert "CT_PADDING_PLAUSIBLE" in flags(manifest)
    (sidecar,) = (tmp_path / "out/ct/volumes").glob("*.json")
    assert json.loads(sidecar.read_text())["padding_voxels"] == 6


@pytest.mark.parametrize("value", [-2000, -1024])
def test_a_padding_value_of_air_is_not_flagged(series_of, save, ingest, tmp_path, value):
    slices = put(series_of(RescaleIntercept=0), np.arange(35).reshape(5, 7), "<i2")
    for part in slices:
        part.add_new(0x00280120, "SS", value)
    save(tmp_path / "source", slices)
    assert "CT_PADDING_PLAUSIBLE" not in flags(ingest())


@pytest.mark.parametrize(("part", "flagged"), [("HEAD", True), ("CHEST", False), ("", False)])
def test_a_body_part_that_the_chest_test_does_not_fit_is_flagged(series_of, save, ingest, tmp_path, part, flagged):
    slices = series_of(BodyPartExamined=part)
    save(tmp_path / "source", slices)
    assert ("CT_BODY_PART" in flags(ingest(chest_p5_hu=None))) == flagged


NAMES = [
    "DOE JOHN 1970010",
    "JOHN",
    "DOE",
    "MUELLER3",
    "19700101",
    "B30f DOE",
    "A B C",
    "LUNG 19700101",
    "B30f3333333333",
]
KERNELS = ["B30f", "B70f", "Br40d 3", "I70f 2", "STANDARD", "BONEPLUS", "LUNG", "FC08", "FC51-H", "YA", "B", "L", "C_LUNG",
           "B_SOFT_B", "SHARP_C", "CHST", "Qr59d 3", "Hr68h 3", "SMOOTH", "UB"]  # fmt: skip


@pytest.mark.parametrize("text", NAMES)
def test_text_that_may_name_a_person_is_no_kernel(text):
    assert kernel_of({"ConvolutionKernel": text}) == ""


@pytest.mark.parametrize("text", KERNELS)
def test_the_kernels_of_the_makers_are_kept(text):
    assert kernel_of({"ConvolutionKernel": text}) == text


def test_the_shift_of_a_crosswalk_may_lead_out_of_the_calendar_too(series_of, save, ingest, tmp_path):
    crosswalk = Crosswalk("a salt for tests", _subjects={"P1": (1, -800_000)})
    save(tmp_path / "source", series_of())
    assert "CT_NO_TIME" in flags(ingest(crosswalk=crosswalk))
