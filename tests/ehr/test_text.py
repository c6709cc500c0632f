"""Hourly text holds every reading of its hour, in the published form, and nothing that came later."""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmjepa.ehr.names import format_value, name_and_unit, read_names
from mmjepa.ehr.stays import HOUR_US, NEVER, Stay, derive_stays, iterate
from mmjepa.ehr.store import EventStore
from mmjepa.ehr.text import HourlyTextConfig, TextWriter, hourly_texts, match_intervals
from mmjepa.refusal import Refusal


def store_of(rows, descriptions=None):
    """rows: (subject, hour or None, code, value or None, hour when available or None)."""
    frame = pd.DataFrame(rows, columns=["subject_id", "time", "code", "numeric_value", "available_time"])
    frame = frame.sort_values(["subject_id", "time"], kind="stable", na_position="first")
    for name in ("time", "available_time"):
        frame[name] = pd.to_datetime(frame[name].astype(float) * 3600, unit="s").astype("datetime64[us]")
    frame["numeric_value"] = frame["numeric_value"].astype(np.float32)
    codes = pd.DataFrame({"code": frame["code"].unique()})
    codes["description"] = (
        codes["code"].map(descriptions or {}).astype(object).where(lambda column: column.notna(), None)
    )
    with tempfile.TemporaryDirectory() as folder:
        for part in ("data", "metadata"):
            (Path(folder) / part).mkdir()
        frame.to_parquet(Path(folder) / "data" / "0.parquet", index=False)
        codes.astype("string").to_parquet(Path(folder) / "metadata" / "codes.parquet")
        return EventStore.in_memory(folder)


def stay(hours, subject=1, death=NEVER):
    end = min(hours * HOUR_US, death)
    return Stay(subject, 0, 0, hours * HOUR_US, NEVER, NEVER, death, end, 67.9, float(hours), hours)


def test_the_published_form():
    rows = [
        (1, None, "GENDER//F", None, None),
        (1, 0.5, "LAB//220052//mmHg", 58, None),
        (1, 0.1, "LAB//220045//bpm", 91, None),
        (1, 0.7, "LAB//220045//bpm", 95, None),
        (1, 0.2, "SUBJECT_FLUID_OUTPUT//226559//ml", 50.5, None),
        (1, 0.0, "INFUSION_START//221906", 0.1, None),
        (1, 1.5, "INFUSION_END//221906", 12, None),
        (1, 3.0, "LAB//227969//UNK", None, None),
    ]
    texts = hourly_texts(
        store_of(rows, {"LAB//220045//bpm": "Heart rate", "INFUSION_START//221906": "Norepinephrine"}), stay(4)
    )
    assert texts.static == "Age: 67 y. Sex: F."
    assert texts.state == [
        "t=0h | Heart rate: 91 bpm. Heart rate: 95 bpm. 220052: 58 mmHg. 226559: 50.5 ml.",
        "t=1h | No observations recorded.",
        "t=2h | No observations recorded.",
        "t=3h | 227969.",
    ]
    assert texts.action == [
        "t=0h | Norepinephrine: 0.1.",
        "t=1h | Norepinephrine: 0.1.",
        "t=2h | No active interventions.",
        "t=3h | No active interventions.",
    ]


def test_every_reading_is_kept_and_exact_duplicates_are_dropped():
    rows = [(1, 0.5, "LAB//A", value, None) for value in (2, 1, 2, None, None)] + [(1, 0.6, "LAB//A", 2, None)]
    assert hourly_texts(store_of(rows), stay(1)).state == ["t=0h | A: 2. A: 1. A. A: 2."]


def test_a_late_reading_is_written_in_the_hour_in_which_it_became_available():
    rows = [(1, 0.5, "LAB//A", 1, 2.5), (1, -9.0, "LAB//B", 2, 1.0), (1, 0.5, "LAB//C", 3, 9.0)]
    assert hourly_texts(store_of(rows), stay(3)).state[1:] == ["t=1h | B: 2.", "t=2h | A: 1."]


def test_outcome_codes_are_never_written():
    codes = [
        "MEDS_DEATH",
        "HOSPITAL_DISCHARGE//DIED",
        "ICU_DISCHARGE//MICU",
        "DIAGNOSIS//ICD//9//4019",
        "DRG//APR//720",
        "TRANSFER_TO//discharge//UNK",
        "LAB//223758//UNK",
        "PROCEDURE//ICD//10//5A1955Z",
    ]
    store = store_of([(1, 0.5, code, None, None) for code in codes])
    config = HourlyTextConfig(
        state=tuple({code.split("//")[0] for code in codes}), action=("TRANSFER_TO", "DIAGNOSIS", "PROCEDURE")
    )
    texts = hourly_texts(store, stay(1), config)
    assert texts.state + texts.action == ["t=0h | No observations recorded.", "t=0h | No active interventions."]


def test_flushes_and_carriers_are_no_actions():
    rows = [
        (1, 0.1, "MEDICATION//Sodium Chloride 0.9%  Flush//Flushed", None, None),
        (1, 0.2, "MEDICATION//START//Heparin Flush (10 units/ml)", None, None),
        (1, 0.3, "INFUSION_START//220949", 10, None),
        (1, 0.9, "INFUSION_END//220949", 20, None),
        (1, 0.3, "INFUSION_START//225158", 50, None),
        (1, 0.4, "MEDICATION//Heparin//Administered", None, None),
    ]
    texts = hourly_texts(store_of(rows), stay(1))
    assert texts.action == ["t=0h | 225158: 50. Heparin Administered."]


def test_rows_after_death_or_the_last_hour_are_not_written():
    rows = [(1, hour, "LAB//A", hour, None) for hour in (0, 1, 2, 3, 4)] + [(1, 0, "INFUSION_START//B", 1, None)]
    texts = hourly_texts(store_of(rows), stay(4, death=2 * HOUR_US + 1))
    assert texts.state == ["t=0h | A: 0.", "t=1h | A: 1.", "t=2h | A: 2.", "t=3h | No observations recorded."]
    assert [text[5:] for text in texts.action] == ["| B: 1."] * 3 + ["| No active interventions."]


def test_a_bolus_without_a_rate_shows_its_amount_once_it_is_known():
    rows = [(1, 0.5, "INFUSION_START//A", None, None), (1, 1.5, "INFUSION_END//A", 250, None)]
    assert hourly_texts(store_of(rows), stay(2)).action == ["t=0h | A.", "t=1h | A: 250."]


def test_max_readings_keeps_the_latest():
    rows = [
        (1, hour, code, hour * 10, None)
        for hour, code in ((0.1, "LAB//B"), (0.2, "LAB//A"), (0.3, "LAB//B"), (1.1, "LAB//A"))
    ]
    texts = hourly_texts(store_of(rows), stay(2), HourlyTextConfig(max_readings=2))
    assert texts.state == ["t=0h | A: 2. B: 3.", "t=1h | A: 11."]


events = st.lists(
    st.tuples(
        st.integers(0, 30).map(lambda quarter: quarter / 4),
        st.sampled_from(
            [
                "LAB//A",
                "LAB//B//mg",
                "INFUSION_START//P",
                "INFUSION_END//P",
                "INFUSION_START//Q",
                "INFUSION_END//Q",
                "MEDICATION//M",
                "DIAGNOSIS//ICD//9//4280",
                "GENDER//F",
            ]
        ),
        st.sampled_from([None, 1.0, 2.5]),
        st.sampled_from([0, 0, 0.5, 3]),
    ),
    max_size=25,
)


@settings(max_examples=35, deadline=None)
@example([(0.0, "INFUSION_START//P", None, 0), (6.0, "INFUSION_END//P", 1.0, 0)], [], 5)  # an end on the hour
@given(events, events, st.integers(0, 7))
def test_changing_everything_after_an_hour_leaves_its_text_and_all_before_unchanged(before, after, hour):
    """Rows available by the end of ``hour`` stay; the others are replaced by any others."""

    def rows(chosen, late):
        return [(1, t, code, value, t + delay) for t, code, value, delay in chosen if (t + delay >= hour + 1) == late]

    past = rows(before, late=False)
    every = [(1, None, code, None, None) for code in ("LAB//A", "LAB//B//mg")]  # static: the vocabulary stays known
    one, other = (
        hourly_texts(store_of(every + past + future), stay(8)) for future in (rows(before, True), rows(after, True))
    )
    assert one.state[: hour + 1] == other.state[: hour + 1]
    assert one.action[: hour + 1] == other.action[: hour + 1]
    assert one.static == other.static


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.booleans(), st.integers(0, 1)), max_size=14), st.integers(1, 6))
def test_intervals_cover_the_hours_that_a_count_of_open_starts_gives(rows, limit):
    """Without a lapse, the number of intervals over a moment is starts so far minus ends that closed one."""
    clock, is_end, item = (
        np.array([row[i] for row in rows], kind) for i, kind in enumerate((np.int64, bool, np.int64))
    )
    starts, stops, ends = match_intervals(item, clock, is_end, 1000)
    for kind in (0, 1):
        own = item[starts] == kind if len(rows) else np.zeros(0, bool)
        for moment in np.arange(0, 13) + 0.5:
            open_now = 0
            for t in range(int(moment) + 1):
                at = (clock == t) & (item == kind)
                stopping, starting = (at & is_end).sum(), (at & ~is_end).sum()
                left = max(0, stopping - open_now)
                open_now = max(0, open_now - stopping) + starting - min(left, starting, 1)
            assert ((clock[starts] <= moment) & (stops > moment) & own).sum() == open_now
    closed = ends[ends >= 0]
    assert len(set(closed)) == len(closed)
    assert (stops >= clock[starts]).all()
    assert (match_intervals(item, clock, is_end, limit)[1] <= clock[starts] + limit).all()


def test_texts_are_of_the_own_subject_only():
    rows = [(subject, hour, f"LAB//S{subject}", subject, None) for subject in (3, 1, 2) for hour in (0.5, 1.5)]
    writer = TextWriter(store_of(rows))
    for subject in (1, 2, 3):
        assert writer(stay(2, subject)).state == [f"t={hour}h | S{subject}: {subject}." for hour in (0, 1)]


def test_static_text_holds_only_what_was_known_at_admission():
    rows = [(1, 2.0, "GENDER//M", None, None), (1, 0.0, "RACE//X", None, None)]
    assert hourly_texts(store_of(rows), stay(1)).static == "Age: 67 y. Race: X."
    nobody = stay(1)._replace(age_years=float("nan"))
    assert hourly_texts(store_of([(1, 2.0, "LAB//A", None, None)]), nobody).static == "No static information."


def test_charlson_is_that_of_earlier_admissions_only():
    """Coded at an earlier discharge, at this admission's very moment, within it, at its discharge."""
    heart, liver, aids, lung = (f"DIAGNOSIS//ICD//10//{code}" for code in ("I509", "K7290", "B20", "J449"))
    rows = [(1, -50.0, heart, None, None), (1, -10.0, aids, None, None), (1, -5.0, lung, None, None)]
    rows += [(1, 30.0, liver, None, None), (1, -60.0, lung, None, -9.0)]  # the last one became known in this admission
    now = stay(4)._replace(hospital_in_us=-10 * HOUR_US, hospital_out_us=30 * HOUR_US)
    store = store_of(rows)
    assert hourly_texts(store, now).static == "Age: 67 y. Charlson: 1."
    published = HourlyTextConfig(charlson="admission")
    assert hourly_texts(store, now, published).static == "Age: 67 y. Charlson: 10."
    assert hourly_texts(store, now._replace(hospital_in_us=-70 * HOUR_US)).static == "Age: 67 y."
    assert hourly_texts(store, now._replace(hospital_in_us=NEVER)).static == "Age: 67 y. Charlson: 8."


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (91.0, "91"),
        (-4.0, "-4"),
        (0.1, "0.1"),
        (11.627907, "11.63"),
        (110160.5, "110160"),
        (1e9, "1e+09"),
        (float("inf"), "inf"),
        (9999.9, "10000"),
        (-9999.7, "-10000"),
        (9999.4, "9999"),
        (9999999.9, "10000000"),
        (0.00009999996, "0.0001"),
    ],
)
def test_values_read_like_values(value, text):
    assert format_value(value) == text


def test_names_come_from_the_map_then_the_description_then_the_code(tmp_path):
    (tmp_path / "names.csv").write_text("code,name,unit\nLAB//1//UNK,Heart rate,bpm\n")
    names = read_names(tmp_path / "names.csv")
    assert name_and_unit("LAB//1//UNK", {"LAB//1//UNK": "other"}, names, ["LAB"]) == ("Heart rate", "bpm")
    assert name_and_unit("LAB//2//mg", {"LAB//2//mg": "Long\n name."}, names, ["LAB"]) == ("Long name", "mg")
    assert name_and_unit("LAB//2//UNK", {}, names, ["LAB"]) == ("2", "")
    assert name_and_unit("CREATININE", {}, names, ["LAB"]) == ("CREATININE", "")
    assert name_and_unit("MEDICATION//START//UNK", {}, names, ["LAB"]) == ("START UNK", "")


@settings(deadline=None)
@given(st.lists(st.sampled_from(["LAB", "//", "/", "UNK", " ", "\n", ".", "1", "mg"]), min_size=1).map("".join))
@example("LAB//").via("a family without more")
@example("LAB//\n").via("a blank part")
@example(".").via("nothing but marks")
def test_no_code_reads_as_nothing(code):
    for descriptions in ({}, {code: " ."}):
        name, unit = name_and_unit(code, descriptions, {}, ["LAB"])
        assert name.strip()
        assert name.splitlines() == [name]
        assert unit != "UNK"


def test_codes_whose_parts_say_nothing_are_told_apart():
    made = [name_and_unit(code, {}, {}, ["LAB"])[0] for code in ("LAB", "LAB//", "LAB////", "LAB//UNK", "LAB//UNK//mg")]
    assert made == ["LAB", "LAB//", "LAB////", "LAB//UNK", "LAB//UNK//mg"]


@pytest.mark.parametrize(
    "text", ["code,name\nA,B\n", "code,name,unit\nA,,x\n", "code,name,unit\n,B,x\n", "code,name,unit\nA,.,x\n"]
)
def test_a_broken_name_map_is_refused(tmp_path, text):
    (tmp_path / "names.csv").write_text(text)
    with pytest.raises(Refusal, match="NAMES_SCHEMA"):
        read_names(tmp_path / "names.csv")
    with pytest.raises(Refusal, match="NAMES_MISSING"):
        read_names(tmp_path / "other.csv")


@pytest.mark.real_data
def test_the_mimic_demo_keeps_every_reading(data_folder):
    store = EventStore.in_memory(data_folder / "mimic_iv_demo_meds")
    writer, stays = TextWriter(store), list(iterate(derive_stays(store)[0]))[:10]
    readings = store.match(["LAB", "SUBJECT_FLUID_OUTPUT"]) & ~store.match(HourlyTextConfig().exclude)
    for one in stays:
        row = store.row(one.subject_id)
        span = slice(*store.offsets[row : row + 2])
        frame = pd.DataFrame({"t": store.times_us[span], "c": store.codes[span], "v": store.values[span]})
        frame = frame[
            (frame["t"] >= one.icu_in_us) & (frame["t"] < one.end_us) & readings[frame["c"]]
        ].drop_duplicates()
        texts = writer(one).state
        written = sum(
            len(text.split(" | ")[1].split(". ")) for text in texts if not text.endswith("No observations recorded.")
        )
        assert written == len(frame) > 0
        assert len(texts) == one.hours
