"""A second ingest opens only what changed and what is judged with it, and says what a fresh one would."""

import json
import os
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from mmjepa.ct.dicom import CT_IMAGE
from mmjepa.ct.explain import files_of
from mmjepa.ct.ingest import ingest_images
from mmjepa.identity import Crosswalk
from mmjepa.refusal import Refusal

CROSSWALK = Crosswalk.none("a salt for tests")
OPENED: list[str] = []
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)


def write_slice(path: Path, uid: str, place: int, patient: str, **tags) -> None:
    data = pydicom.Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = CT_IMAGE, generate_uid(), uid
    data.PatientID, data.Modality, data.ImageType = patient, "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.AcquisitionDate, data.AcquisitionTime = "20200301", f"1015{place:02d}"
    data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 2.0 * place]
    data.PixelSpacing = [0.7, 0.7]
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 5, 7, 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    data.PixelData = np.random.default_rng(place).integers(0, 3000, (5, 7)).astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def write_series(folder: Path, patient: str, places=range(5), **tags) -> str:
    uid = generate_uid()
    for k in places:
        write_slice(folder / f"{k}.dcm", uid, k, patient, **tags)
    return uid


@pytest.fixture
def source(tmp_path) -> Path:
    """Two series, one with a gap, one with a doubtful slice and a copy, one of MR, junk, two NIfTI volumes and a row too many."""
    folder = tmp_path / "source"
    write_series(folder / "a", "P1")
    write_series(folder / "b", "P2")
    write_series(folder / "gap", "P3", [0, 1, 2, 4, 5])
    uid = write_series(folder / "lost", "P4")
    write_slice(folder / "lost" / "x.dcm", uid, 5, "P4", Modality="MR")
    shutil.copy(folder / "lost" / "1.dcm", folder / "lost" / "y.dcm")
    write_series(folder / "mr", "P5", Modality="MR")
    (folder / "junk").write_bytes(b"junk" * 200)
    (folder / "nifti").mkdir()
    for n in range(2):
        hu = np.random.default_rng(n).integers(-1000, 500, (6, 5, 4)).astype(np.int16)
        nib.save(nib.Nifti1Image(hu, np.diag([1, 1, 2, 1])), folder / "nifti" / f"{n}.nii")
    rows = ["0.nii,P6,2021-02-03T04:05:06", "1.nii,P7,", "2.nii,P8,"]
    (folder / "nifti" / "images.csv").write_text("\n".join(["file,patient_id,time", *rows]) + "\n")
    return folder


def ingest(source: Path, out: Path, crosswalk=CROSSWALK):
    """The manifest, and what was opened below the source."""
    OPENED.clear()
    manifest = ingest_images(source, out, crosswalk=crosswalk)
    opened = {Path(name) for name in OPENED if name.startswith(str(source))}
    return manifest, {path.relative_to(source).as_posix() for path in opened if path.is_file()}


def without_state(manifest):
    rows = [{**row, "status": "refused" if row["status"] == "refused" else "there"} for row in manifest["volumes"]]
    return {**manifest, "volumes": rows, "unchanged": None, "removed": None, "removed_volumes": None}


def assert_as_fresh(manifest, source: Path, out: Path, crosswalk=CROSSWALK) -> None:
    fresh, _ = ingest(source, out.with_name("fresh"), crosswalk)
    assert without_state(manifest) == without_state(fresh)
    pd.testing.assert_frame_equal(
        *(pd.read_parquet(folder / "ct/index.parquet") for folder in (out, out.with_name("fresh")))
    )
    assert manifest == json.loads((out / "ct/manifest.json").read_text())


def test_a_second_run_of_the_same_files_opens_none_and_says_the_same(source, tmp_path):
    first, opened = ingest(source, tmp_path / "out")
    assert len(opened) == 31
    assert first["refused"] == {"CT_SPACING_IRREGULAR": 1, "NII_FILE_MISSING": 1}
    table = (tmp_path / "out/ct/manifest.csv").read_bytes()
    index = (tmp_path / "out/ct/index.parquet").read_bytes()
    for _ in range(2):
        again, opened = ingest(source, tmp_path / "out")
        assert not opened
        assert without_state(again) == without_state(first)
        assert (again["accepted"], again["unchanged"]) == (5, 5)
        assert (tmp_path / "out/ct/manifest.csv").read_bytes() == table
        assert (tmp_path / "out/ct/index.parquet").read_bytes() == index


def folder_of(source: Path, name: str) -> set[str]:
    return {path.relative_to(source).as_posix() for path in (source / name).iterdir()}


def touch(source):
    os.utime(source / "a/2.dcm")
    return folder_of(source, "a")


def change(source):
    data = pydicom.dcmread(source / "gap/5.dcm")
    data.ImagePositionPatient = [0, 0, 6.0]
    data.save_as(source / "gap/5.dcm")
    return folder_of(source, "gap")


def remove(source):
    (source / "lost/x.dcm").unlink()
    return folder_of(source, "lost")


def remove_a_series(source):
    shutil.rmtree(source / "a")
    return set()


def join(source):
    data = pydicom.dcmread(source / "gap/4.dcm")
    data.ImagePositionPatient, data.SOPInstanceUID = [0, 0, 6.0], generate_uid()
    data.save_as(source / "early.dcm")
    return folder_of(source, "gap") | {"early.dcm"}


def add_a_patient(source):
    write_series(source / "new", "P0")
    return folder_of(source, "new")


def add_junk(source):
    (source / "0").write_bytes(b"first in the walk" * 50)
    return {"0"}


def change_a_nifti(source):
    nib.save(
        nib.Nifti1Image(np.arange(-1000, -880).reshape(6, 5, 4).astype(np.int16), np.eye(4)), source / "nifti/2.nii"
    )
    return {"nifti/2.nii", "nifti/images.csv"}


def change_the_table(source):
    table = source / "nifti/images.csv"
    table.write_text(table.read_text().replace("P8", "P1"))
    return folder_of(source, "nifti")


EDITS = [
    touch, change, remove, remove_a_series, join, add_a_patient, add_junk, change_a_nifti, change_the_table,
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_only_what_changed_and_what_is_judged_with_it_is_opened(source, tmp_path, edit):
    ingest(source, tmp_path / "out")
    expected = edit(source)
    manifest, opened = ingest(source, tmp_path / "out")
    assert opened == expected
    assert_as_fresh(manifest, source, tmp_path / "out")
    assert not ingest(source, tmp_path / "out")[1]


@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_a_volume_that_is_not_whole_is_made_again(source, tmp_path, suffix):
    first, _ = ingest(source, tmp_path / "out")
    lost = CROSSWALK.image_id(str(pydicom.dcmread(source / "b/0.dcm").SeriesInstanceUID))
    (tmp_path / f"out/ct/volumes/{lost}{suffix}").unlink()
    manifest, opened = ingest(source, tmp_path / "out")
    assert opened == folder_of(source, "b")
    assert (manifest["accepted"], manifest["unchanged"]) == (5, 4)
    assert without_state(manifest) == without_state(first)
    assert (tmp_path / f"out/ct/volumes/{lost}{suffix}").is_file()


def test_another_crosswalk_reads_everything_again(source, tmp_path):
    people = {f"P{n}": (100 + n, -30) for n in range(9)}
    ingest(source, tmp_path / "out", Crosswalk("a salt for tests", True, (), people))
    crosswalk = Crosswalk("a salt for tests", True, (), {**people, "P1": (7, -31)})
    manifest, opened = ingest(source, tmp_path / "out", crosswalk)
    assert len(opened) == 31
    assert_as_fresh(manifest, source, tmp_path / "out", crosswalk)


@pytest.mark.parametrize("name", ["scan.parquet", "manifest.json", "index.parquet"])
def test_a_memory_that_does_not_fit_its_manifest_and_index_counts_for_nothing(source, tmp_path, name):
    first, _ = ingest(source, tmp_path / "out")
    path = tmp_path / "out/ct" / name
    path.write_bytes(path.read_bytes()[:-1] + (b" " if name.endswith("json") else b""))
    if name == "index.parquet":
        pq.write_table(pq.read_table(tmp_path / "out/ct/scan.parquet"), path)
    manifest, opened = ingest(source, tmp_path / "out")
    assert len(opened) == 31
    assert without_state(manifest) == without_state(first)


def test_what_the_machine_may_have_refused_is_tried_again(source, tmp_path, monkeypatch):
    (source / "broken").write_bytes((source / "a/0.dcm").read_bytes()[:300])
    monkeypatch.setattr("mmjepa.ct.pixels.get_decoder", lambda uid: type("None_", (), {"is_available": False}))
    first, _ = ingest(source, tmp_path / "out")
    assert first["refused"]["CT_DECODER_MISSING"] == 4
    assert first["refused"]["CT_UNREADABLE"] == 1
    monkeypatch.undo()
    manifest, opened = ingest(source, tmp_path / "out")
    assert manifest["accepted"] == 5
    assert "broken" in opened
    assert "nifti/0.nii" not in opened
    assert_as_fresh(manifest, source, tmp_path / "out")


def test_subjects_without_a_crosswalk_stay_when_patients_come_and_go(source, tmp_path):
    ingest(source, tmp_path / "out")
    before = pd.read_parquet(tmp_path / "out/ct/index.parquet").set_index("image_id")["subject_id"]
    for n in range(3):
        write_series(source / f"new{n}", f"N{n}")
    manifest, _ = ingest(source, tmp_path / "out")
    after = pd.read_parquet(tmp_path / "out/ct/index.parquet").set_index("image_id")["subject_id"]
    assert manifest["unchanged"] == len(before) == len(after) - 3
    assert dict(after[before.index]) == dict(before)
    assert after.is_unique
    assert after.between(1, 2**53 - 1).all()


def test_two_patients_of_one_subject_id_are_refused_in_a_second_run_too(source, tmp_path, monkeypatch):
    ingest(source, tmp_path / "out")
    write_series(source / "new", "N")
    monkeypatch.setattr("mmjepa.identity._SUBJECTS", 1)
    with pytest.raises(Refusal, match="SUBJECT_ID_TWICE"):
        ingest(source, tmp_path / "out")


def test_a_folder_that_cannot_be_listed_is_a_refused_row_and_the_source_itself_a_refusal(source, tmp_path, monkeypatch):
    first, _ = ingest(source, tmp_path / "out")
    real = os.scandir
    shut = source / "a"

    def scandir(path):
        if Path(path) == shut:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    manifest, _ = ingest(source, tmp_path / "out")
    assert manifest["refused"] == {**first["refused"], "CT_UNREADABLE": 1}
    assert manifest["accepted"] == first["accepted"] - 1
    (row,) = (row for row in manifest["volumes"] if row.get("code") == "CT_UNREADABLE")
    assert files_of(row["image_id"], source, tmp_path / "out/ct", CROSSWALK) == ["a"]
    monkeypatch.undo()
    again, _ = ingest(source, tmp_path / "out")
    assert without_state(again) == without_state(first)
    shut = source
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(Refusal, match="SOURCE_UNREADABLE"):
        ingest(source, tmp_path / "out")


def volumes_of(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "ct" / "volumes").iterdir())


def test_another_salt_is_refused_and_changes_nothing(source, tmp_path):
    ingest(source, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(Refusal, match="SALT_CHANGED") as caught:
        ingest(source, tmp_path / "out", Crosswalk.none("another salt for tests"))
    assert "salt" not in str(before[tmp_path / "out/ct/manifest.json"]).replace("salt_check", "")
    assert "another salt for tests" not in str(caught.value)
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_a_source_that_holds_nothing_of_what_is_there_is_refused_and_changes_nothing(source, tmp_path):
    ingest(source, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    write_series(tmp_path / "other" / "a", "Q1")
    (tmp_path / "empty").mkdir()
    for other, code in (("other", "SOURCE_OTHER"), ("empty", "CT_EMPTY")):
        with pytest.raises(Refusal, match=code):
            ingest(tmp_path / other, tmp_path / "out")
        assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_a_series_that_went_away_is_counted_and_leaves_the_index_until_it_comes_back(source, tmp_path):
    first, _ = ingest(source, tmp_path / "out")
    there = volumes_of(tmp_path / "out")
    gone = CROSSWALK.image_id(str(pydicom.dcmread(source / "a/0.dcm").SeriesInstanceUID))
    (source / "a").rename(tmp_path / "aside")
    for _ in range(2):
        manifest, _ = ingest(source, tmp_path / "out")
        assert (manifest["removed"], manifest["removed_volumes"]) == (1, [gone])
        assert gone not in set(pd.read_parquet(tmp_path / "out/ct/index.parquet")["image_id"])
        assert f"volume,{gone},,removed" in (tmp_path / "out/ct/manifest.csv").read_text()
        assert volumes_of(tmp_path / "out") == there
    (tmp_path / "aside").rename(source / "a")
    manifest, _ = ingest(source, tmp_path / "out")
    assert (manifest["removed"], manifest["unchanged"]) == (0, first["accepted"])


def test_without_a_crosswalk_the_manifest_says_what_became_of_dates(source, tmp_path):
    assert "1 to 10 years back" in ingest(source, tmp_path / "out")[0]["notes"][0]
    people = {f"P{n}": (100 + n, -30) for n in range(9)}
    manifest, _ = ingest(source, tmp_path / "paired", Crosswalk("a salt for tests", True, (), people))
    assert manifest["notes"] == []


@pytest.mark.parametrize(("workers", "started"), [(100_000, 7), (3, 3)])
def test_no_more_processes_are_started_than_there_is_work_for(source, tmp_path, monkeypatch, workers, started):
    asked = []

    def parallel(n_jobs, return_as):
        asked.append(n_jobs)
        return lambda tasks: (call(*given, **options) for call, given, options in tasks)

    monkeypatch.setattr("mmjepa.ct.ingest.Parallel", parallel)
    monkeypatch.setattr("os.cpu_count", lambda: 100)
    ingest_images(source, tmp_path / "out", crosswalk=CROSSWALK, workers=workers)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    ingest_images(source, tmp_path / "one", crosswalk=CROSSWALK, workers=workers)
    assert asked == [started, min(workers, 4)]


def test_the_memory_holds_no_identifier_path_or_date(source, tmp_path):
    ingest(source, tmp_path / "out")
    table = pq.read_table(tmp_path / "out/ct/scan.parquet")
    facts = json.loads(table.schema.metadata[b"scan"])
    words = [
        word
        for column in table.drop_columns(["group", "code"]).columns
        for text in column.to_pylist()
        for word in text.split()
    ]
    words += [text.removeprefix("nifti:") for text in table["group"].to_pylist()]
    words += facts["groups"]
    assert all(not word or word == "table" or (len(word) == 16 and int(word, 16) >= 0) for word in words)
    assert set(table["code"].to_pylist()) == {"", "CT_NOT_DICOM", "CT_NOT_CT", "CT_DUPLICATE_FILE"}


@pytest.mark.parametrize("broken", [{"Modality": "C"}, {"SOPClassUID": "1.2.3"}])
def test_a_volume_is_flagged_where_a_skipped_file_may_have_been_its_slice(source, tmp_path, broken):
    uid = str(pydicom.dcmread(source / "b/0.dcm").SeriesInstanceUID)
    write_slice(source / "b/5.dcm", uid, 5, "P2", **broken)
    scout = write_series(source / "scout", "P1")
    write_slice(source / "scout/l.dcm", scout, 9, "P1", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    across = write_series(source / "across", "P1")
    write_slice(source / "across/s.dcm", across, 9, "P1", Modality="SR", ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    manifest, _ = ingest(source, tmp_path / "out")
    flagged = [row["image_id"] for row in manifest["volumes"] if "CT_SKIPPED_IN_SERIES" in row["flags"]]
    lost = str(pydicom.dcmread(source / "lost/0.dcm").SeriesInstanceUID)
    assert set(flagged) == {CROSSWALK.image_id(uid), CROSSWALK.image_id(lost)}
    assert "may have been a slice" in (tmp_path / "out/ct/manifest.csv").read_text()
