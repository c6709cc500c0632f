"""eICU in MEDS: what does not look like it is refused; dates move by whole days so that none tells when the stay ends."""

import pandas as pd
import pytest

from mmjepa.ingest import ingest

#: code, minutes from the ICU admission, number
STAY = [
    ("ICU_ADMISSION//Emergency Department//admit", 0, None), ("ICU_ADMISSION_WEIGHT", 0, 80.0),
    ("ADMISSION_DIAGNOSIS//Sepsis", 12, None), ("LAB//SPECIMEN_DRAWN//creatinine//mg/dL", 30, None),
    ("LAB//RESULT//creatinine//mg/dL", 95, 1.4), ("LAB//RESULT//sodium//mmol/L", 95, 139.0), ("DIAGNOSIS//sepsis", 200, None),
    ("VITALS//PERIODIC//HEARTRATE", 5, 95.0), ("VITALS//APERIODIC//BP//NONINVASIVE_MEAN", 6, 70.0),
    ("MEDICATION//STARTED//heparin", 60, 5000.0), ("MEDICATION//STOPPED//heparin", 900, None),
    ("TREATMENT//ENTERED//ventilation", 40, None),
]  # fmt: skip
NIGHT = pd.Timedelta("19:45:00")


def write(folder, stays, rows=STAY, birth="1955-03-01"):
    """As eICU-MEDS does: each discharge of a stay of some days is on 31 December, and the rest lies before it."""
    table = []
    for subject, days in stays.items():
        out = pd.Timestamp("2014-12-31") + NIGHT
        start = out - pd.Timedelta(days=days)
        static = [(subject, pd.NaT, "GENDER//Male", None), (subject, pd.Timestamp(birth), "MEDS_BIRTH", None)]
        inside = [(subject, start + pd.Timedelta(minutes=minute), code, value) for code, minute, value in rows]
        leave = [(subject, out, f"{place}_DISCHARGE//Alive//Home", None) for place in ("ICU", "HOSPITAL")]
        entry = (subject, start - pd.Timedelta(hours=3), "HOSPITAL_ADMISSION//UNK", None)
        table += [*static, *sorted([entry, *inside, *leave], key=lambda row: row[1])]
    frame = pd.DataFrame(table, columns=["subject_id", "time", "code", "numeric_value"])
    frame = frame.astype({"time": "datetime64[us]", "numeric_value": "float32"}).assign(vital_id=7)
    for part in ("data", "metadata"):
        (folder / part).mkdir(parents=True)
    for k, subject in enumerate(stays):
        frame[frame["subject_id"] == subject].to_parquet(folder / "data" / f"{k}.parquet", index=False)
    codes = frame[["code"]].drop_duplicates().assign(description="a text")
    codes.to_parquet(folder / "metadata" / "codes.parquet", index=False)
    return folder, frame


def test_only_whole_days_move_and_every_icu_admission_is_on_one_date(tmp_path, convert):
    source, before = write(tmp_path / "meds", {101: 1, 102: 9, 103: 40})
    code, result, seen = convert("eicu", source, tmp_path / "out")
    assert (code, result) == (0, {"rows": 51, "subjects": 3, "codes": 17}), seen
    after = pd.concat(
        [pd.read_parquet(path) for path in sorted((tmp_path / "out" / "ehr" / "data").glob("*.parquet"))],
        ignore_index=True,
    )
    assert after.drop(columns="time").equals(before.drop(columns="time"))
    moved = after["time"] - before["time"]
    assert (moved.dropna() % pd.Timedelta(days=1) == pd.Timedelta(0)).all()
    assert moved.groupby(after["subject_id"]).nunique().eq(1).all()
    admitted = after.loc[after["code"].str.startswith("ICU_ADMISSION//"), "time"]
    assert list(admitted) == [pd.Timestamp("2000-01-01") + NIGHT] * 3
    codes = ("metadata/codes.parquet", "ehr/metadata/codes.parquet")
    assert (source / codes[0]).read_bytes() == (tmp_path / "out" / codes[1]).read_bytes()  # texts and parents stay
    assert ingest(tmp_path / "out", tmp_path / "cohort")["ehr"]["rows"] == 51


@pytest.mark.parametrize("anchor", ["ICU", "HOSPITAL"])
@pytest.mark.parametrize("ages", [(60, 60), (60, 61)])
def test_a_second_unit_stay_tells_nothing_before_it_begins(tmp_path, convert, anchor, ages):
    source, frame = write(tmp_path / "meds", {101: 20})
    start = frame.loc[frame["code"].str.startswith(f"{anchor}_ADMISSION//"), "time"].iloc[0]
    later = pd.Timedelta(days=9, minutes=7)
    again = start + (later if anchor == "ICU" else pd.Timedelta(minutes=1))  # the two rows of a stay differ by a minute
    birth = [at - pd.Timedelta(days=age * 365.25 + 182.625) for at, age in zip((start, again), ages, strict=True)]
    frame = frame[frame["code"] != "MEDS_BIRTH"]
    repeated = frame[frame["code"].str.startswith(("GENDER//", "HOSPITAL_"))]
    entry = frame[frame["code"].str.startswith("HOSPITAL_ADMISSION//")]
    second = frame[frame["code"].str.startswith("ICU_ADMISSION//")]
    second = second.assign(time=second["time"] + later)
    born = pd.concat([entry.assign(code="MEDS_BIRTH", time=time) for time in birth])
    entry = entry.assign(time=entry["time"] + pd.Timedelta(minutes=1))
    both = pd.concat([frame, born, repeated, entry, second]).sort_values("time", kind="stable", na_position="first")
    both.astype({"time": "datetime64[us]"}).to_parquet(source / "data" / "0.parquet", index=False)
    code, result, seen = convert("eicu", source, tmp_path / "out")
    assert (code, result["rows"]) == (0, len(frame) + 2), seen  # one birth and the admission to the unit
    out = pd.read_parquet(tmp_path / "out" / "ehr" / "data" / "0.parquet")
    (born,) = out.loc[out["code"] == "MEDS_BIRTH", "time"]
    admitted = out.loc[out["code"].str.startswith(f"{anchor}_ADMISSION//"), "time"].min()
    age = (admitted - born) / pd.Timedelta(days=365.25)
    assert age == pytest.approx(60.5, abs=1e-5)  # nine days are 0.025 years
    for family in ("GENDER//", "HOSPITAL_ADMISSION//", "HOSPITAL_DISCHARGE//"):
        assert out["code"].str.startswith(family).sum() == 1
    assert out.loc[out["code"].str.startswith("ICU_ADMISSION//"), "time"].diff().iloc[-1] == later


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        ([row for row in STAY if not row[0].startswith("VITALS//P")], "periodic vitals"),
        ([(code, minute, None) for code, minute, _ in STAY], "laboratory results"),
        ([(code, minute, value and 95.0) for code, minute, value in STAY], "creatinine"),
    ],
)
def test_a_root_that_does_not_look_like_eicu_is_refused_by_name(tmp_path, convert, rows, name):
    code, result, _ = convert("eicu", write(tmp_path / "meds", {101: 2}, rows)[0], tmp_path / "out")
    assert (code, result["refused"]["code"]) == (2, "EICU_UNLIKE")
    assert name in result["refused"]["message"]
    assert not (tmp_path / "out").exists()


def test_a_subject_without_an_icu_admission_is_refused(tmp_path, convert):
    source, frame = write(tmp_path / "meds", {101: 2, 102: 3})
    last = frame[(frame["subject_id"] == 102) & ~frame["code"].str.startswith("ICU_ADMISSION//")]
    last.to_parquet(source / "data" / "1.parquet", index=False)
    code, result, seen = convert("eicu", source, tmp_path / "out")
    assert (code, result["refused"]["code"], "102" in seen) == (2, "EICU_NO_ADMISSION", False)
    assert not (tmp_path / "out").exists()
