"""Synthea in OMOP: events under VOCABULARY/CODE, each with the time at which it became known."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmjepa.cohort import Cohort
from mmjepa.ehr.meds_io import open_root
from mmjepa.ingest import ingest

VISIT = "visit_start_date visit_start_datetime visit_end_date visit_end_datetime"
HEADERS = {
    "person": "person_id gender_concept_id year_of_birth month_of_birth day_of_birth race_concept_id ethnicity_concept_id",
    "visit_occurrence": f"visit_occurrence_id person_id visit_concept_id {VISIT}",
    "condition_occurrence": "person_id condition_concept_id condition_start_date condition_start_datetime visit_occurrence_id",
    "drug_exposure": "person_id drug_concept_id drug_exposure_start_date drug_exposure_start_datetime quantity",
    "procedure_occurrence": "person_id procedure_concept_id procedure_date procedure_datetime visit_occurrence_id",
    "measurement": "person_id measurement_concept_id measurement_date measurement_datetime value_as_number unit_source_value "
    "value_source_value visit_occurrence_id",
    "observation": "person_id observation_concept_id observation_date observation_datetime value_as_number value_as_string "
    "unit_source_value visit_occurrence_id",
    "death": "person_id death_date",
    "concept": "concept_id concept_name domain_id vocabulary_id concept_code",
}
BIG = 2**60 + 1  # an id that a float does not hold
ROWS = {
    "person": [f"{BIG},8507,1950,,,8527,0", "2,8532,1980,2,3,8527,0"],
    "visit_occurrence": [
        f"{BIG},{BIG},9201,2010-03-01,2010-03-01 08:00:00,2010-03-05,2010-03-05 17:30:00",
        f"12,{BIG},9202,2010-06-01,2010-06-01 00:00:00,2010-06-01,2010-06-01 00:00:00",
        "13,2,0,2011-01-01,2011-01-01 09:00:00,2011-01-02,",
        "14,2,9202,2011-05-05,2011-05-05 09:00:00,2011-05-04,2011-05-04 09:00:00",
    ],
    "condition_occurrence": [
        f"{BIG},320128,2010-03-02,2010-03-02 09:00:00,{BIG}",
        f"{BIG},320128,2010-06-01,2010-06-01 00:00:00,12",
        f"{BIG},320128,2010-07-01,,",
        "2,320128,2011-01-01,2011-01-01 10:00:00,13",
        "2,320128,2011-05-05,2011-05-05 09:00:00,14",
    ],
    "drug_exposure": ["2,19019073,2011-01-01,2011-01-01 09:30:00,30"],
    "procedure_occurrence": ["2,4010253,2011-01-01,2011-01-01 09:15:00,13"],
    "measurement": [
        f"{BIG},3004249,2010-03-01,2010-03-01 08:10:00,120.5,mm[Hg],120.5,{BIG}",
        f"{BIG},3004249,2010-03-01,2010-03-01 08:20:00,,,high,{BIG}",
        f"{BIG},0,2010-03-01,2010-03-01 08:20:00,1,,1,{BIG}",
    ],
    "observation": ["2,4041306,2011-01-01,,,Never smoker,,"],
    "death": ["2,2012-02-29"],
    "concept": [
        '8507,"MALE",Gender,Gender,M', "8532,FEMALE,Gender,Gender,F", "8527,White,Race,Race,5",
        "9201,Inpatient Visit,Visit,Visit,IP", "9202,Outpatient Visit,Visit,Visit,OP",
        '320128,"""Primary"" hypertension, essential",Condition,SNOMED,59621000', "19019073,ibuprofen,Drug,RxNorm,197805",
        "4010253,X-ray,Procedure,SNOMED,399208008", "3004249,Systolic,Measurement,LOINC,8480-6",
        "4041306,Smoking,Observation,SNOMED,72166-2", "99,unused,Observation,SNOMED,1",
    ],
}  # fmt: skip


def write(folder, **tables):
    folder.mkdir()
    for name, header in HEADERS.items():
        rows = tables.get(name, ROWS[name])
        (folder / f"{name}.csv").write_text("\n".join([header.replace(" ", ","), *rows]) + "\n")
    return folder


def read(out):
    tables = [pq.read_table(path) for path in sorted((out / "ehr" / "data").glob("*.parquet"))]
    frame = pa.concat_tables(tables).to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    return frame.assign(known=frame["available_time"].fillna(frame["time"]))


def rows_of(frame, code, *columns):
    chosen = frame[frame["code"] == code]
    return list(zip(*([str(cell) for cell in chosen[name]] for name in columns), strict=True))


@pytest.fixture
def events(tmp_path, convert):
    code, _, seen = convert("synthea", write(tmp_path / "source"), tmp_path / "out")
    assert code == 0, seen
    return read(tmp_path / "out")


def test_every_row_with_a_concept_is_an_event_and_the_rest_is_counted(tmp_path, convert):
    code, result, seen = convert("synthea", write(tmp_path / "source"), tmp_path / "out")
    assert (code, str(BIG) in seen) == (0, False), seen
    assert (result["subjects"], result["rows"], result["static_rows"], result["codes"]) == (2, 24, 4, 16)
    assert {name: n for name, n in result["left_out"].items() if n} == {
        "ethnicity": 2, "measurement": 1, "visit_ends_before_start": 1
    }  # fmt: skip
    described = open_root(tmp_path / "out" / "ehr").descriptions
    assert described["SNOMED/59621000"] == '"Primary" hypertension, essential'
    assert described["VISIT_END//Visit/IP"] == "end of Inpatient Visit"
    assert "SNOMED/1" not in described
    made = ingest(tmp_path / "out", tmp_path / "cohort")
    assert made["ehr"]["rows"] == 24
    assert sorted(Cohort.open(tmp_path / "cohort").events().subjects) == [2, BIG]


def test_a_diagnosis_of_a_visit_is_known_when_the_visit_ends(events):
    found = rows_of(events, "SNOMED/59621000", "subject_id", "time", "known")
    assert sorted(found) == [
        (str(BIG), "2010-03-02 09:00:00", "2010-03-05 17:30:00"),
        (str(BIG), "2010-06-01 00:00:00", "2010-06-01 23:59:59.999999"),
        (str(BIG), "2010-07-01 00:00:00", "2010-07-01 23:59:59.999999"),  # of no visit: its own day
        ("2", "2011-01-01 10:00:00", "2011-01-02 23:59:59.999999"),  # the visit's end is a bare date
        ("2", "2011-05-05 09:00:00", "2012-02-29 23:59:59.999999"),  # it ends before it starts: with the last row
    ]


@pytest.mark.parametrize("visit", ["15,2,9201,2011-03-01,2011-03-01 08:00:00,,", None])
def test_a_diagnosis_of_a_visit_whose_end_is_not_on_record_is_known_with_the_last_row(tmp_path, convert, visit):
    tables = {"condition_occurrence": ["2,320128,2011-03-01,2011-03-01 08:05:00,15"], "death": []}
    tables |= {"visit_occurrence": [visit]} if visit else {}
    tables |= {"measurement": ["2,3004249,2011-04-02,,1,,1,", f"{BIG},3004249,2015-01-01,,1,,1,"]}
    assert convert("synthea", write(tmp_path / "source", **tables), tmp_path / "out")[0] == 0
    (known,) = rows_of(read(tmp_path / "out"), "SNOMED/59621000", "known")[0]
    assert known == ("2011-04-02 23:59:59.999999" if visit else "2011-05-05 09:00:00")


def test_a_row_of_unknown_hour_is_known_at_the_end_of_its_day(events):
    assert rows_of(events, "SNOMED/72166-2", "time", "known", "text_value") == [
        ("2011-01-01 00:00:00", "2011-01-01 23:59:59.999999", "Never smoker")
    ]
    assert rows_of(events, "VISIT_START//Visit/IP", "time", "known") == [("2010-03-01 08:00:00",) * 2]
    assert rows_of(events, "VISIT_END//UNKNOWN", "time", "known") == [("2011-01-02 23:59:59.999999",) * 2]
    assert rows_of(events, "MEDS_DEATH", "subject_id", "time") == [("2", "2012-02-29 23:59:59.999999")]
    timed = events[events["time"].notna()]
    assert (timed["known"] >= timed["time"]).all()


def test_values_units_birth_and_sex_arrive(events):
    assert rows_of(events, "LOINC/8480-6", "numeric_value", "text_value", "unit", "visit_id")[0] == (
        "120.5", "nan", "mm[Hg]", str(BIG)
    )  # fmt: skip
    assert rows_of(events, "LOINC/8480-6", "numeric_value", "text_value")[1] == ("nan", "high")
    assert rows_of(events, "RxNorm/197805", "numeric_value") == [("30.0",)]
    assert rows_of(events, "MEDS_BIRTH", "subject_id", "time") == [
        ("2", "1980-02-03 00:00:00"),
        (str(BIG), "1950-07-15 00:00:00"),
    ]
    assert rows_of(events, "Gender/M", "subject_id", "time") == [(str(BIG), "NaT")]


def test_a_vocabulary_separated_by_tabs_and_compressed_tables_give_the_same(tmp_path, convert):
    source = write(tmp_path / "source")
    convert("synthea", source, tmp_path / "one")
    concepts = pd.read_csv(source / "concept.csv", dtype=str)
    (source / "concept.csv").unlink()
    text = "\n".join("\t".join(row) for row in [list(concepts.columns), *concepts.to_numpy().tolist()])
    (source / "CONCEPT.csv").write_text(text.upper().split("\n")[0] + text[text.index("\n") :] + "\n")
    pd.read_csv(source / "measurement.csv", dtype=str).to_csv(source / "measurement.csv.gz", index=False)
    (source / "measurement.csv").unlink()
    assert convert("synthea", source, tmp_path / "two")[0] == 0
    for name in ("data/0000.parquet", "metadata/codes.parquet", "metadata/subject_splits.parquet"):
        assert (tmp_path / "one" / "ehr" / name).read_bytes() == (tmp_path / "two" / "ehr" / name).read_bytes()


@pytest.mark.parametrize(
    ("tables", "code"),
    [
        ({"measurement": ["2,3004249,2010-13-01,,1,,1,"]}, "SOURCE_VALUE"),
        ({"measurement": ["2,3004249,,,1,,1,"]}, "SOURCE_VALUE"),
        ({"measurement": ["2,3004249,2010-01-01,2010-01-01T10:00:00Z,1,,1,"]}, "SOURCE_VALUE"),
        ({"measurement": ["2,3004249,2010-01-01,,low,,1,"]}, "SOURCE_VALUE"),
        ({"measurement": [",3004249,2010-01-01,,1,,1,"]}, "SOURCE_VALUE"),
        ({"measurement": ["2,77,2010-01-01,,1,,1,"]}, "OMOP_CONCEPTS"),
        ({"measurement": ["2,3004249"]}, "SOURCE_UNREADABLE"),
        ({"person": ["2,8532,1980,2,31,8527,0"]}, "SOURCE_VALUE"),
        ({"concept": [*ROWS["concept"], "8507,again,Gender,Gender,X"]}, "SOURCE_DUPLICATE"),
    ],
)
def test_tables_that_cannot_be_right_are_refused_and_leave_nothing(tmp_path, convert, tables, code):
    exit_code, result, _ = convert("synthea", write(tmp_path / "source", **tables), tmp_path / "out")
    assert (exit_code, result.get("refused", {}).get("code")) == (2, code)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", HEADERS)
def test_a_table_without_a_column_or_absent_is_refused(tmp_path, convert, name):
    source = write(tmp_path / "source")
    path = source / f"{name}.csv"
    path.write_text(path.read_text().replace("person_id" if name != "concept" else "vocabulary_id", "x", 1))
    assert convert("synthea", source, tmp_path / "out")[1]["refused"]["code"] == "SOURCE_COLUMNS"
    path.unlink()
    assert convert("synthea", source, tmp_path / "out")[1]["refused"]["code"] == "SOURCE_FILE_MISSING"


MINUTE = st.integers(0, 3000)


@settings(max_examples=15, deadline=None)
@given(
    visits=st.lists(st.tuples(MINUTE, MINUTE), min_size=1, max_size=6),
    rows=st.lists(st.tuples(MINUTE, st.integers(0, 7))),
)
@example(visits=[(0, 1)], rows=[(1439, 0)])  # the visit is over, and the hour of the row unknown
def test_no_diagnosis_is_known_before_its_visit_ends(tmp_path_factory, synthea, visits, rows):
    start = pd.Timestamp("2010-01-01 00:01")
    moment = lambda minute: start + pd.Timedelta(minutes=minute)  # noqa: E731
    stamp = lambda minute: f"{moment(minute):%Y-%m-%d},{moment(minute):%Y-%m-%d %H:%M:%S}"  # noqa: E731
    folder = tmp_path_factory.mktemp("omop")
    spans = [f"{n},2,9201,{stamp(a)},{stamp(a + b)}" for n, (a, b) in enumerate(visits)]
    diagnoses = [f"2,320128,{stamp(minute)},{visit}" for minute, visit in rows]
    source = write(folder / "source", visit_occurrence=spans, condition_occurrence=diagnoses)
    synthea["convert"](source, folder / "out")
    found = read(folder / "out")
    found = found[(found["code"] == "SNOMED/59621000")]
    assert len(found) == len(rows)
    day = pd.Timedelta(days=1) - pd.Timedelta(microseconds=1)
    whole = lambda time: time.normalize() + day if time == time.normalize() else time  # noqa: E731
    ends = {n: whole(moment(a + b)) for n, (a, b) in enumerate(visits)}
    last = pd.Timestamp("2012-02-29") + day  # the death
    want = sorted((moment(m), max(whole(moment(m)), ends.get(v, last))) for m, v in rows)
    assert sorted(zip(found["time"], found["known"], strict=True)) == want


@pytest.fixture(scope="module")
def synthea():
    import runpy
    import sys
    from pathlib import Path

    before = [*sys.path]
    yield runpy.run_path(str(Path(__file__).parents[2] / "datasets" / "synthea" / "convert.py"))
    sys.path[:] = before


def test_many_shards_hold_each_subject_once_sorted_by_time(tmp_path, synthea, monkeypatch):
    people = [f"{n},8507,1950,,,8527,0" for n in range(1, 200)]
    rows = [f"{n},3004249,2010-01-{1 + (7 * n + k) % 28:02d},,{k},,," for k in range(5) for n in range(1, 200)]
    source = write(tmp_path / "source", person=people, measurement=rows, death=[])
    for name in ("visit_occurrence", "condition_occurrence", "drug_exposure", "procedure_occurrence", "observation"):
        (source / f"{name}.csv").write_text(HEADERS[name].replace(" ", ",") + "\n")
    monkeypatch.setattr(synthea["meds_out"], "_SHARD_BYTES", 4096)
    counts = synthea["convert"](source, tmp_path / "out")
    shards = [pd.read_parquet(path) for path in sorted((tmp_path / "out" / "ehr" / "data").glob("*.parquet"))]
    assert len(shards) > 5
    assert sum(shard["subject_id"].nunique() for shard in shards) == counts["subjects"] == 199
    for shard in shards:
        times = shard["time"].fillna(pd.Timestamp.min).to_numpy("int64")
        assert (np.lexsort((np.arange(len(shard)), times, shard["subject_id"])) == np.arange(len(shard))).all()
    splits = pd.read_parquet(tmp_path / "out" / "ehr" / "metadata" / "subject_splits.parquet")["split"].value_counts()
    assert splits["train"] > 110
    assert min(splits["tuning"], splits["held_out"]) > 15
