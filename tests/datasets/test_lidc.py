"""LIDC-IDRI: the readers' opinions of a scan as labels, the diagnoses of patients, what is no CT read or broken."""

from datetime import datetime

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydicom import dcmread

from mmjepa.cohort import Cohort
from mmjepa.ingest import ingest

DIAGNOSES = """"TCIA Patient ID","Diagnosis at the Patient Level
0=Unknown
1=benign or non-malignant disease
2= malignant, primary lung cancer
3 = malignant metastatic","Diagnosis Method"
LIDC-IDRI-0001,2,3
LIDC-IDRI-0002,1,1
LIDC-IDRI-0003,0,0
"""
#: Patient -> for each of four readers the malignancy of each large nodule; None stands for a small one, without rating.
READERS = {"0001": [[5, 1], [4], [3], []], "0002": [[2], [None], [5], []], "0003": [[], [], [None], []]}


def write_read(path, uid, readers, root="LidcReadMessage"):
    sessions = ""
    for ratings in readers:
        nodules = ""
        for rating in ratings:
            kind = f"<characteristics><malignancy>{rating}</malignancy></characteristics>" if rating else ""
            nodules += f"<unblindedReadNodule><noduleID>1</noduleID>{kind}</unblindedReadNodule>"
        sessions += f"<readingSession><servicingRadiologistID>anon</servicingRadiologistID>{nodules}</readingSession>"
    header = f"<ResponseHeader><SeriesInstanceUid>{uid}</SeriesInstanceUid></ResponseHeader>"
    path.write_text(f'<?xml version="1.0"?><{root} xmlns="http://www.nih.gov">{header}{sessions}</{root}>')


@pytest.fixture
def download(tmp_path, write_series):
    source = tmp_path / "download"
    for name, readers in READERS.items():
        patient = f"LIDC-IDRI-{name}"
        folder = source / "manifest-1" / "LIDC-IDRI" / patient / "01-01-2000-NA-NA-1" / "3.000000-NA-1"
        write_series(folder, patient, datetime(2000, 1, 1, 8))
        uid = dcmread(folder / "1-0.dcm").SeriesInstanceUID
        write_read(folder / "069.xml", uid, readers)
    write_read(folder / "radiograph.xml", "1.2", [], root="IdriReadMessage")
    (source / "tcia-diagnosis-data-2012-04-20.csv").write_text(DIAGNOSES)
    return source


def test_the_cohort_has_what_the_readers_and_the_diagnosis_say(download, tmp_path, convert_apart, people):
    code, result, seen = convert_apart("lidc", download, tmp_path / "source")
    assert code == 0, seen
    assert "LIDC-IDRI-0001" not in seen
    assert result["left_out"] == {"series_without_reads": 0, "xml_not_of_a_ct": 1}
    made = ingest(tmp_path / "source", tmp_path / "cohort")
    assert (made["ct"]["accepted"], made["subjects_with_both"]) == (3, 0)
    assert made["unpaired"] == {"no_event_in_window": 3}  # scans alone are no record
    cohort = Cohort.open(tmp_path / "cohort")
    name_of = {subject: name[-4:] for name, (subject, _) in people(tmp_path / "source").items()}
    found = {
        task: {name_of[row.subject_id]: row.value for row in cohort.labels(task).itertuples()} for task in cohort.tasks
    }
    assert found == {
        "readers_nodule": {"0001": 3, "0002": 2, "0003": 0},
        "readers_suspicious": {"0001": 2, "0002": 1, "0003": 0},
        "nodule": {"0001": True, "0002": True, "0003": False},
        "suspicious": {"0001": True, "0002": False, "0003": False},
        "malignant": {"0001": True, "0002": False},
    }


def test_reads_that_contradict_or_break_and_tables_without_a_column_are_refused(download, tmp_path, convert):
    read = next(download.rglob("069.xml"))
    uid = dcmread(read.with_name("1-0.dcm")).SeriesInstanceUID

    def answer():
        return convert("lidc", download, tmp_path / "source")[1].get("refused", {}).get("code")

    write_read(download / "again.xml", uid, [[1], [1], [1], [1]])
    assert answer() == "LIDC_READS_DIFFER"
    write_read(download / "again.xml", uid, [[9]])
    assert answer() == "LIDC_READ_BROKEN"
    (download / "again.xml").write_text("<LidcRead")
    assert answer() == "LIDC_READ_BROKEN"
    (download / "again.xml").unlink()
    table = download / "tcia-diagnosis-data-2012-04-20.csv"
    table.write_text(DIAGNOSES.replace("TCIA Patient ID", "Patient"))
    assert answer() == "SOURCE_COLUMNS"
    table.unlink()
    for path in download.rglob("*.xml"):
        path.unlink()
    assert answer() == "LIDC_NO_READS"
    assert not (tmp_path / "source").exists()


def test_scans_without_a_time_of_day_get_days_of_their_own_which_the_records_tell(download, tmp_path, convert, people):
    for path in download.rglob("LIDC-IDRI-0001/*/*/*.dcm"):
        data = dcmread(path)
        data.AcquisitionTime = ""
        data.save_as(path)
        data.SeriesInstanceUID, data.SOPInstanceUID = "1.2.3", f"1.2.3.{data.SOPInstanceUID[-40:]}"
        data.save_as(path.with_name(f"2{path.name}"))
    write_read(download / "second.xml", "1.2.3", [[], [], [], []])
    code, result, seen = convert("lidc", download, tmp_path / "source")
    assert (code, result["series_without_time"]) == (0, 2), seen
    made = ingest(tmp_path / "source", tmp_path / "cohort")
    assert made["ct"]["accepted"] == 4
    cohort = Cohort.open(tmp_path / "cohort")
    subject, shift = people(tmp_path / "source")["LIDC-IDRI-0001"]
    labels = cohort.labels("nodule")
    rows = labels[labels["subject_id"] == subject]
    assert list(rows["prediction_time"] - shift) == [pd.Timestamp("2000-01-01"), pd.Timestamp("2000-01-02")]
    assert sorted(rows["value"]) == [False, True]
    index = pd.read_parquet(tmp_path / "cohort" / "ct" / "index.parquet").query("subject_id == @subject")
    events = pd.read_parquet(tmp_path / "source" / "ehr" / "data" / "0.parquet").query("subject_id == @subject")
    assert index["time"].isna().all()
    assert set(events["image_id"]) == set(index["image_id"])
    assert made["unpaired"] == {"no_event_in_window": 4}  # and no image lacks a time


def test_scans_without_a_time_of_day_pair_with_rows_that_a_person_adds(download, tmp_path, convert):
    for path in download.rglob("*.dcm"):
        data = dcmread(path)
        data.AcquisitionTime = ""
        data.save_as(path)
    assert convert("lidc", download, tmp_path / "source")[0] == 0
    table = tmp_path / "source" / "ehr" / "data" / "0.parquet"
    rows = pd.read_parquet(table)
    added = rows.assign(time=rows["time"] - pd.Timedelta(days=1), image_id=None)
    both = pd.concat([rows, added]).sort_values(["subject_id", "time"])
    pq.write_table(pa.Table.from_pandas(both, pq.read_schema(table), preserve_index=False), table)
    made = ingest(tmp_path / "source", tmp_path / "cohort")
    assert (made["subjects_with_both"], made["unpaired"]) == (3, {})
    assert all("CT_NO_TIME" in flags for flags in pd.read_parquet(tmp_path / "cohort/ct/index.parquet")["flags"])


def test_two_reads_of_one_moment_that_differ_give_no_label(download, tmp_path, convert):
    for path in download.rglob("LIDC-IDRI-0001/*/*/*.dcm"):
        data = dcmread(path)
        data.SeriesInstanceUID, data.SOPInstanceUID = "1.2.3", f"1.2.3.{data.SOPInstanceUID[-40:]}"
        data.save_as(path.with_name(f"2{path.name}"))
    write_read(download / "second.xml", "1.2.3", [[], [], [], []])
    _, result, _ = convert("lidc", download, tmp_path / "source")
    assert result["left_out"]["series_of_one_moment_with_other_reads"] == 2
    assert (result["labels"]["nodule"], ingest(tmp_path / "source", tmp_path / "cohort")["ct"]["accepted"]) == (2, 4)
