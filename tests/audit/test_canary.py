"""A run that looks past its time is seen from outside; one that does not is left alone."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mmjepa.audit.canary import Table, canaries, table_of_run
from mmjepa.cohort import Cohort

HOUR = pd.Timedelta(hours=1)
START = pd.Timestamp("2150-03-01 08:30")
PEOPLE = 20


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Cohort:
    """A stay a subject with ten labs; every second subject has a drug later on, and that is the label."""
    root, draw, rows = tmp_path_factory.mktemp("cohort"), np.random.default_rng(0), []
    for s in range(1, PEOPLE + 1):
        rows += [
            (s, START, START, "HOSPITAL_ADMISSION//A", np.nan),
            (s, START + 50 * HOUR, START + 50 * HOUR, "HOSPITAL_DISCHARGE//H", np.nan),
        ]
        for hour in sorted(draw.uniform(1, 49, 10)):
            rows.append((s, START + hour * HOUR, START + (hour + 1) * HOUR, f"LAB//{draw.integers(4)}", draw.normal()))
        if s % 2:
            rows.append((s, START + 49 * HOUR, START + 49 * HOUR, "DRUG//1", np.nan))
    table = pd.DataFrame(rows, columns=["subject_id", "time", "available_time", "code", "numeric_value"])
    table = table.sort_values(["subject_id", "time"]).astype({"numeric_value": "float32"})
    for part in ("data", "metadata"):
        (root / "ehr" / part).mkdir(parents=True)
    table.to_parquet(root / "ehr" / "data" / "0.parquet", index=False)
    pd.DataFrame({"code": sorted(set(table["code"]))}).to_parquet(root / "ehr/metadata/codes.parquet", index=False)
    return Cohort.open(root)


def reader(column: str, ahead_hours: float = 0) -> Table:
    """Sums and counts of the events whose ``column`` lies up to ``ahead_hours`` after the time; asked at 20 and at 30 h."""

    def table_of(folder: Path) -> pd.DataFrame:
        records = pd.concat([pd.read_parquet(path) for path in (folder / "ehr" / "data").rglob("*.parquet")])
        rows = []
        for subject, mine in records.groupby("subject_id"):
            for hour in (20, 30):
                t = START + hour * HOUR
                seen = mine[mine[column] <= t + ahead_hours * HOUR]
                rows.append((subject, t, np.array([seen["numeric_value"].sum(), len(seen), 1.0])))
        return pd.DataFrame(rows, columns=["subject_id", "prediction_time", "z"])

    return table_of


def labels() -> pd.DataFrame:
    subject = np.arange(1, PEOPLE + 1)
    return pd.DataFrame({"subject_id": subject, "value": subject % 2 == 1})


@pytest.mark.parametrize(
    ("table_of", "verdict"),
    [(reader("available_time"), "pass"), (reader("time"), "fail"), (reader("available_time", 8), "fail")],
)
@pytest.mark.parametrize("asked", [labels(), None])
def test_a_run_that_reads_ahead_fails_both_and_an_honest_one_passes_both(cohort, table_of, verdict, asked):
    found = {finding.check: finding for finding in canaries(table_of, cohort, asked)}
    assert {check: finding.verdict for check, finding in found.items()} == {"2": verdict, "3": verdict}
    assert f"of {PEOPLE} records" in found["2"].sentence


def test_without_two_different_labels_nothing_is_swapped(cohort):
    found = {f.check: f for f in canaries(reader("available_time"), cohort, labels().assign(value=True))}
    assert (found["2"].verdict, found["3"].verdict) == ("pass", "not-applicable")


def test_a_row_that_goes_away_with_the_future_has_moved(cohort):
    def table_of(folder: Path) -> pd.DataFrame:
        table = reader("available_time")(folder)
        many = pd.concat([pd.read_parquet(path) for path in (folder / "ehr" / "data").rglob("*.parquet")])
        kept = many.groupby("subject_id").size() > 9
        return table[table["subject_id"].map(kept)]

    assert {f.check: f.verdict for f in canaries(table_of, cohort)}["2"] == "fail"


def test_what_embed_writes_of_a_run_can_be_asked(ct_ehr_run, ct_ehr_cohort):
    found = {finding.check: finding for finding in canaries(table_of_run(ct_ehr_run), Cohort.open(ct_ehr_cohort))}
    assert found["2"].verdict == "pass"


def test_a_trained_run_over_stays_is_moved_by_nothing_later(icu_run, icu_cohort):
    found = {finding.check: finding for finding in canaries(table_of_run(icu_run), Cohort.open(icu_cohort))}
    assert {check: finding.verdict for check, finding in found.items()} == {"2": "pass", "3": "pass"}


@pytest.mark.parametrize("least", [0, 9])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_z_that_is_not_finite_proves_nothing(cohort, least, value):
    """From the start (least 0), or once a record is shorter than it was."""

    def table_of(folder: Path) -> pd.DataFrame:
        table = reader("available_time")(folder)
        records = pd.concat([pd.read_parquet(path) for path in (folder / "ehr" / "data").rglob("*.parquet")])
        broken = (table["subject_id"].map(records.groupby("subject_id").size()) <= least) | (least == 0)
        z = [np.full(3, value) if bad else z for z, bad in zip(table["z"], broken, strict=True)]
        return table.assign(z=z)

    found = {f.check: f for f in canaries(table_of, cohort)}
    assert found["2"].verdict == "fail"
    assert least or (found["2"].count, found["3"].count) == (2 * PEOPLE, PEOPLE)


@pytest.fixture
def with_rows(cohort, tmp_path):
    """The cohort with one more row a subject, late in its stay, of the code."""

    def made(code: str) -> Cohort:
        records = pd.read_parquet(cohort.meds_root / "data" / "0.parquet")
        ends = records[records["code"].str.startswith("HOSPITAL_DISCHARGE")].assign(code=code)
        ends[["time", "available_time"]] -= HOUR / 2
        for part in ("data", "metadata"):
            (tmp_path / "ehr" / part).mkdir(parents=True)
        records = pd.concat([records, ends]).sort_values(["subject_id", "time"])
        records.to_parquet(tmp_path / "ehr" / "data" / "0.parquet", index=False)
        listed = pd.DataFrame({"code": sorted(set(records["code"]))})
        listed.to_parquet(tmp_path / "ehr/metadata/codes.parquet", index=False)
        return Cohort.open(tmp_path)

    return made


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        ("TRANSFERRIN", "fail"),
        ("DISCHARGE_NOTE", "fail"),
        ("ADMISSION_DX//I21", "fail"),
        ("MEDS_DEATH", "fail"),
        ("HOSPITAL_DISCHARGE//DIED", "fail"),
        ("TRANSFER_TO//discharge//UNK", "pass"),
        ("ICU_DISCHARGE//Expired", "pass"),
    ],
)
def test_a_run_that_looks_for_a_later_code_is_seen_unless_the_finding_says_that_it_is_kept(with_rows, code, verdict):
    def table_of(folder: Path) -> pd.DataFrame:
        table = reader("available_time")(folder)
        records = pd.concat([pd.read_parquet(path) for path in (folder / "ehr" / "data").rglob("*.parquet")])
        has = table["subject_id"].isin(records.loc[records["code"] == code, "subject_id"])
        return table.assign(z=[np.append(z, 100.0 * one) for z, one in zip(table["z"], has, strict=True)])

    found = {f.check: f for f in canaries(table_of, with_rows(code))}["2"]
    assert found.verdict == verdict
    assert "rows of stays, transfers, birth and images were kept" in found.sentence
