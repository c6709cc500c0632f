"""The store, its crops and other voxel sizes."""

import os
import pickle
import shutil
import sys

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmjepa.ct.ingest import ingest_images
from mmjepa.ct.resample import crop_mm, resample_hu, resampled_crop, steps, triangle_weights
from mmjepa.ct.store import AIR_HU, VolumeStore, transform_hash, write_voxels
from mmjepa.files import read_json, write_json
from mmjepa.identity import Crosswalk
from mmjepa.refusal import Refusal

SHAPE, SPACING = (12, 10, 6), (1.0, 1.0, 4.0)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """One volume whose HU are -900 + 10 x + 20 y + 8 z: linear in every axis."""
    folder = tmp_path_factory.mktemp("store")
    x, y, z = np.indices(SHAPE)
    image = nib.Nifti1Image((-900 + 10 * x + 20 * y + 8 * z).astype(np.int16), np.diag([*SPACING, 1.0]))
    (folder / "source").mkdir()
    nib.save(image, folder / "source" / "a.nii")
    (folder / "source" / "images.csv").write_text("file,patient_id,time\na.nii,P1,\n")
    crosswalk = Crosswalk.none("a salt for tests")
    ingest_images(folder / "source", folder / "cohort", crosswalk=crosswalk, nifti_hu="as-is")  # a ramp is no chest
    return folder / "cohort"


@pytest.fixture(scope="module")
def store(cohort):
    return VolumeStore(cohort)


@pytest.fixture(scope="module")
def image_id(store):
    return store.index["image_id"][0]


def test_the_store_travels_to_a_worker_and_its_maps_are_read_only(store, image_id):
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(again.hu(image_id), store.hu(image_id))
    assert again.fingerprint == store.fingerprint
    assert isinstance(store.hu(image_id), np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        store.hu(image_id)[0, 0, 0] = 1


def test_what_is_missing_torn_or_unknown_is_refused(tmp_path, cohort, image_id):
    with pytest.raises(Refusal, match="INDEX_MISSING"):
        VolumeStore(tmp_path)
    shutil.copytree(cohort, tmp_path / "copy")
    store = VolumeStore(tmp_path / "copy")
    with pytest.raises(Refusal, match="IMAGE_UNKNOWN"):
        store.hu("../../etc/passwd")
    path = tmp_path / "copy/ct/volumes" / f"{image_id}.npy"
    whole = path.read_bytes()
    for torn in (whole[:-2], whole + b"xx", whole[:10], b""):
        path.write_bytes(torn)
        with pytest.raises(Refusal, match="CACHE_TORN"):
            store.hu(image_id)
    path.unlink()
    with pytest.raises(Refusal, match="CACHE_TORN"):
        store.hu(image_id)
    (tmp_path / "copy/ct/index.parquet").write_bytes(b"no parquet")
    with pytest.raises(Refusal, match="INDEX_BROKEN"):
        VolumeStore(tmp_path / "copy")


@given(
    size=st.tuples(*[st.integers(1, 15)] * 3),
    centre=st.tuples(*[st.floats(-0.5, n - 0.5) for n in SHAPE]),
)
def test_a_crop_is_the_volume_where_there_is_one_and_air_elsewhere(cohort, size, centre):
    store = VolumeStore(cohort)
    image_id = store.index["image_id"][0]
    padded = np.pad(store.hu(image_id), 20, constant_values=AIR_HU)
    start = [int(np.floor(c - (s - 1) / 2 + 0.5)) + 20 for c, s in zip(centre, size, strict=True)]
    expected = padded[tuple(slice(a, a + s) for a, s in zip(start, size, strict=True))]
    np.testing.assert_array_equal(store.crop_hu(image_id, size, centre), expected)


def test_a_crop_around_nothing_is_refused(store, image_id):
    with pytest.raises(Refusal, match="CROP_OUTSIDE"):
        store.crop_hu(image_id, (2, 2, 2), (50.0, 0.0, 0.0))


@pytest.fixture
def copy(cohort, tmp_path):
    shutil.copytree(cohort, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_volume_of_another_source_than_the_index_or_other_settings_than_the_manifest_is_stale(copy, image_id):
    sidecar, manifest = copy / f"ct/volumes/{image_id}.json", copy / "ct/manifest.json"
    good = read_json(sidecar)
    write_json(sidecar, {**good, "source_hash": "0" * 64})
    with pytest.raises(Refusal, match="CACHE_STALE"):
        VolumeStore(copy).crop_hu(image_id, (2, 2, 2))
    write_json(sidecar, good)
    VolumeStore(copy).crop_hu(image_id, (2, 2, 2))
    told = read_json(manifest)
    write_json(manifest, {**told, "settings": {**told["settings"], "min_slices": 7}})
    with pytest.raises(Refusal, match="CACHE_STALE"):
        VolumeStore(copy).crop_hu(image_id, (2, 2, 2))


def test_a_file_that_changes_under_an_open_store_is_noticed(copy, image_id):
    store = VolumeStore(copy)
    before = store.crop_hu(image_id, (4, 4, 4))
    path = copy / f"ct/volumes/{image_id}.npy"
    volume = np.array(store.hu(image_id))
    np.save(copy / "new.npy", (volume + 1).astype(np.int16))
    os.replace(copy / "new.npy", path)
    np.testing.assert_array_equal(store.crop_hu(image_id, (4, 4, 4)), before + 1)
    path.unlink()
    with pytest.raises(Refusal, match="CACHE_TORN"):
        store.crop_hu(image_id, (4, 4, 4))


def test_the_sidecar_hash_is_the_one_that_ingest_writes(cohort, image_id):
    sidecar = read_json(cohort / f"ct/volumes/{image_id}.json")
    assert transform_hash(sidecar["settings"]) == sidecar["transform_hash"]


def test_open_volumes_are_few_whatever_the_store_holds(copy, image_id):
    folder, index = copy / "ct/volumes", VolumeStore(copy).index
    names = [f"{n:016x}" for n in range(40)]
    for name in names:
        for suffix in (".npy", ".json"):
            os.link(folder / f"{image_id}{suffix}", folder / f"{name}{suffix}")
    index = index.loc[[0] * 40].assign(image_id=names)
    index.to_parquet(copy / "ct/index.parquet")
    store = VolumeStore(copy)
    for name in names:
        store.crop_hu(name, (2, 2, 2))
    assert len(store._open) <= 32


def compressed(copy, image_id):
    """The same cohort with its voxels in blosc2."""
    folder = copy / "ct/volumes"
    hu = np.load(folder / f"{image_id}.npy")
    sidecar = read_json(folder / f"{image_id}.json")
    write_json(folder / f"{image_id}.json", sidecar | write_voxels(folder, image_id, hu, "blosc2"))
    (folder / f"{image_id}.npy").unlink()
    return VolumeStore(copy), hu


def test_compressed_voxels_give_the_same_volume_and_crops(copy, image_id):
    pytest.importorskip("blosc2")
    store, hu = compressed(copy, image_id)
    np.testing.assert_array_equal(np.asarray(store.hu(image_id)), hu)
    plain = np.full((6, 20, 3), AIR_HU, np.int16)
    plain[:5, 5:15] = hu[7:12, :, 2:5]
    np.testing.assert_array_equal(store.crop_hu(image_id, (6, 20, 3), (9.5, 4.5, 3.0)), plain)
    assert crop_mm(store, image_id, (6, 6, 8), (1.0, 1.0, 1.0)).shape == (6, 6, 8)


def test_a_torn_compressed_file_is_refused(copy, image_id):
    pytest.importorskip("blosc2")
    store, _ = compressed(copy, image_id)
    path = copy / f"ct/volumes/{image_id}.b2nd"
    whole = path.read_bytes()
    for torn in (whole[:-2], b"", b"\0" * len(whole)):
        path.write_bytes(torn)
        with pytest.raises(Refusal, match="CACHE_TORN"):
            store.crop_hu(image_id, (2, 2, 2))


def test_compressing_without_the_extra_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "blosc2", None)
    with pytest.raises(Refusal, match="EXTRA_MISSING"):
        write_voxels(tmp_path, "a", np.zeros((2, 2, 2), np.int16), "blosc2")
    assert not list(tmp_path.iterdir())


def test_written_voxels_are_read_as_they_were_and_their_size_is_told(tmp_path):
    hu = np.asfortranarray(np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    told = write_voxels(tmp_path, "a", hu)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), hu)
    assert told == {"format": "npy", "bytes": (tmp_path / "a.npy").stat().st_size}


def test_a_point_in_mm_finds_its_voxel(store, image_id):
    assert store.voxel(image_id, (3.0, 4.5, 8.0)) == pytest.approx((3.0, 4.5, 2.0))


def test_resampling_keeps_a_linear_ramp_and_says_its_true_spacing():
    volume = np.arange(0, 900, 9, dtype=np.int16)[:, None, None] + np.zeros((1, 7, 7), np.int16)
    out, spacing = resample_hu(volume, (1.0, 1.0, 1.0), (0.6, 2.0, 1.0))
    assert out.shape == (167, 4, 7)
    assert spacing == pytest.approx((100 / 167, 7 / 4, 1.0))
    places_mm = (np.arange(167) + 0.5) * spacing[0]
    np.testing.assert_allclose(out[3:-3, 0, 0], ((places_mm - 0.5) * 9)[3:-3], atol=0.51)


def test_taking_voxels_away_averages_and_does_not_alias():
    stripes = np.isin(np.indices((32, 32, 8))[0] % 4, (1, 2))  # plain interpolation would see the bright ones alone
    volume = np.where(stripes, 1000, -1000).astype(np.int16)
    out, _ = resample_hu(volume, (1.0, 1.0, 1.0), (4.0, 4.0, 4.0))
    assert np.abs(out[1:-1]).max() < 5


def test_the_same_spacing_changes_nothing():
    volume = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7)).astype(np.int16)
    out, spacing = resample_hu(volume, (0.646, 0.646, 8.0), (0.646, 0.646, 8.0))
    np.testing.assert_array_equal(out, volume)
    assert spacing == (0.646, 0.646, 8.0)
    with pytest.raises(Refusal, match="SPACING_INVALID"):
        resample_hu(volume, (1.0, 1.0, 1.0), (1.0, 0.0, 1.0))


def test_a_crop_in_mm_has_exactly_its_spacing_and_air_beyond_the_volume(store, image_id):
    crop = crop_mm(store, image_id, (6, 6, 8), (1.0, 1.0, 1.0), (5.5, 4.5, 2.5))
    x, y, z = np.arange(6) + 3.0, np.arange(6) + 2.0, (np.arange(8) - 3.5) / 4 + 2.5
    ramp = -900 + 10 * x[:, None, None] + 20 * y[:, None] + 8 * z
    np.testing.assert_allclose(crop, ramp, atol=0.51)
    wide = crop_mm(store, image_id, (40, 10, 6), (1.0, 1.0, 4.0))
    np.testing.assert_array_equal(wide[14:26], store.hu(image_id))
    assert (wide[:14] == AIR_HU).all()
    assert (wide[26:] == AIR_HU).all()


@given(
    centre=st.tuples(st.floats(-0.5, 11.5), st.floats(-0.5, 9.5), st.floats(-0.5, 5.5)),
    size=st.tuples(*[st.integers(1, 9)] * 3),
    spacing_mm=st.tuples(*[st.floats(0.3, 9)] * 3),
)
def test_a_resampled_crop_knows_where_each_voxel_lies_and_which_the_volume_fills(
    store, image_id, centre, size, spacing_mm
):
    step = steps(store.spacing_mm(image_id), spacing_mm)
    crop = resampled_crop(store.hu(image_id), centre, size, step)
    np.testing.assert_array_equal(crop.hu, crop_mm(store, image_id, size, spacing_mm, centre))
    ras = np.indices(size).reshape(3, -1).T @ crop.affine(store.affine(image_id))[:3, :3].T
    ras += crop.affine(store.affine(image_id))[:3, 3]
    places = np.linalg.solve(store.affine(image_id), np.c_[ras, np.ones(len(ras))].T)[:3].T
    np.testing.assert_allclose(places.mean(axis=0), centre, atol=1e-6)
    known = np.minimum(places + 0.5, np.array(SHAPE) - 0.5 - places).min(axis=1).reshape(size)
    away = np.abs(known) > 1e-6  # on the very edge rounding decides
    np.testing.assert_array_equal(crop.valid[away], (known > 0)[away])
    assert (crop.hu[~crop.valid] == AIR_HU).all()


@given(n=st.integers(1, 20), step=st.floats(0.05, 12), start=st.floats(-30, 30))
def test_weights_sum_to_one_inside_and_to_nothing_outside(n, step, start):
    places = start + np.arange(8) * step
    sums = triangle_weights(places, n, step).sum(axis=1)
    inside = (places >= -0.5) & (places <= n - 0.5)
    np.testing.assert_allclose(sums, inside.astype(float), atol=1e-9)
