"""NLST as downloaded -> a source folder: screening records, lung-cancer labels at each screen, a link to the CTs.

    python datasets/nlst/convert.py SOURCE OUT [--follow-up canc_free_days]
    mmjepa ingest OUT --out COHORT

Time zero of a label is the scan. The outcome is in the labels alone, never in the records; the reading of a screen enters the
records at the end of its day, after the scan. Columns: NLST data dictionaries of CDAS and TCIA.
"""

import argparse
import sys
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path

import pandas as pd

sys.path.append(str(Path(__file__).resolve().parents[1]))
import source_folder as shared

from mmjepa.refusal import Refusal

#: The archive's study dates are fictitious: one date for each screening year.
SCREEN_DAYS = (datetime(1999, 1, 2), datetime(2000, 1, 2), datetime(2001, 1, 2))
READ_AFTER = timedelta(days=1) - timedelta(microseconds=1)
YEARS, YEAR_DAYS = range(1, 7), 365.25
MISSING = ("", ".", ".N", ".E", ".W", ".M", ".F", ".S")
SEX, SMOKING = {1: "MALE", 2: "FEMALE"}, {0: "FORMER", 1: "CURRENT"}
PERSON = ("pid", "age", "gender", "race", "cigsmok", "scr_days0", "scr_days1", "scr_days2", "candx_days")
READING = ("pid", "study_yr", "sct_ab_num", "sct_ab_desc", "sct_long_dia", "sct_perp_dia")


def main(options: argparse.Namespace) -> dict:
    images = shared.find_one(options.source, "NLST")
    persons = read_persons(options.source, options.follow_up)
    readings = read_readings(options.source)
    series, skipped = shared.read_series(images)
    if not series:
        raise Refusal("CT_EMPTY", f"no CT image in {images}")
    imaged = {one.patient_id for one in series}
    left_out = Counter(images_without_person=len(imaged - set(persons.index)))
    with shared.new_source_folder(options.out, imaged & set(persons.index)) as folder:
        events = person_events(folder, persons) + reading_events(folder, readings)
        rows = folder.write_events(events, "nlst")
        labels = write_labels(folder, persons, series, left_out)
        folder.link("images", images)
    return {
        "subjects": len(imaged & set(persons.index)),
        "series": len(series),
        "events": rows,
        "labels": labels,
        **shared.said("left_out", left_out),
        **shared.said("files_skipped", skipped),
    }


def read_persons(source: Path, follow_up: str) -> pd.DataFrame:
    """The participant table indexed by pid, numbers as float64; ``follow_up`` holds the last day known without lung cancer."""
    path = shared.find_one(source, "*_prsn_*.csv")
    try:
        table = shared.unique(shared.read_table(path, [*PERSON, follow_up]), "pid", path)
    except Refusal as refusal:
        if refusal.code == "SOURCE_COLUMNS" and refusal.message.endswith(" fup_days"):
            raise Refusal(
                "NLST_NO_FOLLOW_UP",
                f"{path} has no column fup_days",
                "Ask CDAS for the full participant table, or see --follow-up in the card",
            ) from None
        raise
    columns = {name: shared.numbers(table, name, path, MISSING) for name in [*PERSON[1:], follow_up]}
    return pd.DataFrame(columns).rename(columns={follow_up: "follow_up"})


def read_readings(source: Path) -> pd.DataFrame:
    """The CT abnormalities, numbers as float64."""
    path = shared.find_one(source, "*_ctab_*.csv")
    table = shared.read_table(path, READING)
    for name in READING[1:]:
        table[name] = shared.numbers(table, name, path, MISSING)
    wrong = ~table["study_yr"].isin([0, 1, 2])
    if wrong.any():
        raise Refusal("SOURCE_VALUE", f"study_yr in row {wrong.to_numpy().argmax() + 1} of {path} is not 0, 1 or 2")
    return table


def person_events(folder: shared.SourceFolder, persons: pd.DataFrame) -> list[tuple]:
    """Sex and race without a time; age and smoking, which were asked at entry, on the first screen's day."""
    rows: list[tuple] = []
    for index, person in persons.to_dict("index").items():
        pid = str(index)
        subject = folder.people.subject_id(pid)
        if subject is None:
            continue
        entry = folder.moved(pid, SCREEN_DAYS[0])
        rows.append((subject, None, f"GENDER//{SEX.get(person['gender'], 'UNKNOWN')}", None))
        if pd.notna(person["race"]):
            rows.append((subject, None, f"NLST//RACE//{person['race']:g}", None))
        rows.append((subject, entry, f"NLST//SMOKING//{SMOKING.get(person['cigsmok'], 'UNKNOWN')}", None))
        if pd.notna(person["age"]):
            rows.append((subject, entry, "NLST//AGE//years", person["age"]))
    return rows


def reading_events(folder: shared.SourceFolder, readings: pd.DataFrame) -> list[tuple]:
    """What the radiologist saw, at the end of the screen's day."""
    rows: list[tuple] = []
    for line in readings.to_dict("records"):
        subject = folder.people.subject_id(line["pid"])
        if subject is None:
            continue
        when = folder.moved(line["pid"], SCREEN_DAYS[int(line["study_yr"])] + READ_AFTER)
        if pd.notna(line["sct_ab_desc"]):
            rows.append((subject, when, f"NLST//CT_ABNORMALITY//{line['sct_ab_desc']:g}", None))
        for code, value in (("LONG", line["sct_long_dia"]), ("PERPENDICULAR", line["sct_perp_dia"])):
            if pd.notna(value):
                rows.append((subject, when, f"NLST//{code}_DIAMETER//mm", value))
    return rows


def write_labels(
    folder: shared.SourceFolder, persons: pd.DataFrame, series: list[shared.Series], left_out: Counter[str]
) -> dict[str, int]:
    """Lung cancer within 1..6 years of each scan, and days to diagnosis or last sight; what cannot be known gets no label."""
    labels: dict[int, list[tuple]] = {years: [] for years in YEARS}
    survival: list[tuple] = []
    days = [day.date() for day in SCREEN_DAYS]
    for one in series:
        if folder.people.subject_id(one.patient_id) is None:
            continue
        if one.time is None or one.time.date() not in days:
            left_out["series_without_time" if one.time is None else "series_of_no_screen_date"] += 1
            continue
        person = persons.loc[[one.patient_id]].to_dict("records")[0]
        screen = person[f"scr_days{days.index(one.time.date())}"]
        to_cancer, seen = person["candx_days"] - screen, person["follow_up"] - screen
        has_cancer = pd.notna(person["candx_days"])
        if pd.isna(screen) or (has_cancer and to_cancer < 0) or not (has_cancer or seen > 0):
            reason = "no_screen_day" if pd.isna(screen) else "after_diagnosis" if has_cancer else "no_follow_up"
            left_out[f"series_{reason}"] += 1
            continue
        key = (folder.people.subject_id(one.patient_id), folder.moved(one.patient_id, one.time))
        survival.append((*key, int(has_cancer), float(to_cancer if has_cancer else seen)))
        for years in YEARS:
            value = within(years, to_cancer if has_cancer else None, seen)
            if value is not None:
                labels[years].append((*key, value))
    counts = {f"lung_cancer_{years}y": folder.write_labels(f"lung_cancer_{years}y", labels[years]) for years in YEARS}
    folder.write_survival(f"lung_cancer_{YEARS[-1]}y", survival)
    return counts


def within(years: int, to_cancer_days: float | None, seen_days: float) -> bool | None:
    """Whether lung cancer was found within so many years of a scan; None when the person was lost before that."""
    if to_cancer_days is not None:
        return to_cancer_days < years * YEAR_DAYS
    return False if seen_days >= years * YEAR_DAYS else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--follow-up",
        choices=("fup_days", "canc_free_days"),
        default="fup_days",
        help="the column of the last day known without lung cancer (default fup_days; see the card)",
    )
    sys.exit(shared.run(main, parser))
