"""Daily text: the published grammar, nothing from later, the newest events survive a budget, what is written reads back."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjepa.ehr.daily import DailyConfig, DailyForm
from mmjepa.ehr.daily_lines import DailyLine, parse_daily
from mmjepa.refusal import Refusal

HOUR_US = 3_600_000_000
EVER = np.iinfo(np.int64).max
RECORD = [
    (1, -10_000 * 24.0, "MEDS_BIRTH"),
    (1, 1.0, "HOSPITAL_ADMISSION//EMERGENCY"),
    (1, 2.0, "MEDICATION//Heparin"),
    (1, 3.0, "LAB//HR//bpm", 91.0),
    (1, 4.0, "LAB//WBC//UNK", 7.125),
    (1, 5.0, "LAB//HR//bpm", 88.0),
    (1, 26.0, "LAB//HR//bpm", 70.0),
    (1, 74.0, "DIAGNOSIS//ICD//10//E785"),
    (1, 74.0, "HOSPITAL_DISCHARGE//DIED"),
    (1, 74.0, "DRG//HCFA//283//INFARCTION, EXPIRED"),
    (1, 75.0, "MEDS_DEATH"),
]
TEXT = """<demographics>
Age: 27 y at day 0
GENDER//F
</demographics>

[day 0]
<observations>
HOSPITAL_ADMISSION//EMERGENCY
</observations>
<measurements>
LAB//HR (bpm): 91.00, 88.00
LAB//WBC: 7.12
</measurements>
<drugs>
MEDICATION//Heparin
</drugs>

[day 1]
<measurements>
LAB//HR (bpm): 70.00
</measurements>

[day 3]
<conditions>
DIAGNOSIS//ICD//10//E785
</conditions>
"""


@pytest.fixture(scope="module")
def store(make_store):
    return make_store(RECORD, [(1, "GENDER//F")])


def words(text):
    return len(text.split())


def plain(config=None, names=None):
    return DailyForm(config or DailyConfig(), names or {}, "x")


def test_a_record_is_written_by_the_grammar_and_death_never_is(store):
    assert plain().text(store, 1, EVER) == TEXT


def test_calendar_dates_and_the_birth_date_in_the_published_style(store):
    text = plain(DailyConfig(style="smb")).text(store, 1, EVER)
    header = "<demographics>\nBirth: 1942-08-16\nGENDER//F\n</demographics>\n\n[1970-01-01]\n"
    assert text.startswith(header)
    assert "\n[1970-01-04]\n" in text
    assert "Age" not in text


def test_diagnoses_of_the_discharge_are_seen_from_the_discharge_on(store):
    assert "E785" not in plain().text(store, 1, 74 * HOUR_US - 1)
    assert "E785" in plain().text(store, 1, 74 * HOUR_US)


def test_before_the_first_event_only_the_header_is_written(store):
    assert plain().text(store, 1, 0) == "<demographics>\nGENDER//F\n</demographics>\n"


def test_timed_demographics_stand_in_the_header_once_known(make_store):
    store = make_store([(1, 0.0, "LAB//A", 1.0), (1, 5.0, "RACE//X")])
    headers = [plain().text(store, 1, hour * HOUR_US).split("\n\n")[0] for hour in (4, 5)]
    assert headers == ["<demographics>\n</demographics>", "<demographics>\nRACE//X\n</demographics>"]


def test_a_late_result_stands_at_its_day_once_it_is_known_and_moves_no_other_day(make_store):
    store = make_store([(1, 30.0, "LAB//A", 1.0), (1, 2.0, "LAB//B", 2.0, 50.0)])
    assert plain().text(store, 1, 49 * HOUR_US).endswith("\n[day 0]\n<measurements>\nLAB//A: 1.00\n</measurements>\n")
    lines = [line[:1] + line[2:] for line in parse_daily(plain().text(store, 1, 50 * HOUR_US))]
    assert lines == [("day -1", "LAB//B", (2.0,)), ("day 0", "LAB//A", (1.0,))]


def test_the_last_five_values_by_time_with_two_decimals(make_store):
    store = make_store([(1, hour, "LAB//A//u", hour / 3) for hour in (0.0, 6.0, 1.0, 2.0, 3.0, 5.0, 4.0)])
    assert "LAB//A (u): 0.67, 1.00, 1.33, 1.67, 2.00\n" in plain().text(store, 1, EVER)
    assert "LAB//A (u): 1.67, 2.00\n" in plain(DailyConfig(last_values=2)).text(store, 1, EVER)


def test_repeated_lines_are_written_once(make_store):
    store = make_store([(1, 0.0, "MEDICATION//A"), (1, 1.0, "MEDICATION//B"), (1, 2.0, "MEDICATION//A")])
    names = {"MEDICATION//A": ("Heparin", ""), "MEDICATION//B": ("Heparin", "")}
    assert plain().text(store, 1, EVER).count("MEDICATION//A") == 1
    assert plain(names=names).text(store, 1, EVER).count("Heparin") == 1


@pytest.mark.parametrize(
    ("code", "tag"),
    [
        ("INFUSION_START//220949", "drugs"),
        ("Blood Pressure Standing (1 min)", "measurements"),
        ("BMI (kg/m2)", "measurements"),
        ("TRANSFER_TO//ED//Emergency Department", "observations"),
        ("PROCEDURE//ICD//9//3893", "procedures"),
        ("LOINC/8480-6", "measurements"),
        ("RxNorm/1191", "drugs"),
        ("SNOMED/59621000", "conditions"),
        ("condition_occurrence//44054006", "conditions"),
        ("HISTORY//CANCER", "observations"),
        ("LABEL//x", "observations"),
    ],
)
def test_every_family_has_its_tag_and_unknown_ones_are_observations(make_store, code, tag):
    (line,) = parse_daily(plain().text(make_store([(1, 0.0, code)]), 1, EVER))
    assert (line.tag, line.head) == (tag, code)


def test_the_longest_family_of_a_persons_own_map_wins(make_store):
    config = DailyConfig(tags={"measurements": ("LAB",), "notes": ("LAB//READ",)}, other="procedures")
    store = make_store([(1, 0.0, "LAB//X"), (1, 0.0, "LAB//READ//Y//u"), (1, 0.0, "DIAGNOSIS//Z")])
    tags = {line.head: line.tag for line in parse_daily(plain(config).text(store, 1, EVER))}
    assert tags == {"LAB//X": "measurements", "LAB//READ//Y": "notes", "DIAGNOSIS//Z": "procedures"}


def test_names_come_from_the_map_then_the_description_then_the_code(make_store):
    events = [(1, 0.0, f"LAB//{name}//u", 1.0) for name in "ABC"]
    store = make_store(events, descriptions={"LAB//A//u": "described a", "LAB//B//u": "described b"})
    form = DailyForm.fit(store, [1], names={"LAB//A//u": ("Mine", "mg")})
    heads = [line.head for line in parse_daily(form.text(store, 1, EVER))]
    assert heads == ["Mine (mg)", "described b (u)", "LAB//C (u)"]


def test_names_of_codes_seen_in_training_are_kept_whatever_a_later_store_calls_them(make_store):
    events = [(1, 0.0, "LAB//A", 1.0), (2, 0.0, "LAB//B", 1.0)]
    form = DailyForm.fit(make_store(events, descriptions={"LAB//A": "a", "LAB//B": "b"}), [1])
    later = make_store(events, descriptions={"LAB//A": "other a", "LAB//B": "other b"})
    assert "a: 1.00" in form.text(later, 1, EVER).splitlines()
    assert "other b: 1.00" in form.text(later, 2, EVER).splitlines()
    assert set(form.names) == {"LAB//A"}


def test_timespans_run_back_from_the_prediction_time_most_recent_first(make_store):
    store = make_store([(1, 24.0 * day, "LAB//A", float(day)) for day in (0, 5, 20, 29, 30)])
    form = plain(DailyConfig(timespans=((30, 10), (10, 1), (1, 0))))
    found = [(line.section, line.values) for line in parse_daily(form.text(store, 1, 30 * 24 * HOUR_US))]
    assert found == [("day 29 - day 30", (30.0,)), ("day 20 - day 29", (29.0,)), ("day 0 - day 20", (5.0, 20.0))]


def test_a_budget_drops_whole_oldest_days_then_oldest_lines_of_the_newest(store):
    form = plain()
    assert form.text(store, 1, EVER, words(TEXT), words) == TEXT
    shorter = form.text(store, 1, EVER, words(TEXT) - 1, words)
    assert shorter == TEXT[: TEXT.index("\n[day 0]")] + TEXT[TEXT.index("\n[day 1]") :]
    known = 5 * HOUR_US
    one_day = form.text(store, 1, known)
    lines = [line.head for line in parse_daily(form.text(store, 1, known, words(one_day) - 1, words))][2:]
    assert lines == ["LAB//HR (bpm)", "LAB//WBC", "MEDICATION//Heparin"]


def test_a_budget_below_the_header_and_one_line_is_refused(store):
    with pytest.raises(Refusal, match="DAILY_BUDGET"):
        plain().text(store, 1, EVER, 10, words)


events = st.lists(
    st.tuples(
        st.integers(0, 200).map(float),
        st.sampled_from(["LAB//A//u", "LAB//B", "MEDICATION//C", "DIAGNOSIS//D", "ODD (x): 1.00", "<[E"]),
        st.one_of(st.just(np.nan), st.integers(-50_000, 50_000).map(lambda n: n / 4)),
        st.integers(0, 48).map(float),
    ),
    min_size=1,
    max_size=30,
)


def expected_lines(rows):
    """From raw rows (hour, code, value, delay), without the form's own code."""
    names = {"LAB//A//u": "LAB//A", "ODD (x): 1.00": "ODD (x) - 1.00", "<[E": "E"}
    tags = {"DIAGNOSIS": "conditions", "LAB": "measurements", "MEDICATION": "drugs"}
    known = sorted(rows, key=lambda row: (row[0] + row[3], row[0]))
    origin, found = known[0][0] // 24, {}
    for hour, code, value, _ in sorted(known, key=lambda row: row[0]):
        tag = tags.get(code.split("//")[0], "observations")
        values = found.setdefault((hour // 24, tag, code), [])
        values += [value] if value == value else []
    lines = []
    for (day, tag, code), values in found.items():
        head = names.get(code, code) + (" (u)" if code == "LAB//A//u" and values else "")
        lines.append(DailyLine(f"day {int(day - origin)}", tag, head, tuple(values[-5:])))
    return lines


@settings(max_examples=60, deadline=None)
@given(events)
def test_day_code_and_last_five_values_read_back(make_store, rows):
    store = make_store([(1, hour, code, value, hour + delay) for hour, code, value, delay in rows])
    found = parse_daily(plain().text(store, 1, EVER))
    assert sorted(found) == sorted(expected_lines(rows))
    assert any(line.values for line in found) == any(row[2] == row[2] for row in rows)


@settings(max_examples=60, deadline=None)
@given(events, st.integers(1, 120), st.sampled_from([(), ((20, 5), (5, 0))]))
def test_the_newest_event_survives_every_budget_that_holds_the_header_and_its_line(make_store, rows, more, spans):
    store = make_store([(1, hour, code, value, hour + delay) for hour, code, value, delay in rows], [(1, "GENDER//F")])
    form, t_us = plain(DailyConfig(timespans=spans)), 260 * HOUR_US
    whole = form.text(store, 1, t_us)
    header = whole[: whole.index("</demographics>\n") + len("</demographics>\n")]
    longest = max(len(line) for line in whole.splitlines())
    budget = (
        len(header) + 2 + 2 * len("<measurements>\n") + len("<timespan>day -99 - day 99</timespan>") + longest + more
    )
    text = form.text(store, 1, t_us, budget, len)
    assert len(text) <= budget
    assert text.startswith(header)
    newest = max(hour for hour, *_ in rows)
    heads = {"LAB//A//u": "LAB//A", "ODD (x): 1.00": "ODD (x) - 1.00", "<[E": "E"}
    ends = tuple(heads.get(code, code) for hour, code, *_ in rows if hour == newest)
    assert any(line.head.startswith(ends) for line in parse_daily(text))


@settings(max_examples=40, deadline=None)
@given(events, events, st.integers(0, 250))
def test_no_later_event_changes_the_text(make_store, rows, later, hour):
    past = [(1, at, code, value, at + delay) for at, code, value, delay in rows]
    future = [(1, at, code, value, hour + 1 + delay) for at, code, value, delay in later]
    codes = [row[2] for row in future]
    texts = [
        plain().text(make_store([*kept, (1, 0.0, "LAB//B")], more_codes=codes), 1, hour * HOUR_US)
        for kept in (past, past + future, [row for row in past if row[4] <= hour])
    ]
    assert texts[0] == texts[1] == texts[2]


def test_tags_are_plain_text_unless_added_tokens_are_asked_for():
    added = plain(DailyConfig(delimiters="added")).added_tokens
    assert plain().added_tokens == []
    assert added[:4] == ["<demographics>", "</demographics>", "<conditions>", "</conditions>"]
    assert len(added) == 16


def test_a_saved_form_is_the_same_and_another_content_hash_or_version_is_refused(store, tmp_path):
    form = DailyForm.fit(store, [1], DailyConfig(timespans=((7, 0),)), {"LAB//HR//bpm": ("Heart rate", "bpm")})
    form.save(tmp_path / "form.json")
    again = DailyForm.load(tmp_path / "form.json", expected=form.hash)
    assert (again.config, again.names, again.hash) == (form.config, form.names, form.hash)
    assert again.text(store, 1, EVER) == form.text(store, 1, EVER)
    assert form.hash != DailyForm.fit(store, [1], DailyConfig(timespans=((7, 0),))).hash
    content = json.loads((tmp_path / "form.json").read_text())
    for change, code in (
        (("fitted_on", "y"), "FORM_HASH"),
        (("version", 9), "FORM_VERSION"),
        (("kind", "x"), "FORM_BROKEN"),
    ):
        (tmp_path / "other.json").write_text(json.dumps(content | dict([change])))
        with pytest.raises(Refusal, match=code):
            DailyForm.load(tmp_path / "other.json")
    with pytest.raises(Refusal, match="FORM_HASH"):
        DailyForm.load(tmp_path / "form.json", expected="another")


def test_tags_that_are_not_of_the_grammar_are_no_config():
    with pytest.raises(ValueError, match="tags are"):
        DailyConfig(tags={"labs": ("LAB",)})
    with pytest.raises(ValueError, match="timespan"):
        DailyConfig(timespans=((0, 7),))


@pytest.mark.real_data
def test_most_values_of_the_mimic_demo_reach_the_text(data_folder):
    from mmjepa.cohort import Cohort

    store = Cohort.open(data_folder / "mimic_iv_demo_meds").events()
    form = DailyForm.fit(store, store.splits["train"], DailyConfig(last_values=10**6))
    subject = int(store.subjects[np.argmin(np.abs(np.diff(store.offsets) - 4000))])
    row = store.row(subject)
    values = np.asarray(store.values[store.offsets[row] : store.offsets[row + 1]])
    lines = parse_daily(form.text(store, subject, EVER))
    assert sum(len(line.values) for line in lines) == np.isfinite(values).sum() > 500
