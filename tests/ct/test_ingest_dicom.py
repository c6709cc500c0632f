"""What a DICOM folder becomes: a volume, a refusal with its code, or a counted skip."""

import csv
import datetime as dt
import io
import json
import os

import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from mmjepa.ct import series
from mmjepa.ct.ingest import ingest_images
from mmjepa.ct.store import VolumeStore
from mmjepa.identity import Crosswalk
from mmjepa.refusal import Refusal

SALT = "a salt for tests"
SIZE = 16


def make_series(n=6, uid=None, patient="P1", **tags):
    """Slices of a noisy ramp, 2 mm apart, written as most scanners do: 12-bit unsigned, intercept -1024."""
    uid = uid or generate_uid()
    rng = np.random.default_rng(3)
    return [make_slice(k, uid, patient, rng.integers(0, 3000, (SIZE, SIZE + 2)), **tags) for k in range(n)]


def make_slice(k, uid, patient, raw, **tags):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = CTImageStorage, generate_uid(), uid
    data.PatientID, data.Modality, data.ImageType = patient, "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.AcquisitionDate, data.AcquisitionTime = "20200301", f"1015{k:02d}.5"
    data.StudyDate, data.StudyTime = "20200301", "090000"
    data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-20.5, -31.0, 100.0 + 2.0 * k]
    data.PixelSpacing, data.SliceThickness, data.InstanceNumber = [0.7, 0.8], 5.0, k + 1
    data.ConvolutionKernel = "B40f"
    data.RescaleSlope, data.RescaleIntercept, data.RescaleType = 1, -1024, "HU"
    set_pixels(data, raw)
    for name, value in tags.items():
        setattr(data, name, value)
    return data


def set_pixels(data, raw, signed=False, bits=16):
    raw = np.asarray(raw)
    data.Rows, data.Columns = raw.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, bits, bits - 1, int(signed)
    data.PixelData = raw.astype("<i2" if signed else "<u2").tobytes()


def save(folder, slices, prefix="s", order=None):
    folder.mkdir(parents=True, exist_ok=True)
    for name, k in enumerate(order or range(len(slices))):
        slices[k].save_as(folder / f"{prefix}{name:03d}", enforce_file_format=True)
    return folder


def ingest(tmp_path, **options):
    options.setdefault("crosswalk", Crosswalk.none(SALT))
    return ingest_images(tmp_path / "source", tmp_path / "out", **options)


def codes(manifest):
    return manifest["accepted"], manifest["refused"], manifest["skipped"]


def test_a_clean_series_is_read_as_simpleitk_reads_it_but_in_ras(tmp_path):
    import SimpleITK as sitk

    folder = save(tmp_path / "source", make_series())
    manifest = ingest(tmp_path)
    assert codes(manifest) == (1, {}, {})
    store = VolumeStore(tmp_path / "out")
    (image_id,) = store.index["image_id"]
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    image = sitk.ReadImage(names)
    theirs = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
    ours = store.hu(image_id)
    np.testing.assert_array_equal(ours, theirs[::-1, ::-1])
    assert store.spacing_mm(image_id) == pytest.approx(image.GetSpacing()) == (0.8, 0.7, 2.0)
    for index in [(0, 0, 0), (SIZE + 1, 3, 5), (4, 15, 2)]:
        flipped = (ours.shape[0] - 1 - index[0], ours.shape[1] - 1 - index[1], index[2])
        lps = np.array(image.TransformIndexToPhysicalPoint(index))
        np.testing.assert_allclose((store.affine(image_id) @ [*flipped, 1])[:3], lps * [-1, -1, 1])


@pytest.mark.parametrize("orientation", [[0, 1, 0, 0, 0, -1], [1, 0, 0, 0, 0, -1], [0.8, 0.6, 0, -0.6, 0.8, 0]])
def test_other_scan_planes_land_in_ras_with_every_voxel_at_its_place(tmp_path, orientation):
    slices = make_series()
    normal = np.cross(orientation[:3], orientation[3:])
    for k, part in enumerate(slices):
        part.ImageOrientationPatient, part.ImagePositionPatient = orientation, list(10 + 2.0 * k * normal)
    save(tmp_path / "source", slices)
    assert codes(ingest(tmp_path)) == (1, {}, {})
    store = VolumeStore(tmp_path / "out")
    (image_id,) = store.index["image_id"]
    affine = store.affine(image_id)
    assert (np.abs(affine[:3, :3]).argmax(axis=0) == [0, 1, 2]).all()
    assert (np.diag(affine)[:3] > 0).all()
    k, row, column = 4, 3, 11
    lps = 10 + 2.0 * k * normal + 0.8 * column * np.array(orientation[:3]) + 0.7 * row * np.array(orientation[3:])
    place = np.rint(np.linalg.solve(affine, [*(lps * [-1, -1, 1]), 1])[:3]).astype(int)
    assert store.hu(image_id)[tuple(place)] == slices[k].pixel_array[row, column] - 1024


def test_scrambled_file_names_and_instance_numbers_change_nothing(tmp_path):
    slices = make_series()
    save(tmp_path / "source", slices)
    ingest(tmp_path)
    for part, number in zip(slices, [4, 1, 6, 3, 2, 5], strict=True):
        part.InstanceNumber = number
    save(tmp_path / "b" / "source", slices, order=[3, 0, 5, 1, 4, 2])
    ingest(tmp_path / "b")
    a, b = VolumeStore(tmp_path / "out"), VolumeStore(tmp_path / "b" / "out")
    np.testing.assert_array_equal(a.hu(a.index.image_id[0]), b.hu(b.index.image_id[0]))


def drop_one(slices):
    return slices[:3] + slices[4:]


def repeat_place(slices):
    extra = make_slice(2, slices[0].SeriesInstanceUID, "P1", np.full((SIZE, SIZE + 2), 7))
    return [*slices, extra]


def tilt(slices):
    for k, part in enumerate(slices):
        part.ImagePositionPatient = [0, 0.6 * k, 2.0 * k]
    return slices


def narrow_one(slices):
    set_pixels(slices[3], np.zeros((8, 8)))
    return slices


def without(name, which=slice(None)):
    def edit(slices):
        for part in slices[which]:
            delattr(part, name)
        return slices

    return edit


def with_tag(name, value, which=slice(None)):
    def edit(slices):
        for part in slices[which]:
            setattr(part, name, value)
        return slices

    return edit


def constant(slices):
    for part in slices:
        set_pixels(part, np.full((SIZE, SIZE + 2), 5))
    return slices


def chest_of_raw_values(slices):
    return with_tag("BodyPartExamined", "CHEST")(with_tag("RescaleIntercept", 0)(slices))


def cut_pixels(slices):
    slices[2].PixelData = slices[2].PixelData[:100]
    return slices


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (drop_one, "CT_SPACING_IRREGULAR"),
        (repeat_place, "CT_DUPLICATE_POSITION"),
        (tilt, "CT_GANTRY_TILT"),
        (lambda slices: slices[:1], "CT_TOO_FEW_SLICES"),
        (without("RescaleSlope"), "CT_NO_RESCALE"),
        (without("RescaleIntercept", slice(2, 3)), "CT_NO_RESCALE"),
        (with_tag("RescaleType", "OD"), "CT_NOT_HU"),
        (with_tag("BurnedInAnnotation", "YES", slice(1, 2)), "CT_BURNED_IN"),
        (with_tag("PhotometricInterpretation", "MONOCHROME1"), "CT_NOT_MONOCHROME"),
        (without("ImagePositionPatient", slice(0, 2)), "CT_NO_GEOMETRY"),
        (without("PixelSpacing"), "CT_NO_GEOMETRY"),
        (with_tag("ImageOrientationPatient", [1, 0.2, 0, 0, 1, 0]), "CT_ORIENTATION_INVALID"),
        (without("PatientID"), "CT_SUBJECT_MISSING"),
        (with_tag("PatientID", "P2", slice(0, 3)), "CT_SUBJECT_MIXED"),
        (with_tag("SOPClassUID", "1.2.840.10008.5.1.4.1.1.2.1"), "CT_ENHANCED_UNSUPPORTED"),
        (chest_of_raw_values, "CT_HU_IMPLAUSIBLE"),
        (constant, "CT_CONSTANT"),
        (cut_pixels, "CT_PIXEL_CORRUPT"),
    ],
)
def test_a_bad_series_is_refused_with_its_code_and_stops_no_other(tmp_path, edit, code):
    save(tmp_path / "source" / "bad", edit(make_series()))
    save(tmp_path / "source" / "good", make_series(patient="P9"))
    manifest = ingest(tmp_path)
    assert codes(manifest) == (1, {code: 1}, {})
    (row,) = (row for row in manifest["volumes"] if row["status"] == "refused")
    assert row["code"] == code
    assert row["message"]
    assert len(VolumeStore(tmp_path / "out").index) == 1


def test_one_slice_of_another_matrix_leaves_a_gap(tmp_path):
    save(tmp_path / "source", narrow_one(make_series()))
    assert codes(ingest(tmp_path)) == (0, {"CT_SPACING_IRREGULAR": 1, "CT_TOO_FEW_SLICES": 1}, {})


@pytest.mark.parametrize(
    ("tags", "code"),
    [
        ({"Modality": "MR"}, "CT_NOT_CT"),
        ({"SOPClassUID": SecondaryCaptureImageStorage}, "CT_SOP_CLASS"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "CT_LOCALIZER"),
    ],
)
def test_what_is_no_slice_is_skipped_and_counted(tmp_path, tags, code):
    slices = make_series()
    others = make_series(2, uid=slices[0].SeriesInstanceUID, **tags)
    save(tmp_path / "source", slices)
    save(tmp_path / "source", others, prefix="other")
    assert codes(ingest(tmp_path)) == (1, {}, {code: 2})


def test_junk_is_counted_and_copies_are_ignored(tmp_path):
    slices = make_series()
    source = save(tmp_path / "source", slices)
    save(tmp_path / "source" / "copy", slices[:2])
    (source / "Thumbs.db").write_bytes(b"junk" * 100)
    (source / "empty.dcm").write_bytes(b"")
    manifest = ingest(tmp_path)
    assert codes(manifest) == (1, {}, {"CT_DUPLICATE_FILE": 2, "CT_NOT_DICOM": 2})
    assert manifest["files"] == 10


@pytest.mark.parametrize("keep", [140, 200, 300, 500, 700, 900])
def test_a_file_cut_anywhere_is_refused(tmp_path, keep):
    source = save(tmp_path / "source", make_series())
    victim = source / "s002"
    victim.write_bytes(victim.read_bytes()[:keep])
    accepted, refused, skipped = codes(ingest(tmp_path))
    assert accepted == 0
    assert sum(refused.values()) >= 1
    assert skipped == {}


def test_two_reconstructions_are_two_volumes(tmp_path):
    save(tmp_path / "source", make_series(), prefix="a")
    save(tmp_path / "source", make_series(ConvolutionKernel="B70f"), prefix="b")
    assert codes(ingest(tmp_path)) == (2, {}, {})
    assert set(VolumeStore(tmp_path / "out").index["kernel"]) == {"B40f", "B70f"}


def test_two_acquisitions_under_one_uid_are_two_flagged_volumes(tmp_path):
    first = make_series(AcquisitionNumber=1)
    save(tmp_path / "source", first, prefix="a")
    save(tmp_path / "source", make_series(uid=first[0].SeriesInstanceUID, AcquisitionNumber=2), prefix="b")
    manifest = ingest(tmp_path)
    assert manifest["accepted"] == 2
    uid, crosswalk = first[0].SeriesInstanceUID, Crosswalk.none(SALT)
    assert {row["image_id"] for row in manifest["volumes"]} == {crosswalk.image_id(f"{uid}#{k}") for k in (1, 2)}
    assert all(row["flags"] == ["CT_SPLIT_SERIES"] for row in manifest["volumes"])


def test_rescale_is_applied_slice_by_slice(tmp_path):
    slices = make_series()
    for k, part in enumerate(slices):
        part.RescaleSlope, part.RescaleIntercept = 0.5, -1000 - k
    save(tmp_path / "source", slices)
    ingest(tmp_path)
    store = VolumeStore(tmp_path / "out")
    hu = store.hu(store.index.image_id[0])[::-1, ::-1].transpose(2, 1, 0)
    for k, part in enumerate(slices):
        np.testing.assert_array_equal(hu[k], np.rint(part.pixel_array * 0.5 - 1000 - k))


def test_a_given_rescale_stands_in_for_absent_tags(tmp_path):
    save(tmp_path / "source", without("RescaleSlope")(make_series()))
    assert ingest(tmp_path, rescale=(1.0, -1024.0))["accepted"] == 1


@pytest.mark.parametrize("declared", [63536, -2000])
def test_padding_written_into_unsigned_voxels_becomes_air_not_metal(tmp_path, declared):
    slices = make_series()
    for part in slices:
        raw = part.pixel_array.copy()
        raw[0, 0] = 63536
        set_pixels(part, raw)
        part.add_new("PixelPaddingValue", "US" if declared > 0 else "SS", declared)
    save(tmp_path / "source", slices)
    assert ingest(tmp_path)["accepted"] == 1
    store = VolumeStore(tmp_path / "out")
    hu = np.asarray(store.hu(store.index.image_id[0]))
    assert (hu[-1, -1] == -1024).all()
    assert hu.max() < 2000


def test_undeclared_padding_is_refused(tmp_path):
    slices = make_series()
    raw = slices[0].pixel_array.copy()
    raw[0, 0] = 63536
    set_pixels(slices[0], raw)
    save(tmp_path / "source", slices)
    assert codes(ingest(tmp_path)) == (0, {"CT_HU_IMPLAUSIBLE": 1}, {})


def test_signed_padding_far_below_air_is_air(tmp_path):
    slices = make_series(RescaleIntercept=0)
    for part in slices:
        raw = part.pixel_array.astype(int) - 1000
        raw[5, 5] = -2000
        set_pixels(part, raw, signed=True)
        part.add_new("PixelPaddingValue", "SS", -2000)
    save(tmp_path / "source", slices)
    assert ingest(tmp_path)["accepted"] == 1
    store = VolumeStore(tmp_path / "out")
    assert np.asarray(store.hu(store.index.image_id[0])).min() == -1024


def test_an_undecodable_transfer_syntax_is_named(tmp_path):
    slices = make_series()
    for part in slices:
        part.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.100")  # MPEG2: no decoder for stills
        part["PixelData"].is_undefined_length = True
        part.PixelData = pydicom.encaps.encapsulate([part.PixelData])
    save(tmp_path / "source", slices)
    manifest = ingest(tmp_path)
    assert manifest["refused"] == {"CT_DECODER_MISSING": 1}
    assert "MPEG2" in manifest["volumes"][0]["message"]


def test_no_identifier_reaches_any_output_byte_or_error(tmp_path, capfd):
    planted = "ZZPLANTEDZZ"
    bad = [drop_one, without("RescaleSlope"), cut_pixels, with_tag("RescaleType", "Q" + planted)]
    bad += [with_tag("PhotometricInterpretation", planted), with_tag("Modality", planted), lambda slices: slices]
    source = tmp_path / "source" / planted
    for n, edit in enumerate(bad):
        slices = make_series(patient=f"{planted}{n}")
        for part in slices:
            for tag, (vr, _, _, retired, name) in pydicom.datadict.DicomDictionary.items():
                texts = vr in {"LO", "SH", "PN", "ST", "LT", "UT", "UC", "CS"} and tag >> 16 > 2 and not retired
                if texts and name not in part and name != "SpecificCharacterSet":
                    setattr(part, name, planted)
            part.ConvolutionKernel = f"{planted}^NAME"
            part.PatientBirthDate = part.StudyID = "19440607"
            part.add_new((0x0009, 0x0010), "LO", planted)
            part.add_new((0x0009, 0x1001), "LO", planted)
        save(source / str(n), edit(slices), prefix=planted)
        (source / str(n) / f"{planted}.cut").write_bytes((source / str(n) / f"{planted}000").read_bytes()[:300])
    uids = {pydicom.dcmread(p, force=True).get("SeriesInstanceUID", planted) for p in source.rglob(f"{planted}0*")}
    manifest = ingest(tmp_path)
    assert manifest["accepted"] == 1
    assert len(manifest["refused"]) >= 5
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    index = pd.read_parquet(tmp_path / "out/ct/index.parquet").to_csv()
    texts = [path.read_bytes() + path.name.encode() for path in written] + [index.encode()]
    captured = capfd.readouterr()
    texts += [captured.out.encode(), captured.err.encode(), json.dumps(manifest).encode()]
    for text in texts:
        for secret in (planted, "19440607", "20200301", "2020-03-01", str(tmp_path), *uids):
            assert secret.encode() not in text


def test_no_warning_quotes_a_header(tmp_path, recwarn, caplog):
    source = save(tmp_path / "source", make_series())
    for path in source.iterdir():
        path.write_bytes(path.read_bytes().replace(b"20200301", b"SECRET!!").replace(b"1.2.826.0.1", b"SECRET.0.1 "))
    recwarn.clear()
    ingest(tmp_path)
    assert not [str(warning.message) for warning in recwarn if "SECRET" in str(warning.message)]
    assert "SECRET" not in caplog.text


def test_an_ingest_that_runs_twice_decodes_nothing_again(tmp_path, monkeypatch):
    save(tmp_path / "source", make_series())
    ingest(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/ct/volumes").iterdir()}
    index = (tmp_path / "out/ct/index.parquet").read_bytes()
    monkeypatch.setattr("mmjepa.ct.series.Opened", None)
    manifest = ingest(tmp_path)
    assert (manifest["accepted"], manifest["unchanged"]) == (1, 1)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out/ct/volumes").iterdir()} == before
    assert (tmp_path / "out/ct/index.parquet").read_bytes() == index


def test_changed_files_or_settings_never_overwrite_a_volume(tmp_path):
    slices = make_series()
    save(tmp_path / "source", slices)
    ingest(tmp_path)
    with pytest.raises(Refusal, match="CACHE_STALE"):
        ingest(tmp_path, min_slices=3)
    slices[0].RescaleIntercept = -1000
    save(tmp_path / "source", slices)
    assert ingest(tmp_path)["refused"] == {"CACHE_STALE": 1}


def test_an_interrupted_run_leaves_no_partial_volume_and_resumes(tmp_path, monkeypatch):
    save(tmp_path / "source" / "a", make_series())
    save(tmp_path / "source" / "b", make_series())
    calls, write_header = [], np.lib.format.write_array_header_1_0

    def stop(handle, header):
        write_header(handle, header)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("numpy.lib.format.write_array_header_1_0", stop)
    with pytest.raises(KeyboardInterrupt):
        ingest(tmp_path)
    names = sorted(path.suffix for path in (tmp_path / "out/ct/volumes").iterdir())
    assert names == [".json", ".npy"]
    manifest = ingest(tmp_path)
    assert (manifest["accepted"], manifest["unchanged"]) == (2, 1)


class FullAfterHeader(io.FileIO):
    """A disk that fills up after the first write; numpy's own writer loses the reason there."""

    started = False

    def write(self, data):
        if self.started:
            return super().write(data)
        self.started = True
        return len(data)


def test_a_full_disk_says_so(tmp_path, monkeypatch):
    save(tmp_path / "source", make_series())

    monkeypatch.setattr("mmjepa.ct.store.open", lambda *_: FullAfterHeader("/dev/full", "wb"), raising=False)
    with pytest.raises(Refusal, match="DISK_FULL"):
        ingest(tmp_path)
    assert not list((tmp_path / "out/ct/volumes").iterdir())


def test_compressed_storage_holds_the_same_voxels_and_resumes(tmp_path):
    pytest.importorskip("blosc2")
    slices = make_series()
    save(tmp_path / "source", slices)
    assert ingest(tmp_path, form="blosc2")["unchanged"] == 0
    np.testing.assert_array_equal(hu_of(tmp_path), [part.pixel_array.astype(int) - 1024 for part in slices])
    assert ingest(tmp_path, form="blosc2")["unchanged"] == 1
    with pytest.raises(Refusal, match="CACHE_STALE"):
        ingest(tmp_path)


def test_any_number_of_workers_writes_the_same_bytes(tmp_path):
    for n in range(3):
        save(tmp_path / "source" / str(n), make_series(patient=f"P{n}"))
    save(tmp_path / "source" / "bad", drop_one(make_series()))
    crosswalk = Crosswalk.none(SALT)
    manifests = [
        ingest_images(tmp_path / "source", tmp_path / f"out{w}", crosswalk=crosswalk, workers=w) for w in (1, 2)
    ]
    assert manifests[0] == manifests[1]
    files = sorted(path.relative_to(tmp_path / "out1") for path in (tmp_path / "out1").rglob("*.*"))
    assert len(files) == 3 * 2 + 4
    for name in files:
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()


def test_the_crosswalk_gives_subject_and_shifted_time(tmp_path):
    save(tmp_path / "source" / "known", make_series())
    save(tmp_path / "source" / "unknown", make_series(patient="P2"))
    (tmp_path / "identity").mkdir()
    (tmp_path / "identity/salt.txt").write_text(SALT)
    (tmp_path / "identity/crosswalk.csv").write_text("patient_id,subject_id,date_shift_days\nP1,77,-10\n")
    crosswalk = Crosswalk.read(tmp_path / "identity/crosswalk.csv", tmp_path / "identity/salt.txt")
    manifest = ingest(tmp_path, crosswalk=crosswalk)
    assert manifest["paired"]
    assert codes(manifest) == (1, {"CT_SUBJECT_UNKNOWN": 1}, {})
    (row,) = VolumeStore(tmp_path / "out").index.to_dict("records")
    assert row["subject_id"] == 77
    assert row["time"] == dt.datetime(2020, 2, 20, 10, 15, 0, 500000)
    assert (row["n_slices"], row["thickness_mm"], row["source_kind"]) == (6, 5.0, "dicom")


def test_a_date_without_a_clock_time_is_no_time(tmp_path):
    slices = make_series(AcquisitionTime="", StudyTime="")
    save(tmp_path / "source", slices)
    assert ingest(tmp_path)["volumes"][0]["flags"] == ["CT_NO_TIME"]
    assert VolumeStore(tmp_path / "out").index["time"].isna().all()


def test_a_folder_without_any_image_is_refused_and_still_has_a_manifest(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "notes.txt").write_text("nothing here")
    with pytest.raises(Refusal, match="CT_EMPTY"):
        ingest(tmp_path)
    assert json.loads((tmp_path / "out/ct/manifest.json").read_text())["skipped"] == {"CT_NOT_DICOM": 1}
    save(tmp_path / "source", make_series())
    assert ingest(tmp_path, min_slices=3)["accepted"] == 1


def test_the_output_may_not_lie_in_the_source_nor_hold_the_identities(tmp_path):
    save(tmp_path / "source", make_series())
    with pytest.raises(Refusal, match="OUT_IN_SOURCE"):
        ingest_images(tmp_path / "source", tmp_path / "source" / "out", crosswalk=Crosswalk.none(SALT))
    with pytest.raises(Refusal, match="SOURCE_MISSING"):
        ingest_images(tmp_path / "nowhere", tmp_path / "out", crosswalk=Crosswalk.none(SALT))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/salt.txt").write_text(SALT)
    (tmp_path / "out/crosswalk.csv").write_text("patient_id,subject_id,date_shift_days\nP1,77,-10\n")
    crosswalk = Crosswalk.read(tmp_path / "out/crosswalk.csv", tmp_path / "out/salt.txt")
    with pytest.raises(Refusal, match="IDENTITY_IN_COHORT"):
        ingest(tmp_path, crosswalk=crosswalk)


def test_lossless_jpeg_2000_reads_as_the_same_voxels(tmp_path):
    pytest.importorskip("openjpeg")
    slices = make_series()
    for part in slices:
        set_pixels(part, np.kron(part.pixel_array, np.ones((4, 4), int)), bits=12)
    save(tmp_path / "source", slices)
    ingest(tmp_path)
    for part in slices:
        part.compress(JPEG2000Lossless, generate_instance_uid=False)
    save(tmp_path / "b" / "source", slices)
    assert codes(ingest(tmp_path / "b")) == (1, {}, {})
    a, b = VolumeStore(tmp_path / "out"), VolumeStore(tmp_path / "b" / "out")
    np.testing.assert_array_equal(a.hu(a.index.image_id[0]), b.hu(b.index.image_id[0]))
    assert a.fingerprint != b.fingerprint


def test_a_file_without_preamble_is_still_found_by_content(tmp_path):
    slices = make_series()
    for part in slices:
        part.preamble = None
    (tmp_path / "source").mkdir()
    for n, part in enumerate(slices):
        part.file_meta = FileMetaDataset()
        with open(tmp_path / "source" / str(n), "wb") as handle:
            pydicom.dcmwrite(handle, part, implicit_vr=True, little_endian=True)
    assert codes(ingest(tmp_path)) == (1, {}, {})


def gdcm_compressed(folder, syntax):
    """Files of ``folder`` rewritten by gdcm's own encoder."""
    gdcm = pytest.importorskip("gdcm")
    for path in folder.iterdir():
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(path))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(syntax(gdcm)))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()


COMPRESSED = {
    "JPEG lossless": lambda gdcm: gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    "JPEG lossless 14": lambda gdcm: gdcm.TransferSyntax.JPEGLosslessProcess14,
    "JPEG-LS": lambda gdcm: gdcm.TransferSyntax.JPEGLSLossless,
    "JPEG 2000": lambda gdcm: gdcm.TransferSyntax.JPEG2000Lossless,
    "RLE": lambda gdcm: gdcm.TransferSyntax.RLELossless,
}


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", COMPRESSED)
def test_a_lossless_syntax_reads_as_the_voxels_that_were_compressed(tmp_path, name, signed):
    slices = make_series()
    for part in slices:
        set_pixels(part, part.pixel_array.astype(int) - 1000 * signed, signed=signed, bits=16 if signed else 12)
    gdcm_compressed(save(tmp_path / "source", slices), COMPRESSED[name])
    assert pydicom.dcmread(tmp_path / "source" / "s000").file_meta.TransferSyntaxUID.is_compressed
    assert codes(ingest(tmp_path)) == (1, {}, {})
    np.testing.assert_array_equal(
        hu_of(tmp_path), [np.clip(part.pixel_array.astype(int) - 1024, -1024, 3071) for part in slices]
    )


def test_a_deflated_data_set_and_pydicoms_own_run_lengths_read_as_the_same_voxels(tmp_path):
    slices = make_series()
    for part in slices[:3]:
        part.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    for part in slices[3:]:
        part.compress(RLELossless, generate_instance_uid=False)
    save(tmp_path / "source", slices)
    assert codes(ingest(tmp_path)) == (1, {}, {})
    np.testing.assert_array_equal(hu_of(tmp_path), [part.pixel_array.astype(int) - 1024 for part in make_series()])


def hu_of(tmp_path):
    """The one axial volume as [slices, rows, columns]."""
    store = VolumeStore(tmp_path / "out")
    (image_id,) = store.index["image_id"]
    return np.asarray(store.hu(image_id))[::-1, ::-1].transpose(2, 1, 0)


def sheared_phantom(shift_mm):
    """Slices of HU = 200 + 4x - 3y + 10z (mm, LPS), each seen from its own place: 2 mm up and ``shift_mm`` (x, y) sideways."""
    slices = make_series(8)
    for k, part in enumerate(slices):
        x0, y0, z = shift_mm[0] * k, shift_mm[1] * k, 2.0 * k
        part.ImagePositionPatient = [x0, y0, z]
        row, column = np.mgrid[:SIZE, : SIZE + 2]
        set_pixels(part, np.rint(1224 + 4 * (x0 + 0.8 * column) - 3 * (y0 + 0.7 * row) + 10 * z).astype(int))
    return slices


@pytest.mark.parametrize("shift_mm", [(0, 0.6), (0, -0.71), (0.5, 0.3), (-0.8, 0)])
def test_a_tilted_series_is_straightened_on_request_with_every_point_at_its_place(tmp_path, shift_mm):
    save(tmp_path / "source", sheared_phantom(shift_mm))
    manifest = ingest(tmp_path, tilt="resample")
    assert codes(manifest) == (1, {}, {})
    assert manifest["volumes"][0]["flags"] == ["CT_GANTRY_TILT"]
    store = VolumeStore(tmp_path / "out")
    (image_id,) = store.index["image_id"]
    hu, affine = np.asarray(store.hu(image_id)), store.affine(image_id)
    np.testing.assert_allclose(np.abs(affine[:3, :3]), np.diag([0.8, 0.7, 2.0]), atol=1e-9)
    places = np.stack([*np.meshgrid(*map(np.arange, hu.shape), indexing="ij"), np.ones(hu.shape)])
    x, y, z = np.einsum("ij,jabc->iabc", affine, places)[:3] * np.array([-1, -1, 1])[:, None, None, None]
    k = np.rint(z / 2)
    left, top = x - shift_mm[0] * k, y - shift_mm[1] * k  # mm from the slice's own corner
    inside = (left > -1e-6) & (left < 0.8 * (SIZE + 1) + 1e-6) & (top > -1e-6) & (top < 0.7 * (SIZE - 1) + 1e-6)
    assert inside.sum() >= 8 * (SIZE - 1) * (SIZE + 1)
    assert np.abs(hu - (200 + 4 * x - 3 * y + 10 * z))[inside].max() <= 1
    far = (left < -0.8) | (left > 0.8 * (SIZE + 2)) | (top < -0.7) | (top > 0.7 * SIZE)
    assert (hu[far] == -1024).all()
    assert manifest["volumes"][0]["hu_range"] == [hu.min(), hu.max()]


def test_an_uneven_sideways_shift_is_no_tilt_and_an_upright_series_is_left_as_it_is(tmp_path):
    slices = sheared_phantom((0, 0))
    save(tmp_path / "source" / "upright", slices)
    odd = make_series()
    odd[3].ImagePositionPatient[0] += 5
    save(tmp_path / "source" / "odd", odd)
    manifest = ingest(tmp_path, tilt="resample")
    assert codes(manifest) == (1, {"CT_GANTRY_TILT": 1}, {})
    np.testing.assert_array_equal(hu_of(tmp_path), [part.pixel_array.astype(int) - 1024 for part in slices])


def test_the_table_lists_every_volume_and_file_that_was_refused_skipped_or_corrected(tmp_path):
    source = save(tmp_path / "source" / "good", without("RescaleSlope")(make_series()))
    (source / "a.txt").write_text("junk")
    save(tmp_path / "source" / "bad", drop_one(make_series()))
    save(tmp_path / "source" / "good", make_series(1, Modality="MR"), prefix="mr")
    manifest = ingest(tmp_path, rescale=(1.0, -1024.0))
    with open(tmp_path / "out/ct/manifest.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert sorted((row["item"], row["state"], row["code"]) for row in rows) == [
        ("file", "skipped", "CT_NOT_CT"),
        ("file", "skipped", "CT_NOT_DICOM"),
        ("volume", "accepted", ""),
        ("volume", "corrected", "CT_NO_RESCALE"),
        ("volume", "refused", "CT_SPACING_IRREGULAR"),
    ]
    walk = sorted(path for path in (tmp_path / "source").rglob("*") if path.is_file())
    for skip in manifest["skipped_files"]:
        name = walk[skip["number"] - 1].relative_to(tmp_path / "source").as_posix()
        assert skip["file_id"] == Crosswalk.none(SALT).image_id(f"file:{name}")
    assert all(row["found"] for row in rows)


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (with_tag("PixelSpacing", [1e-9, 1e-9]), "CT_OUT_OF_LIMITS"),
        (with_tag("ImagePositionPatient", ["1e200", "-1e200", "1e200"], slice(1, 2)), "CT_OUT_OF_LIMITS"),
        (with_tag("RescaleSlope", "1e39"), "CT_HU_IMPLAUSIBLE"),
    ],
)
def test_numbers_that_no_scanner_writes_are_refused(tmp_path, edit, code):
    save(tmp_path / "source", edit(make_series()))
    assert codes(ingest(tmp_path)) == (0, {code: 1}, {})


def test_a_limit_of_voxels_and_a_full_memory_refuse_one_volume_and_stop_no_other(tmp_path, monkeypatch):
    save(tmp_path / "source" / "a", make_series(4, patient="P1"))
    save(tmp_path / "source" / "b", make_series(6, patient="P2"))
    assert codes(ingest(tmp_path, max_voxels=5 * SIZE * (SIZE + 2))) == (1, {"CT_OUT_OF_LIMITS": 1}, {})
    read = series.read_volume

    def full(found, settings):
        if len(found.parts) == 4:
            raise MemoryError
        return read(found, settings)

    monkeypatch.setattr("mmjepa.ct.series.read_volume", full)
    manifest = ingest_images(tmp_path / "source", tmp_path / "out2", crosswalk=Crosswalk.none(SALT))
    assert codes(manifest) == (1, {"CT_OUT_OF_LIMITS": 1}, {})


def test_links_to_folders_are_followed_once_and_a_pipe_is_not_waited_for(tmp_path):
    elsewhere = save(tmp_path / "elsewhere", make_series())
    source = tmp_path / "source"
    source.mkdir()
    (source / "scan").symlink_to(elsewhere)
    (source / "again").symlink_to(elsewhere)
    (elsewhere / "up").symlink_to(source)
    os.mkfifo(source / "pipe")
    (source / os.fsdecode(b"latin-\xe9")).write_bytes(b"\0" * 128 + b"DICM" + b"x" * 40)
    manifest = ingest(tmp_path)
    assert manifest["accepted"] == 1
    assert manifest["skipped"].get("CT_DUPLICATE_FILE") is None
    assert manifest["files"] == 8


def test_maker_and_voltage_are_kept_and_free_text_is_not(tmp_path):
    save(tmp_path / "source" / "a", make_series(Manufacturer="SIEMENS Healthineers", KVP=120))
    save(tmp_path / "source" / "b", make_series(Manufacturer="Dr Planted's own", patient="P2"))
    ingest(tmp_path)
    sidecars = [json.loads(path.read_text())["scanner"] for path in (tmp_path / "out/ct/volumes").glob("*.json")]
    assert sorted((one["maker"], one["kvp"]) for one in sidecars) == [("", None), ("SIEMENS", 120)]


@pytest.mark.real_data
def test_the_real_chest_ct_is_two_volumes_and_every_other_file_is_counted(tmp_path, data_folder):
    import SimpleITK as sitk

    manifest = ingest_images(data_folder / "chest_ct", tmp_path / "out", crosswalk=Crosswalk.none(SALT))
    assert manifest["accepted"] == 2
    assert manifest["refused"] == {}
    assert manifest["skipped"]["CT_NOT_DICOM"] == manifest["files"] - 60
    store = VolumeStore(tmp_path / "out")
    assert set(store.index["kernel"]) == {"B70f", "B40f"}
    for image_id, kernel in zip(store.index["image_id"], store.index["kernel"], strict=True):
        assert store.hu(image_id).shape == (512, 512, 30)
        assert store.spacing_mm(image_id) == pytest.approx((0.646484375, 0.646484375, 8.0))
        folder = str(data_folder / "chest_ct" / f"A0002_{kernel}")
        image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(folder))
        theirs = sitk.GetArrayFromImage(image).transpose(2, 1, 0)[::-1, ::-1]
        np.testing.assert_array_equal(store.hu(image_id), np.clip(theirs, -1024, 3071))
        corner = image.TransformIndexToPhysicalPoint((511, 511, 0))
        np.testing.assert_allclose(store.affine(image_id)[:3, 3], np.array(corner) * [-1, -1, 1], atol=1e-6)
