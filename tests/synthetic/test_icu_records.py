"""A stay's rows are its course: the package's own reader finds every hour's labs and treatment, no more."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmjepa.ehr.stays import HOUR_US, NEVER, StaysConfig, derive_stays, iterate
from mmjepa.ehr.store import EventStore
from mmjepa.ehr.text import NO_ACTION, NO_STATE, TextWriter
from synthetic import tables
from synthetic.events import HOUR, NO_TIME, SECOND_US
from synthetic.icu import NONE, Icu, simulate
from synthetic.icu_records import LAB_MEAN, LAB_SD, IcuVocabulary, hourly_truth, records

START_S = 1_500_000_000
WORDS = IcuVocabulary("internal")


@pytest.fixture(scope="module")
def stays():
    return simulate(Icu(), 0, 0, 60)


@pytest.fixture(scope="module")
def rows(stays):
    return [records(stays, row, WORDS, START_S + 5000 * row, 0) for row in range(60)]


@pytest.fixture(scope="module")
def store(rows, tmp_path_factory):
    root = tmp_path_factory.mktemp("icu")
    (root / "data").mkdir()
    (root / "metadata").mkdir()
    pieces = [tables.record(one, 100 + i, i * 1000, WORDS.codes, {}) for i, one in enumerate(rows)]
    pq.write_table(pa.concat_tables(pieces), root / "data" / "0.parquet")
    pd.DataFrame({"code": WORDS.codes, "description": WORDS.descriptions}).to_parquet(root / "metadata/codes.parquet")
    return EventStore.in_memory(root)


def codes_of(one):
    return np.array(WORDS.codes)[one.code]


def test_the_package_finds_each_stay_with_its_hours_and_its_end(stays, store):
    frame, counts = derive_stays(store, StaysConfig(min_los_hours=0, min_observations=0))
    assert counts["kept"] == 60
    assert counts["rows_after_death"] == 0
    assert counts["deaths"] == (stays.death_h != NONE).sum()
    for row, stay in enumerate(iterate(frame)):
        assert stay.subject_id == 100 + row
        assert stay.hours == stays.inside()[row].sum()
        assert stay.icu_in_us == (START_S + 5000 * row) // HOUR * HOUR * SECOND_US
        assert (stay.death_us < NEVER) == (stays.death_h[row] != NONE)
        if stay.death_us < NEVER:
            assert (stay.death_us - stay.icu_in_us) // HOUR_US == stays.death_h[row]
        assert stay.hospital_in_us < stay.icu_in_us < stay.icu_out_us <= stay.hospital_out_us < NEVER
    usual, _ = derive_stays(store)
    assert len(usual) == (stays.end_h >= 6).sum()


def test_the_text_of_an_hour_holds_its_labs_and_its_treatment_and_nothing_else(stays, store):
    frame, _ = derive_stays(store, StaysConfig(min_los_hours=0, min_observations=0))
    writer = TextWriter(store)
    for row, stay in enumerate(iterate(frame)):
        texts = writer(stay)
        assert re.fullmatch(r"Age: \d\d y\. Sex: (Female|Male) sex\.", texts.static)
        for hour, (state, action) in enumerate(zip(texts.state, texts.action, strict=True)):
            drawn = stays.labs[row, hour]
            said = {int(j) - 1: float(x) for j, x in re.findall(r"Intensive care lab (\d+): (-?[\d.]+) u\.", state)}
            assert sorted(said) == np.flatnonzero(~np.isnan(drawn)).tolist()
            for j, x in said.items():
                assert x == pytest.approx(LAB_MEAN + LAB_SD * drawn[j], rel=6e-4, abs=0.06)
            assert state.endswith(NO_STATE) == (not said)
            given = "t={}h | {}".format(hour, "Organ support, one hour." if stays.treated[row, hour] else NO_ACTION)
            assert action == given


def test_what_is_seen_of_an_hour_is_known_in_it_and_in_order(stays, rows):
    for row, one in enumerate(rows):
        start = (START_S + 5000 * row) // HOUR * HOUR * SECOND_US
        timed = one.time != NO_TIME
        assert (np.diff(one.time[timed]) >= 0).all()
        assert (one.available[timed] >= one.time[timed]).all()
        lab = np.char.startswith(codes_of(one), "LAB//")
        assert (one.available[lab] - one.time[lab] >= 300 * SECOND_US).all()
        assert ((one.available[lab] - start) // HOUR_US == (one.time[lab] - start) // HOUR_US).all()
        given, out = codes_of(one) == "MEDICATION//SUPPORT", codes_of(one) == "ICU_DISCHARGE//UNIT"
        for hour in np.unique((one.time[given] - start) // HOUR_US):
            assert (
                one.available[lab & ((one.time - start) // HOUR_US == hour)].max(initial=start)
                < one.time[given & ((one.time - start) // HOUR_US == hour)].min()
            )
        assert (one.available[lab | given] < one.time[out]).all()
        assert (one.time[lab | given] >= start).all()


def test_the_dead_leave_by_death_alone_and_the_rest_alive(stays, rows):
    for row, one in enumerate(rows):
        died, found = stays.death_h[row] != NONE, codes_of(one).tolist()
        assert ("MEDS_DEATH" in found) == ("HOSPITAL_DISCHARGE//DIED" in found) == died
        assert ("HOSPITAL_DISCHARGE//HOME" in found) == (not died)
        if died:
            assert one.time.max() == one.time[found.index("MEDS_DEATH")] == one.time[found.index("ICU_DISCHARGE//UNIT")]
            assert one.time.max() % (24 * HOUR_US) != 0  # midnight would read as a date


def test_a_stay_has_the_same_rows_in_any_batch_and_arm_by_arm_the_same_person(stays, rows):
    again = simulate(Icu(), 0, 17, 3)
    for name, column in vars(records(again, 1, WORDS, START_S + 5000 * 18, 0)).items():
        assert column.tobytes() == getattr(rows[18], name).tobytes()
    other = records(simulate(Icu(), 0, 18, 1, "always"), 0, WORDS, START_S + 5000 * 18, 0)
    early = np.isin(codes_of(other), ["MEDS_BIRTH", "GENDER//F", "GENDER//M", "HOSPITAL_ADMISSION//EMERGENCY"])
    known = np.isin(codes_of(rows[18]), codes_of(other)[early])
    assert other.code[early].tolist() == rows[18].code[known].tolist()
    assert other.time[early].tolist() == rows[18].time[known].tolist()


def test_what_comes_later_moves_no_earlier_row(stays, rows):
    switched = simulate(Icu(), 0, 0, 60, "always", 10)
    for row, one in enumerate(rows):
        cut = ((START_S + 5000 * row) // HOUR + 10) * HOUR * SECOND_US
        other = records(switched, row, WORDS, START_S + 5000 * row, 0)
        early, same = one.time < cut, other.time < cut
        assert one.time[early].tolist() == other.time[same].tolist()
        assert one.code[early].tolist() == other.code[same].tolist()
        assert np.array_equal(one.value[early], other.value[same], equal_nan=True)


def test_age_and_sex_say_nothing_of_the_course():
    stays = simulate(replace(Icu(), hours=6), 1, 0, 1500)
    born, male = np.empty(1500), np.empty(1500, dtype=bool)
    for row in range(1500):
        one = records(stays, row, WORDS, START_S, 1)
        born[row], male[row] = one.time[codes_of(one) == "MEDS_BIRTH"][0], "GENDER//M" in codes_of(one)
    assert 0.45 < male.mean() < 0.55
    age = (START_S * SECOND_US - born) / HOUR_US / 24 / 365.25
    assert 19.9 < age.min() < 35 < 60 < np.median(age) < 70
    for course in (stays.states[:, 0].sum(1), stays.deteriorating):
        for person in (age, male):
            assert abs(np.corrcoef(course, person)[0, 1]) < 4 / np.sqrt(1500)


def test_the_truth_in_long_form_is_the_stays(stays):
    truth = hourly_truth(stays)
    frame = pd.DataFrame(truth).set_index(["stay", "hour"])
    assert frame.shape == (60 * 48, 6)
    assert frame.loc[(7, 13), ["state_1", "state_2", "state_3"]].tolist() == stays.states[7, 13].tolist()
    assert frame.loc[(7, 13), "treated"] == stays.treated[7, 13]
    assert frame["in_unit"].to_numpy().reshape(60, 48).sum() == stays.inside().sum()
    assert frame["drifting"].to_numpy().reshape(60, 48).any(1).tolist() == (stays.onset_h <= 47).tolist()
