"""From a source folder to a cohort: what is found where, what is refused, what a second run does."""

import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest

from mmjepa import cli
from mmjepa import ingest as room
from mmjepa.cohort import Cohort
from mmjepa.ct.store import VolumeStore
from mmjepa.ingest import ingest, ingest_ct, ingest_ehr
from mmjepa.refusal import Refusal
from synthetic import generate

T, DAY = pd.Timestamp("2150-01-01"), pd.Timedelta(days=1)


def meds_root(folder: Path, value: float = 1.0) -> Path:
    """Three subjects, two rows each."""
    for part in ("data", "metadata"):
        (folder / part).mkdir(parents=True)
    rows = [(s, T + pd.Timedelta(hours=h), "LAB//0", value) for s in (1, 2, 3) for h in range(2)]
    events = pd.DataFrame(rows, columns=["subject_id", "time", "code", "numeric_value"]).astype(
        {"numeric_value": "float32"}
    )
    events.to_parquet(folder / "data" / "0.parquet", index=False)
    pd.DataFrame({"code": ["LAB//0"]}).to_parquet(folder / "metadata" / "codes.parquet", index=False)
    return folder


def source_folder(folder: Path) -> Path:
    meds_root(folder / "ehr")
    (folder / "labels" / "death").mkdir(parents=True)
    labels = pd.DataFrame({"subject_id": [1, 2], "prediction_time": [T, T], "boolean_value": [True, False]})
    labels.to_parquet(folder / "labels" / "death" / "0.parquet", index=False)
    return folder


@pytest.fixture
def images(monkeypatch):
    """The image reader's calls; images of subjects 2, 3 and 9 are found."""
    calls = []

    def fake(source: Path, out: Path, *, crosswalk, workers: int, **settings) -> dict:
        calls.append({"source": source, "paired": crosswalk.paired, "workers": workers})
        (out / "ct").mkdir(parents=True, exist_ok=True)
        index = pd.DataFrame({"image_id": list("abcd"), "subject_id": [2, 3, 3, 9], "time": [T + DAY] * 4})
        index.to_parquet(out / "ct" / "index.parquet")
        (out / "ct" / "manifest.json").write_text(json.dumps({"paired": crosswalk.paired}))
        rows = [{"status": "refused", "code": "CT_NOT_HU", "message": "what", "hint": "do"}] * 2
        return {"accepted": 4, "volumes": rows, "settings": settings, "skipped_files": ["many"]}

    monkeypatch.setattr(room, "ingest_images", fake)
    return calls


def test_a_source_folder_becomes_a_cohort_with_labels_and_store(tmp_path):
    result = ingest(source_folder(tmp_path / "source"), tmp_path / "cohort")
    cohort = Cohort.open(tmp_path / "cohort")
    assert result["ehr"]["labels"] == {"death": 2} == {task: len(cohort.labels(task)) for task in cohort.tasks}
    assert (result["store"]["subjects"], result["store"]["events"], result["ct"]) == (3, 6, None)
    assert (tmp_path / "cohort" / "store" / "store.json").is_file()


def test_a_bare_meds_root_and_records_named_apart_give_the_same_cohort(tmp_path):
    root = meds_root(tmp_path / "meds")
    one = ingest(root, tmp_path / "one")
    two = ingest(None, tmp_path / "two", ehr=root)
    assert one["store"] == two["store"]


def test_a_second_run_changes_nothing_and_reads_nothing_again(tmp_path, monkeypatch):
    source = source_folder(tmp_path / "source")
    first = ingest(source, tmp_path / "cohort")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cohort").rglob("*") if path.is_file()}
    monkeypatch.setattr(room, "ingest_meds", None)
    monkeypatch.setattr(room, "sha256", None)  # the files' marks tell
    second = ingest(source, tmp_path / "cohort")
    assert second["ehr"] == {"unchanged": True}
    assert second["store"] == first["store"]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cohort").rglob("*") if path.is_file()}


def test_a_copied_or_touched_source_is_the_same_and_a_changed_one_is_noticed(tmp_path):
    root = meds_root(tmp_path / "meds")
    ingest(root, tmp_path / "cohort")
    file = root / "data" / "0.parquet"
    stat = file.stat()
    os.utime(file, ns=(5, 5))
    assert ingest(root, tmp_path / "cohort")["ehr"] == {"unchanged": True}
    other = (meds_root(tmp_path / "other", value=2.0) / "data" / "0.parquet").read_bytes()
    assert len(other) == stat.st_size
    file.write_bytes(other)  # over the old bytes, then dated back
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(Refusal, match="OUTPUT_EXISTS"):
        ingest(root, tmp_path / "cohort")
    assert (pd.read_parquet(tmp_path / "cohort" / "ehr" / "data" / "0.parquet")["numeric_value"] == 1).all()


def test_labels_that_are_written_again_leave_the_cohort_as_it_was_and_are_noticed(tmp_path):
    source = source_folder(tmp_path / "source")
    ingest(source, tmp_path / "cohort")
    file = source / "labels" / "death" / "0.parquet"
    turned = pd.read_parquet(file).assign(boolean_value=[False, True])
    turned.to_parquet(tmp_path / "turned.parquet", index=False)
    file.write_bytes((tmp_path / "turned.parquet").read_bytes())  # over the old bytes
    assert Cohort.open(tmp_path / "cohort").labels("death")["value"].tolist() == [True, False]
    with pytest.raises(Refusal, match="other labels"):
        ingest(source, tmp_path / "cohort")


def test_a_shard_that_the_source_no_longer_has_is_noticed(tmp_path):
    root = meds_root(tmp_path / "meds")
    more = pd.read_parquet(root / "data" / "0.parquet").iloc[:2].assign(subject_id=4)
    more.to_parquet(root / "data" / "1.parquet", index=False)
    ingest(root, tmp_path / "cohort")
    (root / "data" / "1.parquet").unlink()
    with pytest.raises(Refusal, match="OUTPUT_EXISTS"):
        ingest(root, tmp_path / "cohort")


def test_what_of_the_records_is_not_read_is_said_on_every_run(tmp_path):
    root = meds_root(tmp_path / "meds")
    (root / "data" / "1.PARQUET").touch()
    for call in (ingest, ingest_ehr, ingest):
        assert any(".parquet" in note for note in call(root, tmp_path / "cohort")["notes"])


@pytest.mark.parametrize("part", ["ehr", "ct"])
def test_an_out_inside_any_part_is_refused(tmp_path, part):
    root = meds_root(tmp_path / "meds")
    for out in (root, root / "data" / "cohort"):
        with pytest.raises(Refusal, match="OUT_IN_SOURCE"):
            ingest(None, out, **{part: root})
    assert sorted(path.name for path in root.rglob("*")) == ["0.parquet", "codes.parquet", "data", "metadata"]


def test_an_ingest_stopped_before_the_labels_goes_on(tmp_path):
    source = source_folder(tmp_path / "source")
    ingest(source, tmp_path / "cohort")
    shutil.rmtree(tmp_path / "cohort" / "labels")
    ingest(source, tmp_path / "cohort")
    assert Cohort.open(tmp_path / "cohort").tasks == ["death"]


def test_other_records_or_labels_are_never_laid_over_a_cohort(tmp_path):
    source = source_folder(tmp_path / "source")
    ingest(source, tmp_path / "cohort")
    with pytest.raises(Refusal, match="OUTPUT_EXISTS"):
        ingest(meds_root(tmp_path / "other", value=2.0), tmp_path / "cohort")
    (source / "labels" / "more").mkdir()
    shutil.copy(source / "labels" / "death" / "0.parquet", source / "labels" / "more")
    with pytest.raises(Refusal, match="other labels"):
        ingest(source, tmp_path / "cohort")


def test_images_are_found_by_their_folder_and_counted_with_the_records(tmp_path, images):
    source = source_folder(tmp_path / "source")
    for part in ("images", "identity"):
        (source / part).mkdir()
    (source / "identity" / "crosswalk.csv").write_text("patient_id,subject_id,date_shift_days\nA,2,0\n")
    (source / "identity" / "salt.txt").write_text("0123456789")
    result = ingest(source, tmp_path / "cohort", workers=2)
    assert images == [{"source": source / "images", "paired": True, "workers": 2}]
    assert result["ct"] == {
        "accepted": 4,
        "reasons": [{"code": "CT_NOT_HU", "volumes": 2, "example": "what", "what_to_do": "do"}],
        "table": str(tmp_path / "cohort" / "ct" / "manifest.csv"),
    }
    assert (result["subjects_with_both"], result["notes"]) == (2, [])
    assert result["unpaired"] == {"subject_not_in_records": 1}


def test_without_a_crosswalk_the_salt_stays_beside_the_cohort_and_a_note_says_what_is_lost(tmp_path, images):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.dcm").touch()
    result = ingest(tmp_path / "scans", tmp_path / "cohort")
    assert images == [{"source": tmp_path / "scans", "paired": False, "workers": 1}]
    assert "cannot be paired" in result["notes"][0]
    assert "1 to 10 years back" in result["notes"][0]
    assert (tmp_path / "cohort.salt.txt").is_file()
    assert not list((tmp_path / "cohort").rglob("*salt*"))


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: path.write_text("x"), "OUT_NOT_COHORT"),
        (lambda path: (path / "photos").mkdir(parents=True), "OUT_NOT_COHORT"),
        (lambda path: [(path / part).mkdir(parents=True) for part in ("ehr", "images")], "OUT_NOT_COHORT"),
    ],
)
def test_an_out_that_is_not_a_cohort_is_refused_and_left_alone(tmp_path, make, code):
    make(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Refusal, match=code):
        ingest(meds_root(tmp_path.parent / f"{tmp_path.name}-meds"), tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_arguments_are_refused(tmp_path):
    root = meds_root(tmp_path / "meds")
    with pytest.raises(Refusal, match="SOURCE_EMPTY"):
        ingest(None, tmp_path / "cohort")
    with pytest.raises(Refusal, match="SOURCE_MISSING"):
        ingest(tmp_path / "nowhere", tmp_path / "cohort")
    with pytest.raises(Refusal, match="OUT_IN_SOURCE"):
        ingest(root, root / "cohort")
    for rescale in ((float("nan"), 0.0), (1.0, float("inf")), (0.0, 1.0)):
        with pytest.raises(Refusal, match="CT_SETTINGS"):
            ingest_ct(niftis(tmp_path / f"scans{rescale}"), tmp_path / "none", rescale=rescale)
    assert not (tmp_path / "none").exists()
    with pytest.raises(Refusal, match="WORKERS"):
        ingest(root, tmp_path / "cohort", workers=0)


def test_images_alone_leave_the_records_out_and_list_every_volume(tmp_path, images):
    source = source_folder(tmp_path / "source")
    (source / "images").mkdir()
    result = ingest_ct(source, tmp_path / "cohort", tilt="resample")
    assert images == [{"source": source / "images", "paired": False, "workers": 1}]
    assert (result["accepted"], len(result["volumes"])) == (4, 2)
    assert not (tmp_path / "cohort" / "ehr").exists()


def test_records_alone_leave_the_images_out_and_say_what_they_cost(tmp_path, images, capsys):
    source = source_folder(tmp_path / "source")
    (source / "images").mkdir()
    call = ["ingest", "ehr", str(source), "--out", str(tmp_path / "cohort"), "--json"]
    first, second = (cli.main(call) or json.loads(capsys.readouterr().out) for _ in range(2))
    for result in (first, second):  # the second run reads nothing in and counts the same
        assert (result["rows"], result["subjects"], result["codes"]) == (6, 3, 1)
        assert result["seconds"] > 0
        assert result["peak_memory_mib"] > 0
    assert second["unchanged"]
    assert not images
    assert not (tmp_path / "cohort" / "ct").exists()
    assert cli.main(["ingest", "ehr", str(source), "--ct", "x", "--out", str(tmp_path / "o")]) == 2


def test_the_verb_knows_the_form_for_images_alone(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(room, "ingest_ct", lambda *a, **k: calls.append((a, k)) or {"volumes": []})
    monkeypatch.setattr(room, "ingest", lambda *a, **k: calls.append((a, k)) or {})
    out = ["--out", str(tmp_path / "cohort"), "--json"]
    assert cli.main(["ingest", "ct", "scans", *out, "--rescale=1,-1024", "--tilt", "resample"]) == 0
    (arguments, settings), calls[:] = calls[0], []
    assert arguments == (Path("scans"), tmp_path / "cohort")
    assert (settings["rescale"], settings["tilt"], settings["min_slices"]) == ((1.0, -1024.0), "resample", 4)
    for rescale in ("nan,1", "1,inf", "0,1", "-1,0"):
        assert cli.main(["ingest", "ct", "scans", *out, f"--rescale={rescale}"]) == 2
    capsys.readouterr()
    assert cli.main(["ingest", "ct", *out]) == 0
    assert calls[0][0] == (Path("ct"), tmp_path / "cohort")
    for wrong in (
        ["a", "b"],
        ["ct", "a", "b"],
        ["ct", "a", "--ehr", "e"],
        ["a", "--rescale", "x"],
        ["a", "--tilt", "x"],
    ):
        assert cli.main(["ingest", *wrong, *out]) == 2
    assert "USAGE" in capsys.readouterr().err


def test_a_folder_beside_images_is_refused_and_files_are_counted(tmp_path, images):
    source = source_folder(tmp_path / "source")
    (source / "images").mkdir()
    (source / "notes.txt").write_text("x")
    (source / ".hidden").mkdir()
    notes = ingest(source, tmp_path / "cohort")["notes"]
    assert any("1 files" in note and "not read" in note for note in notes)
    (source / "patient2").mkdir()
    for call in (ingest, ingest_ct):
        with pytest.raises(Refusal, match="SOURCE_PARTS") as caught:
            call(source, tmp_path / "other")
        assert "patient2" not in str(caught.value)
    assert ingest(source, tmp_path / "cohort", ct=source / "images")["ct"]["accepted"] == 4


def test_an_out_or_salt_that_leads_nowhere_is_refused(tmp_path):
    source = niftis(tmp_path / "source")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for out in ("loop", "dangling"):
        assert cli.main(["ingest", "ct", str(source), "--out", str(tmp_path / out)]) == 2
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    os.mkfifo(tmp_path / "pipe")
    for salt in ("loop.txt", "pipe"):
        assert cli.main(["ingest", "ct", str(source), "--out", str(tmp_path / "c"), f"--salt={tmp_path / salt}"]) == 2
    assert not (tmp_path / "c").exists()


def niftis(folder: Path, names=("x.nii", "y.nii"), rows=("x.nii,P0,", "y.nii,P1,")) -> Path:
    """Volumes with a table of them, none where there are no rows."""
    folder.mkdir()
    for n, name in enumerate(names):
        hu = np.random.default_rng(n).integers(-1000, 500, (6, 5, 4)).astype(np.int16)
        nib.save(nib.Nifti1Image(hu, np.diag([1, 1, 2, 1])), folder / name)
    if rows:
        (folder / "images.csv").write_text("\n".join(["file,patient_id,time", *rows]) + "\n")
    return folder


@pytest.mark.parametrize("content", [{}, {"junk": b"junk" * 200}, {"images.csv": b"a,b\n"}])
def test_a_source_refused_as_a_whole_leaves_neither_cohort_nor_salt(tmp_path, content):
    (tmp_path / "source").mkdir()
    for name, data in content.items():
        (tmp_path / "source" / name).write_bytes(data)
    assert cli.main(["ingest", "ct", str(tmp_path / "source"), "--out", str(tmp_path / "c")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("alone", [["ct"], []])
def test_when_no_image_is_accepted_the_exit_code_is_2_and_reasons_and_table_are_shown(tmp_path, capsys, alone):
    source = niftis(tmp_path / "source", rows=())
    command = ["ingest", *alone, str(source), "--out", str(tmp_path / "c")]
    assert cli.main(command) == 2
    seen = " ".join(capsys.readouterr().err.split())
    assert "refused 2 x CT_SUBJECT_MISSING: for instance images.csv is absent" in seen
    assert "file,patient_id,time" in seen
    assert str(tmp_path / "c" / "ct" / "manifest.csv") in seen
    assert cli.main([*command, "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert (found if alone else found["ct"])["reasons"][0]["volumes"] == 2
    (source / "images.csv").write_text("file,patient_id,time\nx.nii,P0,\n")
    assert cli.main(command) == 0


def test_a_lost_salt_is_refused_and_not_made_anew(tmp_path):
    source = niftis(tmp_path / "source")
    ingest_ct(source, tmp_path / "c")
    (tmp_path / "c.salt.txt").unlink()
    with pytest.raises(Refusal, match="SALT_MISSING"):
        ingest_ct(source, tmp_path / "c")
    assert not (tmp_path / "c.salt.txt").exists()


def test_an_id_of_the_manifest_leads_back_to_its_files_with_the_right_salt_alone(tmp_path, capsys):
    source = niftis(tmp_path / "source", rows=("x.nii,P0,",))
    (source / "junk").write_bytes(b"junk" * 200)
    out = ["--out", str(tmp_path / "c")]
    assert cli.main(["ingest", "ct", str(source), *out]) == 0
    manifest = json.loads((tmp_path / "c/ct/manifest.json").read_text())
    (refused,) = (row["image_id"] for row in manifest["volumes"] if row["status"] == "refused")
    (skipped,) = (row["file_id"] for row in manifest["skipped_files"])
    capsys.readouterr()
    for item, name in ((refused, "y.nii"), (skipped, "junk")):
        assert cli.main(["ingest", "ct", str(source), *out, "--explain", item, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"id": item, "files": [name]}
    assert cli.main(["ingest", str(source), *out, "--explain", refused]) == 0
    assert capsys.readouterr().err == "y.nii\n"
    assert cli.main(["ingest", str(source), *out, "--explain", "0" * 16]) == 2
    (tmp_path / "c.salt.txt").write_text("another salt")
    assert cli.main(["ingest", str(source), *out, "--explain", refused]) == 2
    assert cli.main(["ingest", str(source), "--out", str(tmp_path / "d"), "--explain", refused]) == 2
    assert not (tmp_path / "d.salt.txt").exists()


@pytest.mark.real_data
def test_a_real_chest_ct_is_ingested_from_the_command_line(data_folder, tmp_path, capsys):
    assert cli.main(["ingest", str(data_folder / "chest_ct"), "--out", str(tmp_path / "cohort")]) == 0
    assert "accepted: 2" in capsys.readouterr().err
    command = ["ingest", "ct", str(data_folder / "chest_ct"), "--out", str(tmp_path / "cohort"), "--json"]
    assert cli.main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["accepted"], result["unchanged"], result["refused"]) == (2, 2, {})
    for volume in result["volumes"]:
        assert volume["shape"] == [512, 512, 30]
        assert volume["spacing_mm"] == pytest.approx([0.646484375, 0.646484375, 8.0])
        assert volume["hu_range"][0] == -1024 < volume["hu_range"][1] <= 3071


def test_boxes_beside_the_images_of_a_source_lie_beside_the_volumes_of_the_cohort(tmp_path):
    generate(tmp_path / "source", patients=2, image_format="dicom")
    (tmp_path / "source" / "boxes").mkdir()
    path = sorted((tmp_path / "source" / "images").rglob("*.dcm"))[3]
    uid = pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID
    box = "<bndbox><xmin>9</xmin><ymin>9</ymin><xmax>15</xmax><ymax>15</ymax></bndbox>"
    (tmp_path / "source" / "boxes" / f"{uid}.xml").write_text(
        f"<annotation><size><width>32</width><height>32</height></size><object><name>A</name>{box}</object></annotation>"
    )
    (tmp_path / "source" / "boxes" / "bad.xml").write_text("")
    result = ingest(tmp_path / "source", tmp_path / "cohort")
    assert result["ct"]["boxes"] == {"boxes": 1, "images": 1, "refused": {"BOX_UNREADABLE": 1}}
    store = VolumeStore(tmp_path / "cohort")
    ((box,),) = (boxes for image in store.index["image_id"] if (boxes := store.boxes(image)))
    assert (box.label, box.high[0] - box.low[0], box.high[2] - box.low[2]) == ("A", 6, 1)
