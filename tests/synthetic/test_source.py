"""Source folders on disk."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import meds
import nibabel
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pydicom
import pytest
import SimpleITK
from threadpoolctl import threadpool_limits

import synthetic
from mmjepa.refusal import Refusal
from synthetic import concepts, ct, source
from synthetic.draws import uniforms
from synthetic.presets import find_site
from synthetic.world import World

PATIENTS = {"nifti": 60, "dicom": 4}


@pytest.fixture(scope="module")
def nifti(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "internal"
    synthetic.generate(folder, patients=PATIENTS["nifti"])
    return folder


@pytest.fixture(scope="module")
def dicom(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "external"
    synthetic.generate(folder, patients=PATIENTS["dicom"], site="external", image_format="dicom")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def records(folder: Path) -> pd.DataFrame:
    return pd.concat(
        [pd.read_parquet(p) for p in sorted((folder / "ehr" / "data").rglob("*.parquet"))], ignore_index=True
    )


def crosswalk(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "identity" / "crosswalk.csv").set_index("patient_id")


def rendered(site: str, count: int) -> list[np.ndarray]:
    world, law = World.named("li2025", 0), find_site("li2025", site)
    t = world.sample(law, 0, count).t
    facts = concepts.draw(t, 0, 0)[:, concepts.IN_IMAGE]
    protocol = uniforms(0, "ct/protocol", 0, count, 3)
    rows = ct.parameters(t["image"], world.loaded("image"), protocol, law, facts).to_dict("records")
    return [ct.render(row, 0, i) for i, row in enumerate(rows)]


@pytest.mark.parametrize("kind", ["nifti", "dicom"])
def test_the_record_is_valid_meds(kind, request):
    root = request.getfixturevalue(kind) / "ehr"
    files = sorted((root / "data").rglob("*.parquet"))
    for path in files:
        table = pq.read_table(path)
        meds.DataSchema.validate(table)
        assert set(table.column_names) >= {"available_time", "visit_id", "image_id"}
    meds.CodeMetadataSchema.validate(pq.read_table(root / meds.code_metadata_filepath))
    meds.SubjectSplitSchema.validate(pq.read_table(root / meds.subject_splits_filepath))
    metadata = json.loads((root / meds.dataset_metadata_filepath).read_text())
    meds.DatasetMetadataSchema.validate(metadata)
    assert metadata["additional_value_modality_columns"] == ["image_id"]
    meds.LabelSchema.validate(pq.read_table(root.parent / "labels" / "malignancy" / "0.parquet"))


def test_a_subject_lies_in_one_file_of_its_split_together_and_in_time_order(nifti):
    split = pd.read_parquet(nifti / "ehr" / meds.subject_splits_filepath).set_index("subject_id")["split"]
    seen = []
    for path in (nifti / "ehr" / "data").rglob("*.parquet"):
        table = pd.read_parquet(path)
        runs = table["subject_id"][table["subject_id"].diff() != 0].tolist()
        assert len(runs) == len(set(runs))
        assert set(split[runs]) == {path.parent.name}
        for _, rows in table.groupby("subject_id"):
            timed = rows["time"].notna().to_numpy()
            assert not timed[: (~timed).sum()].any()
            assert rows["time"].dropna().is_monotonic_increasing
        seen += runs
    assert sorted(seen) == sorted(split.index)
    assert set(split) == {"train", "tuning", "held_out"}


def test_every_code_is_listed_and_static_rows_hold_background_and_site(nifti):
    rows = records(nifti)
    listed = pd.read_parquet(nifti / "ehr" / meds.code_metadata_filepath)
    assert set(rows["code"]) <= set(listed["code"])
    assert listed["description"].str.len().min() > 4
    static = rows[rows["time"].isna()].groupby("subject_id")["code"].agg(sorted)
    for codes in static:
        assert [c.split("//")[0] for c in codes if c != "HISTORY//CANCER"] == ["GENDER", "SITE", "SMOKING"]


def test_labels_stand_at_the_index_ct_and_only_the_cancer_code_comes_after(nifti):
    rows = records(nifti)
    label = pd.read_parquet(nifti / "labels" / "malignancy" / "0.parquet").set_index("subject_id")
    scan = rows[rows["code"] == "CT//CHEST"].set_index("subject_id")
    assert (scan["time"].reindex(label.index) == label["prediction_time"]).all()
    assert (scan["available_time"] == scan["time"]).all()
    later = rows[rows["time"] > rows["subject_id"].map(label["prediction_time"])]
    assert (later["code"] == "DIAGNOSIS//LUNG_CANCER").all()
    assert set(later["subject_id"]) == set(label.index[label["boolean_value"]])
    before = rows.drop(later.index)
    assert not (before["available_time"] > before["subject_id"].map(label["prediction_time"])).any()
    assert "DIAGNOSIS//LUNG_CANCER" not in set(before["code"])


def test_image_ids_are_the_salted_hashes_of_paths_or_series(nifti, dicom):
    for folder in (nifti, dicom):
        salt = (folder / "identity" / "salt.txt").read_text()
        if folder is nifti:
            keys = pd.read_csv(folder / "images" / "images.csv").set_index("patient_id")["file"]
        else:
            headers = [pydicom.dcmread(p / "0001.dcm", stop_before_pixels=True) for p in (folder / "images").iterdir()]
            keys = pd.Series({str(h.PatientID): str(h.SeriesInstanceUID) for h in headers})
        subject = crosswalk(folder)["subject_id"]
        expected = {subject[who]: hashlib.sha256((salt + key).encode()).hexdigest()[:16] for who, key in keys.items()}
        scan = records(folder).query("code == 'CT//CHEST'").set_index("subject_id")["image_id"]
        assert scan.to_dict() == expected


def test_source_dates_plus_the_shift_are_the_cohort_dates(nifti, dicom):
    for folder in (nifti, dicom):
        if folder is nifti:
            taken = pd.read_csv(folder / "images" / "images.csv").set_index("patient_id")["time"].map(pd.Timestamp)
        else:
            headers = [pydicom.dcmread(p / "0001.dcm", stop_before_pixels=True) for p in (folder / "images").iterdir()]
            taken = pd.Series(
                {str(h.PatientID): pd.Timestamp(f"{h.AcquisitionDate} {h.AcquisitionTime}") for h in headers}
            )
        people = crosswalk(folder).loc[taken.index]
        assert (people["date_shift_days"].abs() >= 30).all()
        moved = (taken + pd.to_timedelta(people["date_shift_days"], unit="D")).set_axis(people["subject_id"])
        scan = records(folder).query("code == 'CT//CHEST'").set_index("subject_id")["time"]
        assert (moved.reindex(scan.index) == scan).all()


def test_sites_share_no_subject_patient_or_image(nifti, dicom):
    a, b = crosswalk(nifti).reset_index(), crosswalk(dicom).reset_index()
    assert not set(a["subject_id"]) & set(b["subject_id"])
    assert not set(a["patient_id"]) & set(b["patient_id"])
    assert not {p.name for p in (nifti / "images").iterdir()} & {p.name for p in (dicom / "images").iterdir()}


def test_nifti_files_read_back_to_the_rendered_hu_in_ras(nifti):
    listing = pd.read_csv(nifti / "images" / "images.csv")
    for patch, name in zip(rendered("internal", 3), listing["file"], strict=False):
        image = nibabel.load(nifti / "images" / name)
        assert np.asarray(image.dataobj).dtype == np.int16
        assert (np.asarray(image.dataobj) == patch).all()
        assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
        assert image.header["sform_code"] == image.header["qform_code"] == 1


def test_dicom_series_read_back_to_the_rendered_hu_and_the_nifti_geometry(dicom, tmp_path):
    synthetic.generate(tmp_path / "same", patients=2, site="external")
    nifti = sorted(pd.read_csv(tmp_path / "same" / "images" / "images.csv")["file"])
    patches = {hashlib.sha256(p.tobytes()).hexdigest() for p in rendered("external", 2)}
    for name in nifti:
        image = nibabel.load(tmp_path / "same" / "images" / name)
        series = dicom / "images" / Path(name).stem
        slices = sorted((pydicom.dcmread(p) for p in series.iterdir()), key=lambda s: float(s.ImagePositionPatient[2]))
        hu = np.stack([s.pixel_array * float(s.RescaleSlope) + float(s.RescaleIntercept) for s in slices])
        volume = hu.transpose(2, 1, 0)[::-1, ::-1].astype(np.int16)
        assert hashlib.sha256(volume.tobytes()).hexdigest() in patches
        assert (volume == np.asarray(image.dataobj)).all()
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series)))
        itk = reader.Execute()
        assert (SimpleITK.GetArrayFromImage(itk) == hu).all()
        assert itk.GetSpacing() == (1, 1, 1)
        corner = itk.TransformIndexToPhysicalPoint((31, 31, 0))  # LPS of the RAS volume's first voxel
        assert np.allclose(np.array(corner) * (-1, -1, 1), image.affine[:3, 3])


def test_dicom_headers_are_whole_and_hold_no_id_but_the_patients(dicom):
    subjects = {str(s) for s in crosswalk(dicom)["subject_id"]}
    for series in (dicom / "images").iterdir():
        slices = [pydicom.dcmread(p) for p in series.iterdir()]
        assert len({s.SOPInstanceUID for s in slices}) == len(slices) == 32
        assert len({(s.SeriesInstanceUID, s.StudyInstanceUID, s.FrameOfReferenceUID) for s in slices}) == 1
        assert all(re.fullmatch(r"2\.25\.\d{1,39}", s.SOPInstanceUID) for s in slices)
        first = slices[0]
        assert first.SOPClassUID == first.file_meta.MediaStorageSOPClassUID == pydicom.uid.CTImageStorage
        assert first.StudyDate == first.SeriesDate == first.AcquisitionDate
        assert first.ConvolutionKernel in {"SMOOTH", "STANDARD", "SHARP"}
        assert first.SliceThickness in {1, 2.5}
        assert first.RescaleType == "HU"
        text = str(first)
        assert not any(subject in text for subject in subjects)


@pytest.mark.parametrize("image_format", ["nifti", "dicom"])
def test_bytes_do_not_depend_on_workers_or_chunks(image_format, tmp_path, monkeypatch):
    patients = {"nifti": 31, "dicom": 3}[image_format]
    kind = {"patients": patients, "image_format": image_format}
    synthetic.generate(tmp_path / "a", **kind, workers=2 if image_format == "nifti" else 1)
    monkeypatch.setattr(source, "CHUNK", 7 if image_format == "nifti" else 2)
    synthetic.generate(tmp_path / "b", **kind)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_bytes_do_not_depend_on_threads(tmp_path):
    for threads in (1, 2):
        with threadpool_limits(threads):
            synthetic.generate(tmp_path / str(threads), patients=12)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_a_folder_that_begins_later_holds_the_same_people_as_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "SHARD", 8)
    synthetic.generate(tmp_path / "whole", patients=30)
    synthetic.generate(tmp_path / "part", patients=11, first=14)
    whole, part = contents(tmp_path / "whole" / "images"), contents(tmp_path / "part" / "images")
    part.pop("images.csv")
    assert len(part) == 11
    assert part.items() <= whole.items()
    for frames in (records, lambda f: pd.read_parquet(f / "truth" / "latents.parquet")):
        a, b = (frames(tmp_path / name) for name in ("whole", "part"))
        a = a[a["subject_id"].isin(b["subject_id"].unique())]
        key = [c for c in ("subject_id", "time", "code") if c in a]
        a, b = (frame.sort_values(key, kind="stable", ignore_index=True) for frame in (a, b))
        pd.testing.assert_frame_equal(a, b)


def test_images_and_records_depend_on_the_readout_alone(tmp_path, monkeypatch):
    synthetic.generate(tmp_path / "a", patients=12)
    sample = World.sample

    def changed(self, site, first, count):
        s = sample(self, site, first, count)
        return replace(s, z=s.z + 1, c=-s.c, eta=-s.eta, y=~s.y, theta={m: 2 * v for m, v in s.theta.items()})

    monkeypatch.setattr(World, "sample", changed)
    synthetic.generate(tmp_path / "b", patients=12)
    a, b = contents(tmp_path / "a" / "images"), contents(tmp_path / "b" / "images")
    assert a == b
    kept = [
        r[r["code"] != "DIAGNOSIS//LUNG_CANCER"].reset_index(drop=True)
        for r in map(records, (tmp_path / "a", tmp_path / "b"))
    ]
    pd.testing.assert_frame_equal(*kept)
    assert len(records(tmp_path / "a")) != len(kept[0])


def test_the_truth_lies_in_its_own_folder(nifti):
    assert sorted(p.name for p in nifti.iterdir()) == ["ehr", "identity", "images", "labels", "truth"]
    oracle = pd.read_parquet(nifti / "truth" / "oracle.parquet")
    label = pd.read_parquet(nifti / "labels" / "malignancy" / "0.parquet")
    assert (oracle["y"] == label["boolean_value"]).all()
    assert set(oracle) == {
        *("subject_id", "prediction_time", "y", "causal_z", "mayo", "brock"),
        *(f"{score}_{view}" for score in ("env_bayes", "source_bayes", "c_blind") for view in ("image", "ehr", "both")),
    }
    latents = pd.read_parquet(nifti / "truth" / "latents.parquet")
    assert (latents["subject_id"] == label["subject_id"]).all()
    assert {"s1", "c1", "eta", "t_image_c1", "t_ehr_s2", "ct_diameter_mm", "ct_kernel"} <= set(latents)


def test_an_existing_output_is_refused_and_untouched(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("mine")
    with pytest.raises(Refusal, match="OUTPUT_EXISTS"):
        synthetic.generate(tmp_path / "x", patients=2)
    assert [p.name for p in tmp_path.rglob("*")] == ["x", "mine.txt"]


@pytest.mark.parametrize(
    "wrong",
    [{"patients": 0}, {"seed": -1}, {"workers": 0}, {"site": "mars"}, {"preset": "base2"}, {"image_format": "png"}],
)
def test_wrong_arguments_are_refused_before_anything_is_written(wrong, tmp_path):
    with pytest.raises(Refusal, match="SYNTHETIC_"):
        synthetic.generate(tmp_path / "x", **({"patients": 2} | wrong))
    assert not list(tmp_path.iterdir())
