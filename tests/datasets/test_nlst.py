"""NLST: labels at the scan with what is censored left out, records without the outcome, the cohort that comes of it."""

from datetime import datetime

import pandas as pd
import pytest
from pydicom import dcmread

from mmjepa.cohort import Cohort
from mmjepa.ingest import ingest

PERSON = "race,cigsmok,gender,age,pid,scr_days0,scr_days1,scr_days2,candx_days,canc_free_days,fup_days,de_stag"
PEOPLE = """\
1,1,1,61,100012,5,370,.N,800,800,2500,110
1,0,2,58,100023,0,.N,.N,.N,2000,2000,.N
2,0,1,70,200034,-4,.N,.N,.N,60,400,.N
1,1,2,66,200045,10,380,.E,300,300,900,400
1,1,1,55,999999,0,.N,.N,.N,10,10,.N
"""
READINGS = """\
pid,study_yr,sct_ab_num,sct_ab_desc,sct_long_dia,sct_perp_dia,sct_margins,dataset_version
100012,0,1,51,12,9,1,2021-05-27
100012,1,1,51,15,.N,1,2021-05-27
999999,0,1,51,7,6,1,2021-05-27
"""
FOLDERS = {0: "01-02-1999-NLST-LSS-1", 1: "01-02-2000-NLST-LSS-2"}


def make_download(source, write_series):
    """Four imaged people: cancer on day 800, none by day 2000, lost on day 400, cancer before the second screen."""
    for pid, screens in {"100012": (0, 1), "100023": (0,), "200034": (0,), "200045": (0, 1), "300056": (0,)}.items():
        for screen in screens:
            folder = source / "manifest-1" / "NLST" / pid / FOLDERS[screen] / "1.000000-0OPAGELSQX-1"
            write_series(folder, pid, datetime(1999 + screen, 1, 2, 10, 30))
    (source / "nlst_780_prsn_idc_20210527.csv").write_text(f"{PERSON}\n{PEOPLE}")
    (source / "nlst_780_ctab_idc_20210527.csv").write_text(READINGS)
    return source


@pytest.fixture
def download(tmp_path, write_series):
    return make_download(tmp_path / "download", write_series)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, write_series, convert_apart):
    """The source folder made of a download by a process of its own; leave it as it is."""
    folder = tmp_path_factory.mktemp("nlst")
    code, result, seen = convert_apart("nlst", make_download(folder / "download", write_series), folder / "source")
    assert code == 0, seen
    return folder / "source", result, seen


def expected_labels(people, years):
    """By the days written above: from each scan to cancer, or to the last sight."""
    day = 365.25 * years
    rows = [
        ("100012", 1999, day > 795),
        ("100012", 2000, day > 430),
        ("100023", 1999, None if day > 2000 else False),
        ("200034", 1999, None if day > 404 else False),
        ("200045", 1999, day > 290),
    ]
    found = [
        (people[pid][0], pd.Timestamp(year, 1, 2, 10, 30, 0, 100_000) + people[pid][1], y) for pid, year, y in rows
    ]
    return sorted(row for row in found if row[2] is not None)


def test_the_cohort_has_a_label_at_every_scan_whose_outcome_is_known(converted, tmp_path, people):
    out, result, _ = converted
    made = ingest(out, tmp_path / "cohort")
    assert (made["ct"]["accepted"], made["ct"]["refused"], made["subjects_with_both"]) == (
        6,
        {"CT_SUBJECT_UNKNOWN": 1},
        4,
    )
    cohort = Cohort.open(tmp_path / "cohort")
    assert cohort.tasks == [f"lung_cancer_{years}y" for years in range(1, 7)]
    for years in range(1, 7):
        labels = cohort.labels(f"lung_cancer_{years}y")
        assert list(labels.itertuples(index=False, name=None)) == expected_labels(people(out), years)
    assert result["left_out"] == {"images_without_person": 1, "series_after_diagnosis": 1}


def test_every_label_falls_on_the_time_that_ingest_gives_the_volume(converted, tmp_path):
    ingest(converted[0], tmp_path / "cohort")
    index = pd.read_parquet(tmp_path / "cohort" / "ct" / "index.parquet")
    labels = Cohort.open(tmp_path / "cohort").labels("lung_cancer_1y")
    joined = labels.merge(index, left_on=["subject_id", "prediction_time"], right_on=["subject_id", "time"])
    assert len(joined) == len(labels) == 5


def test_days_to_cancer_or_last_sight_stand_beside_the_labels(converted, people):
    frame = pd.read_parquet(converted[0] / "labels" / "lung_cancer_6y" / "survival.parquet")
    subjects = {name: subject for name, (subject, _) in people(converted[0]).items()}
    of = {subjects["100012"]: {(True, 795.0), (True, 430.0)}, subjects["100023"]: {(False, 2000.0)}}
    of |= {subjects["200034"]: {(False, 404.0)}, subjects["200045"]: {(True, 290.0)}}
    found = {
        subject: set(zip(rows["event"], rows["time_to_event_days"], strict=True))
        for subject, rows in frame.groupby("subject_id")
    }
    assert found == of


def test_the_records_hold_no_outcome_and_no_reading_of_a_scan_is_known_at_that_scan(converted, people):
    out = converted[0]
    events = pd.read_parquet(out / "ehr" / "data" / "0.parquet")
    kinds = {code.rsplit("//", 1)[0] for code in events["code"]}
    diameters = {"NLST//LONG_DIAMETER", "NLST//PERPENDICULAR_DIAMETER"}
    assert kinds == {"GENDER", "NLST//RACE", "NLST//SMOKING", "NLST//AGE", "NLST//CT_ABNORMALITY"} | diameters
    subject, shift = people(out)["100012"]
    readings = events[(events["subject_id"] == subject) & events["code"].str.contains("LONG_DIAMETER")]
    assert readings["numeric_value"].tolist() == [12, 15]
    assert (readings["time"] - shift).dt.strftime("%F %T").tolist() == ["1999-01-02 23:59:59", "2000-01-02 23:59:59"]


def test_images_stay_where_they_are_and_nothing_seen_or_written_names_a_person(converted):
    out, _, seen = converted
    assert (out / "images").is_symlink()
    assert (out / "images").resolve() == (out.parent / "download" / "manifest-1" / "NLST").resolve()
    told = seen.encode() + b"".join(
        path.read_bytes() for part in ("ehr", "labels") for path in (out / part).rglob("*") if path.is_file()
    )
    assert not any(text in told for text in (b"100012", b"200045", b"Planted", b"1999-01-02"))


def test_an_output_that_exists_is_left_alone(converted, download, convert):
    before = sorted(converted[0].rglob("*"))
    code, result, _ = convert("nlst", download, converted[0])
    assert (code, result["refused"]["code"]) == (2, "OUTPUT_EXISTS")
    assert sorted(converted[0].rglob("*")) == before


def test_the_public_table_without_follow_up_is_refused_unless_its_own_column_is_asked_for(download, tmp_path, convert):
    path = download / "nlst_780_prsn_idc_20210527.csv"
    path.write_text(path.read_text().replace("fup_days", "other"))
    code, result, _ = convert("nlst", download, tmp_path / "source")
    assert (code, result["refused"]["code"]) == (2, "NLST_NO_FOLLOW_UP")
    code, result, _ = convert("nlst", download, tmp_path / "source", "--follow-up", "canc_free_days")
    assert (code, result["labels"]["lung_cancer_1y"]) == (0, 4)  # lost on day 60 by that column


@pytest.mark.parametrize(
    ("file", "old", "new", "code"),
    [
        ("prsn", "scr_days1", "screen_1", "SOURCE_COLUMNS"),
        ("prsn", "candx_days", "days", "SOURCE_COLUMNS"),
        ("ctab", "study_yr", "year", "SOURCE_COLUMNS"),
        ("prsn", "1,1,1,61,", "1,1,1,sixty,", "SOURCE_VALUE"),
        ("prsn", ",100023,", ",100012,", "SOURCE_DUPLICATE"),
        ("prsn", ",110\n", "\n", "SOURCE_UNREADABLE"),
        ("ctab", "100012,1,", "100012,3,", "SOURCE_VALUE"),
    ],
)
def test_a_wrong_table_is_refused_and_leaves_nothing(download, tmp_path, convert, file, old, new, code):
    path = download / f"nlst_780_{file}_idc_20210527.csv"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    exit_code, result, seen = convert("nlst", download, tmp_path / "source")
    assert (exit_code, result["refused"]["code"]) == (2, code)
    assert "100012" not in seen
    assert sorted(path.name for path in tmp_path.iterdir()) == ["download"]


def test_a_missing_or_doubled_table_is_refused(download, tmp_path, convert):
    table = download / "nlst_780_ctab_idc_20210527.csv"
    (download / "nlst_780_ctab_other.csv").write_text(table.read_text())
    assert convert("nlst", download, tmp_path / "source")[1]["refused"]["code"] == "SOURCE_FILE_SEVERAL"
    for path in download.glob("*_ctab_*"):
        path.unlink()
    assert convert("nlst", download, tmp_path / "source")[1]["refused"]["code"] == "SOURCE_FILE_MISSING"


def test_a_series_of_another_date_or_without_a_time_of_day_gets_no_label_and_is_counted(
    download, tmp_path, convert, write_series
):
    images = download / "manifest-1" / "NLST" / "100023"
    write_series(images / "other", "100023", datetime(2003, 5, 6, 10))
    write_series(images / "timeless", "100023", datetime(1999, 1, 2, 10))
    for path in (images / "timeless").iterdir():
        data = dcmread(path)
        data.AcquisitionTime = ""
        data.save_as(path)
    code, result, _ = convert("nlst", download, tmp_path / "source")
    assert (code, result["labels"]["lung_cancer_1y"]) == (0, 5)
    assert (result["left_out"]["series_of_no_screen_date"], result["left_out"]["series_without_time"]) == (1, 1)
