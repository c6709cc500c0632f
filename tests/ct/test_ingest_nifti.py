"""What a NIfTI folder with its images.csv becomes."""

import gzip
import os

import nibabel as nib
import numpy as np
import pytest

from mmjepa.ct.ingest import ingest_images
from mmjepa.ct.store import VolumeStore
from mmjepa.identity import Crosswalk
from mmjepa.refusal import Refusal

SALT = "a salt for tests"
AFFINE = np.array([[-0.7, 0, 0, 30], [0, 0.7, 0, -12], [0, 0, 2.5, 5], [0, 0, 0, 1]])
HU = np.random.default_rng(0).integers(-1000, 1000, (9, 8, 7)).astype(np.int16)


def nifti(values=HU, affine=AFFINE, code=1):
    image = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code)
    image.set_qform(None, 0)
    return image


def write(tmp_path, *images, names=None, rows=None):
    source = tmp_path / "source"
    (source / "scans").mkdir(parents=True)
    names = names or [f"scans/{n}.nii.gz" for n in range(len(images))]
    for name, image in zip(names, images, strict=True):
        nib.save(image, source / name)
    rows = rows if rows is not None else [f"{name},P{n},2021-02-03T04:05:06" for n, name in enumerate(names)]
    (source / "images.csv").write_text("\n".join(["file,patient_id,time", *rows]) + "\n")
    return source


def ingest(tmp_path, **options):
    return ingest_images(tmp_path / "source", tmp_path / "out", crosswalk=Crosswalk.none(SALT), **options)


@pytest.mark.parametrize("name", ["scans/a.nii", "scans/a.nii.gz"])
def test_a_volume_is_read_as_nibabel_reads_it_closest_to_ras(tmp_path, name):
    source = write(tmp_path, nifti(), names=[name])
    assert ingest(tmp_path)["accepted"] == 1
    store = VolumeStore(tmp_path / "out")
    image_id = Crosswalk.none(SALT).image_id(name)
    theirs = nib.as_closest_canonical(nib.load(source / name))
    np.testing.assert_array_equal(store.hu(image_id), theirs.get_fdata())
    np.testing.assert_allclose(store.affine(image_id), theirs.affine, atol=1e-5)
    assert store.spacing_mm(image_id) == pytest.approx((0.7, 0.7, 2.5))
    assert store.index["time"].notna().all()


def test_a_scaled_file_is_read_with_its_scale(tmp_path):
    image = nifti((HU.astype(float) / 3).astype(np.float32))
    image.set_data_dtype(np.int16)
    write(tmp_path, image)
    assert ingest(tmp_path)["accepted"] == 1
    store = VolumeStore(tmp_path / "out")
    np.testing.assert_allclose(store.hu(store.index.image_id[0])[::-1], HU / 3, atol=0.6)


def nan(values):
    values = values.astype(np.float32)
    values[1, 2, 3] = np.nan
    return values


@pytest.mark.parametrize(
    ("image", "code"),
    [
        (nifti(code=0), "NII_NO_AFFINE"),
        (nifti(affine=np.diag([1e-9, 1, 1, 1])), "NII_BAD_SPACING"),
        (nifti(nan(HU)), "NII_NONFINITE"),
        (nifti(HU[..., 0]), "NII_NOT_3D"),
        (nifti(HU[..., None].repeat(2, 3)), "NII_NOT_3D"),
        (nifti(HU[..., :2]), "CT_TOO_FEW_SLICES"),
        (nifti(HU + np.int16(1024)), "NII_HU_UNKNOWN"),
        (nifti(np.full((9, 8, 7), -900, np.int16)), "CT_CONSTANT"),
        (nifti(affine=AFFINE + 0.3 * np.eye(4, k=2)), "CT_GANTRY_TILT"),
    ],
)
def test_a_bad_file_is_refused_with_its_code_and_stops_no_other(tmp_path, image, code):
    write(tmp_path, nifti(), image)
    manifest = ingest(tmp_path)
    assert (manifest["accepted"], manifest["refused"]) == (1, {code: 1})


def test_truncated_and_false_files_are_refused_not_skipped(tmp_path):
    source = write(tmp_path, nifti(), nifti(), nifti(), names=["a.nii", "b.nii.gz", "c.nii"])
    for name in ("a.nii", "b.nii.gz"):
        (source / name).write_bytes((source / name).read_bytes()[:500])
    (source / "c.nii").write_bytes(b"not an image")
    manifest = ingest(tmp_path)
    assert (manifest["accepted"], manifest["refused"]) == (0, {"NII_UNREADABLE": 3})


def test_a_file_is_known_by_content_not_by_name(tmp_path):
    source = write(tmp_path, nifti(), rows=["scan-one,P1,"])
    (source / "scans/0.nii.gz").rename(source / "scan-one")
    manifest = ingest(tmp_path)
    assert manifest["accepted"] == 1
    assert manifest["volumes"][0]["flags"] == ["CT_NO_TIME"]


def test_values_said_to_be_hu_are_taken(tmp_path):
    write(tmp_path, nifti(HU + np.int16(1024)))
    assert ingest(tmp_path, nifti_hu="as-is")["accepted"] == 1


def test_without_a_table_or_a_row_the_refusal_names_the_columns(tmp_path):
    source = write(tmp_path, nifti(), nifti(), rows=["scans/0.nii.gz,P0,"])
    manifest = ingest(tmp_path)
    assert manifest["refused"] == {"CT_SUBJECT_MISSING": 1}
    (source / "images.csv").unlink()
    manifest = ingest_images(source, tmp_path / "out2", crosswalk=Crosswalk.none(SALT))
    assert manifest["refused"] == {"CT_SUBJECT_MISSING": 2}
    assert "images.csv is absent" in manifest["volumes"][0]["message"]
    assert "file,patient_id,time" in manifest["volumes"][0]["hint"]


def test_files_of_one_name_in_two_folders_are_two_volumes_wherever_the_table_lies(tmp_path):
    source = write(tmp_path, nifti(), nifti(), names=["scans/x.nii", "x.nii"])
    (source / "a").mkdir()
    (source / "images.csv").rename(source / "a" / "images.csv")
    (source / "a" / "images.csv").write_text("file,patient_id,time\n../scans/x.nii,P0,\n../x.nii,P1,\n../no.nii,P2,\n")
    manifest = ingest(tmp_path)
    assert (manifest["accepted"], manifest["refused"]) == (2, {"NII_FILE_MISSING": 1})
    assert {row["image_id"] for row in manifest["volumes"]} == {
        Crosswalk.none(SALT).image_id(name) for name in ("scans/x.nii", "x.nii", "no.nii")
    }


def test_a_name_that_is_no_utf_8_beside_the_folder_of_the_table_stops_nothing(tmp_path):
    source = write(tmp_path, nifti(), names=["x.nii"])
    (source / "a").mkdir()
    (source / "images.csv").rename(source / "a" / "images.csv")
    os.rename(source / "x.nii", os.fsencode(source) + b"/\xff.nii")
    assert ingest(tmp_path)["refused"] == {"CT_SUBJECT_MISSING": 1, "NII_FILE_MISSING": 1}


@pytest.mark.parametrize("time", ["yesterday", "2021-02-03", "2021-02-03T04:05:06+01:00"])
def test_a_time_that_is_no_local_date_and_time_is_refused(tmp_path, time):
    write(tmp_path, nifti(), rows=[f"scans/0.nii.gz,P0,{time}"])
    manifest = ingest(tmp_path)
    assert manifest["refused"] == {"NII_TIME": 1}
    assert time not in str(manifest)


def test_a_row_without_a_file_is_refused_not_lost(tmp_path):
    write(tmp_path, nifti(), rows=["scans/0.nii.gz,P0,", "scans/gone.nii.gz,P1,", "../out.nii,P2,"])
    assert ingest(tmp_path)["refused"] == {"NII_FILE_MISSING": 2}


@pytest.mark.parametrize(
    ("table", "code"),
    [
        ("file,patient\na,b\n", "IMAGES_CSV_COLUMNS"),
        ("file,patient_id,time\na.nii,P1,\n./a.nii,P2,\n", "IMAGES_CSV_DUPLICATE"),
    ],
)
def test_a_bad_table_is_refused(tmp_path, table, code):
    source = write(tmp_path, nifti())
    (source / "images.csv").write_text(table)
    with pytest.raises(Refusal, match=code) as caught:
        ingest(tmp_path)
    assert str(tmp_path) not in str(caught.value)


def test_a_time_that_is_shifted_out_of_the_calendar_is_refused(tmp_path):
    write(tmp_path, nifti(), nifti(), rows=["scans/0.nii.gz,P0,0001-01-01T00:00:00", "scans/1.nii.gz,P1,"])
    manifest = ingest(tmp_path)
    assert (manifest["accepted"], manifest["refused"]) == (1, {"NII_TIME": 1})


def test_a_second_run_decodes_nothing_again(tmp_path, monkeypatch):
    write(tmp_path, nifti())
    ingest(tmp_path)
    monkeypatch.setattr("mmjepa.ct.nifti.read_volume", None)
    assert ingest(tmp_path)["unchanged"] == 1


def test_a_gzip_that_is_no_nifti_is_skipped(tmp_path):
    source = write(tmp_path, nifti())
    (source / "notes.gz").write_bytes(gzip.compress(b"notes" * 200))
    manifest = ingest(tmp_path)
    assert (manifest["accepted"], manifest["skipped"]) == (1, {"CT_NOT_DICOM": 1})


def test_a_gzip_that_unpacks_to_more_than_its_header_announces_is_refused_unread(tmp_path):
    source = write(tmp_path, nifti())
    (file,) = (source / "scans").iterdir()
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()) + bytes(64 << 20)))
    assert ingest(tmp_path)["refused"] == {"NII_UNREADABLE": 1}


@pytest.mark.parametrize("zipped", [False, True])
def test_a_header_that_claims_more_than_the_file_can_hold_is_refused(tmp_path, zipped):
    name = "scans/a.nii.gz" if zipped else "scans/a.nii"
    source = write(tmp_path, nifti(), names=[name])
    content = (source / name).read_bytes()
    content = bytearray(gzip.decompress(content) if zipped else content)
    content[42:48] = b"\xff\x7f" * 3
    (source / name).write_bytes(gzip.compress(content) if zipped else content)
    assert ingest(tmp_path)["refused"] == {"NII_UNREADABLE": 1}


def test_a_limit_of_voxels_holds_for_nifti(tmp_path):
    write(tmp_path, nifti())
    assert ingest(tmp_path, max_voxels=HU.size - 1)["refused"] == {"CT_OUT_OF_LIMITS": 1}


def test_a_table_that_names_no_path_is_refused(tmp_path):
    write(tmp_path, nifti(), rows=["a\0b.nii,P0,"])
    with pytest.raises(Refusal, match="IMAGES_CSV_VALUE"):
        ingest(tmp_path)


def chest():
    """HU of air, lung, fat, muscle and bone, with noise, in shares as of a chest."""
    rng = np.random.default_rng(1)
    tissue = rng.choice([-1000, -850, -100, 40, 700], (9, 8, 7), p=[0.3, 0.25, 0.15, 0.28, 0.02])
    return np.clip(tissue + rng.normal(0, 15, tissue.shape), -1024, 3071).round().astype(np.int16)


CSV_HEAD = "file,patient_id,time,slope,intercept\n"


def rescaled(tmp_path, values, *rescale, **options):
    """Ingest one file of ``values`` with a slope and intercept (as text) in its table."""
    source = tmp_path / "source"
    if not source.exists():
        write(tmp_path, nifti(values), names=["scans/a.nii"])
    (source / "images.csv").write_text(CSV_HEAD + f"scans/a.nii,P0,2021-02-03T04:05:06,{','.join(rescale)}\n")
    return ingest(tmp_path, nifti_hu="csv", **options)


@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (1, -8192), (0.5, -1000.25)])
def test_slope_and_intercept_of_the_table_make_hu_as_in_a_decode_by_nibabel(tmp_path, slope, intercept):
    raw = ((chest() - intercept) / slope).round().astype(np.int16)
    assert rescaled(tmp_path, raw, str(slope), str(intercept))["accepted"] == 1
    theirs = nib.as_closest_canonical(nib.load(tmp_path / "source/scans/a.nii")).get_fdata() * slope + intercept
    store = VolumeStore(tmp_path / "out")
    np.testing.assert_array_equal(store.hu(store.index.image_id[0]), np.rint(theirs).clip(-1024, 3071))


@pytest.mark.parametrize("rescale", ["", "1,", ",-1024", "nan,-1024", "1,inf", "1e999,0", "0,-1024", "-1,0", "one,two"])
def test_a_slope_or_intercept_that_is_absent_or_no_finite_number_refuses_that_file(tmp_path, rescale):
    source = write(tmp_path, nifti(chest()), nifti(chest()), names=["a.nii", "b.nii"])
    (source / "images.csv").write_text(CSV_HEAD + f"a.nii,P0,,1,0\nb.nii,P1,,{rescale}\n")
    manifest = ingest(tmp_path, nifti_hu="csv")
    assert (manifest["accepted"], manifest["refused"]) == (1, {"NII_HU_UNKNOWN": 1})


def test_a_table_without_slope_and_intercept_is_refused_when_they_are_asked_for(tmp_path):
    write(tmp_path, nifti(chest()))
    with pytest.raises(Refusal, match="IMAGES_CSV_COLUMNS"):
        ingest(tmp_path, nifti_hu="csv")


@pytest.mark.parametrize("intercept", ["-1024", "-8192", "1024"])
def test_values_that_were_hu_before_the_rescale_are_refused(tmp_path, intercept):
    assert rescaled(tmp_path, chest(), "1", intercept)["refused"] == {"CT_HU_IMPLAUSIBLE": 1}


def test_a_file_with_a_scale_of_its_own_takes_no_second_one(tmp_path):
    image = nifti(chest() + np.int16(1024))
    image.header.set_slope_inter(1, -1024)
    source = write(tmp_path, image, names=["scans/a.nii"])
    assert nib.load(source / "scans/a.nii").get_fdata().min() < -900
    assert rescaled(tmp_path, None, "1", "-1024")["refused"] == {"NII_HU_UNKNOWN": 1}


def test_another_slope_or_intercept_makes_an_earlier_volume_stale(tmp_path):
    raw = chest() + np.int16(1024)
    assert rescaled(tmp_path, raw, "1", "-1024")["accepted"] == 1
    assert rescaled(tmp_path, raw, "1", "-1024")["unchanged"] == 1
    assert rescaled(tmp_path, raw, "1", "-1000")["refused"] == {"CACHE_STALE": 1}


@pytest.mark.parametrize("padding", [-2000, -1500, -3024])
def test_raw_values_are_not_taken_for_hu_because_their_padding_is_low(tmp_path, padding):
    raw = chest() + np.int16(1024)
    raw[:3] = padding
    write(tmp_path, nifti(raw))
    assert ingest(tmp_path)["refused"] == {"NII_HU_UNKNOWN": 1}


def test_hu_with_padding_are_taken_and_the_padding_becomes_the_floor(tmp_path):
    values = chest()
    values[:3] = -3024
    write(tmp_path, nifti(values))
    assert ingest(tmp_path)["accepted"] == 1
    store = VolumeStore(tmp_path / "out")
    np.testing.assert_array_equal(store.hu(store.index.image_id[0])[::-1], values.clip(-1024))


def test_a_crop_of_lung_alone_is_taken_for_hu(tmp_path):
    lung = np.random.default_rng(0).normal(-850, 40, (16, 16, 16)).astype(np.int16)
    write(tmp_path, nifti(lung))
    assert ingest(tmp_path)["accepted"] == 1


def lean(down_mm, across_mm=0.0):
    """An affine whose slices shift by so much from one to the next."""
    affine = AFFINE.copy()
    affine[:2, 2] = across_mm, down_mm
    return affine


@pytest.mark.parametrize("shift_mm", [(0.83, 0.0), (-0.9, 0.4)])
def test_a_tilted_volume_is_straightened_on_request_and_every_voxel_stays_in_its_place(tmp_path, shift_mm):
    affine = lean(*shift_mm)
    gradient = np.array([9.0, -14.0, 11.0])

    def field(matrix, shape):
        at = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
        return (at @ matrix[:3, :3].T + matrix[:3, 3]) @ gradient - 300

    shape = (30, 28, 7)
    write(tmp_path, nifti(field(affine, shape).astype(np.float32), affine))
    assert ingest(tmp_path, nifti_hu="as-is")["refused"] == {"CT_GANTRY_TILT": 1}
    manifest = ingest_images(
        tmp_path / "source", tmp_path / "out2", crosswalk=Crosswalk.none(SALT), nifti_hu="as-is", tilt="resample"
    )
    assert (manifest["accepted"], manifest["volumes"][0]["flags"]) == (1, ["CT_GANTRY_TILT"])
    store = VolumeStore(tmp_path / "out2")
    image_id = store.index.image_id[0]
    hu, upright = store.hu(image_id), store.affine(image_id)
    np.testing.assert_allclose(upright[:3, :3], np.diag([0.7, 0.7, 2.5]), atol=1e-6)
    covered = hu != -1024
    inner = covered[2:] & covered[1:-1] & covered[:-2]
    inner = inner[:, 2:] & inner[:, 1:-1] & inner[:, :-2]
    assert inner.sum() > 0.75 * np.prod(shape)
    np.testing.assert_allclose(hu[1:-1, 1:-1][inner], field(upright, hu.shape)[1:-1, 1:-1][inner], atol=1)


def test_a_shear_that_is_no_tilt_is_refused_even_when_tilts_are_straightened(tmp_path):
    within = AFFINE.copy()
    within[0, 1] = 0.3
    write(tmp_path, nifti(affine=within), nifti(affine=lean(5.0)))
    assert ingest(tmp_path, tilt="resample")["refused"] == {"CT_GANTRY_TILT": 1, "CT_ORIENTATION_INVALID": 1}
