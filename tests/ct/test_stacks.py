"""What is one volume: nothing adds up along it unseen, and the slices of two are not mixed."""

import numpy as np
import pytest

from mmjepa.ct.store import VolumeStore


def placed(slices, positions):
    for part, position in zip(slices, positions, strict=True):
        part.ImagePositionPatient = list(map(float, position))
    return slices


def flags(manifest):
    return {flag for volume in manifest["volumes"] for flag in volume["flags"]}


@pytest.mark.parametrize(("sideways_mm", "accepted"), [(0.003, 1), (0.049, 0)])
def test_a_sideways_drift_that_no_step_shows_is_a_tilt_once_it_comes_to_half_a_pixel(
    series_of, save, ingest, tmp_path, sideways_mm, accepted
):
    save(tmp_path / "source", placed(series_of(100), [(0, sideways_mm * k, 1.0 * k) for k in range(100)]))
    manifest = ingest()
    assert manifest["accepted"] == accepted
    assert manifest["refused"] == ({} if accepted else {"CT_GANTRY_TILT": 1})


def test_a_drift_is_straightened_on_request_with_every_slice_at_its_place(series_of, save, ingest, tmp_path):
    save(tmp_path / "source", placed(series_of(100), [(0, 0.049 * k, 1.0 * k) for k in range(100)]))
    manifest = ingest(tilt="resample")
    assert manifest["accepted"] == 1
    store = VolumeStore(tmp_path / "out")
    (image_id,) = store.index["image_id"]
    y = store.shape(image_id)[1]
    assert y >= 5 + int(0.049 * 99 / 0.7)
    air = (np.asarray(store.hu(image_id)) == -1024).all(axis=0)  # [Y, Z]: where no slice is
    assert air[:, 0].argmin() != air[:, -1].argmin()


def test_steps_that_differ_a_little_may_not_add_up_to_half_a_step(series_of, save, ingest, tmp_path):
    heights = np.concatenate([[0], np.cumsum([1.0] * 60 + [1.09] * 39)])
    save(tmp_path / "source", placed(series_of(100), [(0, 0, z) for z in heights]))
    assert ingest()["refused"] == {"CT_SPACING_IRREGULAR": 1}


@pytest.mark.parametrize(
    "other", [{"ConvolutionKernel": "B70f"}, {"SliceThickness": 1.0}, {"ImageType": ["DERIVED", "SECONDARY", "AXIAL"]}]
)
@pytest.mark.parametrize("offset", [0, 1])
def test_two_reconstructions_under_one_uid_are_two_volumes_however_they_lie(
    series_of, save, ingest, tmp_path, other, offset
):
    first = series_of(6)
    second = series_of(6, uid=first[0].SeriesInstanceUID, **other)
    for part in second:
        part.ImagePositionPatient[2] += offset
    save(tmp_path / "source", [part for pair in zip(second, first, strict=True) for part in pair])
    manifest = ingest()
    assert (manifest["accepted"], manifest["refused"]) == (2, {})
    assert "CT_SPLIT_SERIES" in flags(manifest)
    store = VolumeStore(tmp_path / "out")
    assert {store.spacing_mm(image_id)[2] for image_id in store.index["image_id"]} == {2.0}
    assert set(store.index["kernel"]) == {"B40f", str(second[0].ConvolutionKernel)}
    assert set(store.index["thickness_mm"]) == {5.0, float(second[0].SliceThickness)}


@pytest.mark.parametrize("name", ["ConvolutionKernel", "SliceThickness", "ImageType"])
def test_a_slice_that_does_not_state_its_reconstruction_is_of_the_only_one(series_of, save, ingest, tmp_path, name):
    slices = series_of(6)
    delattr(slices[2], name)
    save(tmp_path / "source", slices)
    assert ingest()["accepted"] == 1


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("ImageOrientationPatient", [1, 0.00004999, 0, 0, 1, 0], [1, 0.00005001, 0, 0, 1, 0]),
        ("PixelSpacing", [0.7, 0.7], [0.7000001, 0.7]),
        ("SliceThickness", 1.0, 1.00001),
    ],
)
def test_rounding_noise_leaves_a_volume_whole(series_of, save, ingest, tmp_path, name, one, other):
    slices = series_of(10)
    for k, part in enumerate(slices):
        setattr(part, name, other if k % 2 else one)
    save(tmp_path / "source", slices)
    manifest = ingest()
    assert [volume["shape"][2] for volume in manifest["volumes"]] == [10]
    assert "CT_SPLIT_SERIES" not in flags(manifest)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("ImageOrientationPatient", [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0.9999999, 0.0003]),
        ("PixelSpacing", [0.7, 0.7], [0.701, 0.7]),
    ],
)
def test_a_volume_torn_into_two_that_interleave_is_refused(series_of, save, ingest, tmp_path, name, one, other):
    slices = series_of(10)
    for k, part in enumerate(slices):
        setattr(part, name, other if k % 2 else one)
    save(tmp_path / "source", slices)
    manifest = ingest()
    assert (manifest["accepted"], manifest["refused"]) == (0, {"CT_SPACING_IRREGULAR": 2})


def test_two_fields_of_view_of_one_series_are_two_volumes(series_of, save, ingest, tmp_path):
    first = series_of(6)
    save(tmp_path / "source", first + series_of(6, uid=first[0].SeriesInstanceUID, PixelSpacing=[0.5, 0.5]))
    assert ingest()["accepted"] == 2
