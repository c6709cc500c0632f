"""Stays are derived as declared, and every admission is either kept or counted."""

from dataclasses import replace
from datetime import datetime, timedelta

import numpy as np
import pandas as pd
import pytest

from mmjepa.ehr.stays import EXCLUDED, HOUR_US, NEVER, Stay, StaysConfig, derive_stays, iterate, pair_intervals
from mmjepa.ehr.store import EventStore, to_us

ADMITTED = datetime(2020, 3, 1, 6)  # hour 0 of the rows below
ANY = StaysConfig(min_observations=0)  # stays that nothing was observed in are kept


def store_of(tmp_path, rows):
    """rows: (subject, hours since ADMITTED, code)."""
    frame = pd.DataFrame(rows, columns=["subject_id", "hours", "code"]).sort_values(
        ["subject_id", "hours"], kind="stable"
    )
    frame["time"] = [ADMITTED + timedelta(hours=hours) for hours in frame.pop("hours")]
    (tmp_path / "data").mkdir()
    (tmp_path / "metadata").mkdir()
    frame.astype({"time": "datetime64[us]"}).to_parquet(tmp_path / "data" / "0.parquet", index=False)
    pd.DataFrame({"code": frame["code"].unique()}).to_parquet(tmp_path / "metadata" / "codes.parquet")
    return EventStore.in_memory(tmp_path)


def person(subject, *rows, years=60):
    return [(subject, -years * 24 * 365.25, "MEDS_BIRTH"), *((subject, hours, code) for hours, code in rows)]


def hospital(*icu, start=-2, stop=500):
    rows = [(start, "HOSPITAL_ADMISSION//URGENT"), (stop, "HOSPITAL_DISCHARGE//HOME")]
    return [
        *rows,
        *((hour, code) for a, b in icu for hour, code in ((a, "ICU_ADMISSION//MICU"), (b, "ICU_DISCHARGE//MICU"))),
    ]


def test_a_stay_carries_its_times_age_and_hours(tmp_path):
    frame, counts = derive_stays(store_of(tmp_path, person(1, *hospital((0, 30.25)))), ANY)
    (stay,) = iterate(frame)
    zero = int(to_us(ADMITTED))
    hours = 30.25
    assert stay == Stay(
        1,
        0,
        zero,
        zero + int(hours * HOUR_US),
        zero - 2 * HOUR_US,
        zero + 500 * HOUR_US,
        NEVER,
        zero + 31 * HOUR_US,
        stay.age_years,
        hours,
        31,
    )
    assert stay.age_years == pytest.approx(60)
    assert counts["kept"] == counts["icu_admissions"] == 1


def test_every_icu_admission_is_kept_or_counted_once(tmp_path):
    rows = [
        *person(1, *hospital((0, 10), (20, 40), (50, 70))),  # the later two are not the first
        *person(2, *hospital((0, 10), start=-1, stop=12), *hospital((30, 40), start=20, stop=60)),  # two admissions
        *person(3, *hospital((0, 5))),  # short
        *person(4, *hospital((0, 9)), years=17),
        *person(5, *hospital((0, 9)))[1:],  # no birth
        *person(6, (0, "ICU_ADMISSION//MICU")),
        *person(7, (-5, "MEDS_DEATH"), *hospital((0, 9))),
        *person(
            8,
            (0, "ICU_ADMISSION//MICU"),
            (9, "ICU_DISCHARGE//MICU"),
            (9, "ICU_ADMISSION//SICU"),
            (30, "ICU_DISCHARGE//SICU"),
        ),
    ]
    frame, counts = derive_stays(store_of(tmp_path, rows), ANY)
    assert frame[["subject_id", "stay"]].to_numpy().tolist() == [[1, 0], [2, 0], [2, 1], [8, 0], [8, 1]]
    excluded = {name: counts[name] for name in EXCLUDED}
    assert excluded == {
        "no_discharge": 1,
        "not_first_of_admission": 2,
        "age_unknown": 1,
        "under_age": 1,
        "short": 1,
        "after_death": 1,
        "few_observations": 0,
        "no_vital_sign": 0,
    }
    assert counts["icu_admissions"] == counts["kept"] + sum(excluded.values())


def test_a_midnight_death_counts_as_the_end_of_its_day_and_later_rows_are_counted(tmp_path):
    day = [(h, "LAB//A") for h in (1, 17.9, 18.5, 40)]
    at = {1: 18, 2: 12}  # hours after 06:00: midnight of the next day, and 18:00
    rows = [
        row for subject, hour in at.items() for row in person(subject, *day, (hour, "MEDS_DEATH"), *hospital((0, 30)))
    ]
    frame, counts = derive_stays(store_of(tmp_path, rows), ANY)
    zero = int(to_us(ADMITTED))
    assert frame["death_us"].tolist() == [zero + 42 * HOUR_US - 1_000_000, zero + 12 * HOUR_US]
    assert frame["end_us"].tolist() == [zero + 30 * HOUR_US, zero + 12 * HOUR_US + 1]
    assert (counts["deaths"], counts["rows_after_death"]) == (2, 1 + 3 + 2)  # discharges come after death too


def test_hours_are_capped(tmp_path):
    config = StaysConfig(max_hours=100, min_observations=0)
    frame, _ = derive_stays(store_of(tmp_path, person(1, *hospital((0, 400)))), config)
    assert frame["hours"].tolist() == [100]
    assert (frame["end_us"] - frame["icu_in_us"]).tolist() == [100 * HOUR_US]


def test_a_stay_needs_observations_in_its_hours(tmp_path):
    labs = {
        1: [(0, "LAB//A"), (9.9, "LAB//B"), (3, "MEDICATION//A")],
        2: [(-0.1, "LAB//A"), (3, "LABEL//A"), (10, "LAB//B")],  # before, something else, after
        3: [(3, "LAB//A"), (4, "SUBJECT_FLUID_OUTPUT//A")],
    }
    rows = [row for subject, some in labs.items() for row in person(subject, *some, *hospital((0, 10)))]
    store = store_of(tmp_path, rows)
    for least, kept in ((0, [1, 2, 3]), (2, [1, 3]), (3, [])):
        frame, counts = derive_stays(store, StaysConfig(min_observations=least))
        assert frame["subject_id"].tolist() == kept
        assert (counts["few_observations"], counts["no_vital_sign"]) == (3 - len(kept), 0)
    frame, counts = derive_stays(store, StaysConfig(min_observations=2, vitals=("LAB//B",)))
    assert frame["subject_id"].tolist() == [1]
    assert (counts["few_observations"], counts["no_vital_sign"]) == (1, 1)


def test_an_observation_counts_in_the_hour_in_which_it_became_available(tmp_path):
    store = store_of(tmp_path, person(1, (-1, "LAB//EARLY"), (8, "LAB//LATE"), *hospital((0, 10))))

    def kept(code, late_hours):
        late = (store.codes == store.vocabulary.index(code)) * late_hours * HOUR_US
        config = StaysConfig(observations=(code,), min_observations=1)
        return len(derive_stays(replace(store, available_us=store.times_us + late), config)[0])

    assert [kept("LAB//EARLY", hours) for hours in (0, 1, 2)] == [0, 1, 1]
    assert [kept("LAB//LATE", hours) for hours in (0, 1, 2)] == [1, 1, 0]


def test_an_admission_without_its_own_discharge_takes_no_other():
    assert pair_intervals(np.array([0, 10, 20]), np.array([15, 30])) == [(0, NEVER), (10, 15), (20, 30)]
    assert pair_intervals(np.array([0, 10]), np.array([10, 30])) == [(0, 10), (10, 30)]


@pytest.mark.real_data
def test_the_mimic_demo_has_140_icu_stays(data_folder):
    frame, counts = derive_stays(EventStore.in_memory(data_folder / "mimic_iv_demo_meds"))
    assert (counts["icu_admissions"], counts["deaths"], counts["rows_after_death"]) == (140, 31, 626)
    assert counts["kept"] == len(frame) == 126
    assert counts["few_observations"] == 0
    assert (frame["hospital_in_us"] < NEVER).all()
