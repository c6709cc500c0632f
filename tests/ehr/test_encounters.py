"""Encounters: sets with days, known only when ended; batches like singles; labels that say when they cannot be known."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmjepa.ehr.encounter_batches import EncounterHistories
from mmjepa.ehr.encounter_labels import encounter_labels, escalations
from mmjepa.ehr.encounters import EMPTY, FIRST, PAD, UNKNOWN, Encounter, EncounterForm, EncountersConfig, read_code
from mmjepa.ehr.stays import NEVER
from mmjepa.refusal import Refusal

HOUR_US = 3_600_000_000
DAY = 24.0


def stay(subject, start, stop, codes=(), drugs=(), discharge="HOME", hadm=-1):
    """Rows of a hospital stay from day ``start`` to day ``stop``."""
    rows = [(subject, start * DAY, "HOSPITAL_ADMISSION//ER")]
    rows += [(subject, start * DAY + 1, f"MEDICATION//START//{drug}") for drug in drugs]
    rows += [(subject, stop * DAY, f"DIAGNOSIS//ICD//{'10' if code[0].isalpha() else '9'}//{code}") for code in codes]
    rows += [(subject, stop * DAY, f"HOSPITAL_DISCHARGE//{discharge}")]
    return [(*row, np.nan, row[1], hadm) for row in rows]


def form_of(store, **config):
    return EncounterForm.fit(store, store.subjects, EncountersConfig(**config))


def labels_of(make_store, rows, **arguments):
    store = make_store(rows)
    return encounter_labels(form_of(store), store, 1, **arguments)


@pytest.mark.parametrize(
    ("code", "read"),
    [
        ("DIAGNOSIS//ICD//10//E785", ("E78.5", "E78.5", 10)),
        ("DIAGNOSIS//ICD//10//I10", ("I10", "I10", 10)),
        ("DIAGNOSIS//ICD//10//F3210", ("F32", "F32.10", 10)),
        ("ICD10CM/F33.1", ("F33", "F33.1", 10)),
        ("DIAGNOSIS//ICD//9//4019", ("4019", "4019", 9)),
        ("DIAGNOSIS//ICD//9//V5861", ("V5861", "V5861", 9)),
        ("DIAGNOSIS//LUNG_CANCER", ("DIAGNOSIS//LUNG_CANCER", "DIAGNOSIS//LUNG_CANCER", 0)),
        ("SNOMED/59621000", ("SNOMED/59621000", "SNOMED/59621000", 0)),
    ],
)
def test_icd10_is_dotted_its_f_codes_cut_and_others_stay(code, read):
    assert read_code(code) == read


def test_an_encounter_is_a_set_of_codes_and_lower_case_drugs_with_its_day(make_store):
    rows = [*stay(1, 10, 12, ["I10", "F321"], ["Heparin", "heparin"]), *stay(1, 40.5, 41, ["4019"])]
    first, second = form_of(store := make_store(rows)).of(store, 1)
    assert (first.day, first.codes, first.full, first.drugs) == (0, ("F32", "I10"), ("F32.1", "I10"), ("heparin",))
    assert (second.day, second.codes, second.icd9, second.icd10) == (30.5, ("4019",), True, False)


def test_rows_go_by_the_admission_number_where_there_is_one_else_by_time(make_store):
    late = (1, 30 * DAY, "DIAGNOSIS//ICD//10//C50", np.nan, 30 * DAY, 7)
    rows = [*stay(1, 0, 1, ["I10"], hadm=7), late, *stay(1, 10, 11, ["J18"], hadm=8)]
    store = make_store(rows)
    assert [visit.codes for visit in form_of(store).of(store, 1)] == [("C50", "I10"), ("J18",)]
    store = make_store([(*row[:5], -1) for row in rows])
    assert [visit.codes for visit in form_of(store).of(store, 1)] == [("I10",), ("J18",)]


def test_diagnoses_stamped_at_a_discharge_that_is_the_next_admission_belong_to_the_ended_stay(make_store):
    store = make_store([*stay(1, 0, 3, ["I10"]), *stay(1, 3, 5, ["J18"])])
    assert [visit.codes for visit in form_of(store).of(store, 1)] == [("I10",), ("J18",)]


def test_an_encounter_is_known_only_when_it_has_ended(make_store):
    store = make_store([*stay(1, 0, 3, ["I10"]), *stay(1, 10, 12, ["J18"])])
    form = form_of(store)
    assert [len(form.of(store, 1, int(hour * HOUR_US))) for hour in (71.9, 72, 11 * DAY, 12 * DAY)] == [0, 1, 1, 2]
    planned = [(*row[:4], 0.0, -1) for row in stay(1, 0, 3)]
    assert form.of(make_store(planned), 1, 5 * HOUR_US) == []


def test_stays_without_end_and_those_that_ended_in_death_are_no_encounters(make_store):
    rows = [*stay(1, 0, 1), (1, 5 * DAY, "HOSPITAL_ADMISSION//ER"), *stay(1, 9, 10), *stay(1, 20, 21, discharge="DIED")]
    rows += [*stay(2, 0, 1), *stay(2, 5, 6), (2, 6 * DAY, "MEDS_DEATH")]
    store = make_store(rows)
    form = form_of(store)
    assert [visit.day for visit in form.of(store, 1)] == [0, 9]
    assert [visit.day for visit in form.of(store, 2)] == [0]
    assert len(form.admissions(store, 1)) == 4


def test_drugs_at_admission_are_those_running_then(make_store):
    rows = [*stay(1, 10, 12), *stay(1, 20, 22)]
    starts = {"Before": (8.5, 11), "Ended": (8, 9.5), "Inside": (10.5, 11), "Both": (9.9, 30)}
    for drug, (start, stop) in starts.items():
        rows += [(1, start * DAY, f"MEDICATION//START//{drug}"), (1, stop * DAY, f"MEDICATION//STOP//{drug}")]
    rows += [(1, 9.5 * DAY, "MEDICATION//START//Open"), (1, 8 * DAY, "MEDICATION//START//Old")]
    store = make_store(rows)
    assert form_of(store, drugs_when="admission").of(store, 1)[0].drugs == ("before", "both", "open")
    assert form_of(store).of(store, 1)[0].drugs == ("inside",)


def test_drugs_are_read_from_families_with_and_without_a_word_for_their_start(make_store):
    codes = ["MEDICATION//SUPPORT", "MEDICATION//START//Senna", "MEDICATION//STARTED//Heparin//IV", "RxNorm/197805"]
    silent = [
        "MEDICATION//Insulin//Not Given",
        "MEDICATION//STOP//Zinc",
        "MEDICATION//STOPPED//Iron",
        "MEDICATION//UNK",
    ]
    rows = [*stay(1, 0, 2), *((1, 5.0, code) for code in [*codes, *silent])]
    (visit,) = form_of(store := make_store(rows)).of(store, 1)
    assert visit.drugs == ("197805", "heparin", "senna", "support")


def test_the_first_encounters_are_kept_and_nobody_is_left_out_for_having_more(make_store):
    store = make_store([row for i in range(25) for row in stay(1, 10 * i, 10 * i + 1)])
    visits = form_of(store).of(store, 1)
    assert [visit.day for visit in visits] == [10.0 * i for i in range(20)]
    assert len(EncounterHistories(form_of(store), store, [1]).samples) == 18


def test_the_vocabulary_is_sorted_and_knows_training_subjects_alone(make_store):
    store = make_store([*stay(1, 0, 1, ["J18", "I10"], ["Zinc"]), *stay(2, 0, 1, ["I10", "C50"])])
    form = EncounterForm.fit(store, [1])
    assert form.vocabulary == ("I10", "J18", "zinc")
    assert form.coverage == {"encounters": 1, "with_diagnosis": 1, "with_drug": 1}
    (visit,) = form.of(store, 2)
    assert form.encode(visit).tolist() == [UNKNOWN, FIRST]


def test_an_empty_encounter_is_a_token_of_its_own_and_never_padding(make_store):
    store = make_store([*stay(1, 0, 1, ["I10"]), *stay(1, 5, 6), *stay(1, 9, 10, ["I10", "J18"])])
    batch = EncounterHistories(form_of(store), store, [1]).batch(np.array([[0, 2]]))
    assert batch.codes.tolist() == [[[FIRST], [EMPTY]]]
    assert ((batch.codes != PAD).any(-1) == batch.present).all()


@pytest.fixture(scope="module")
def cohort(make_store):
    rows = []
    for subject, n in ((1, 3), (2, 6), (3, 2), (4, 4)):
        for i in range(n):
            codes = ["I10", f"J{subject}{i}", f"K{i}0"][: (subject + i) % 4]
            rows += stay(subject, 7 * subject * i + i * i, 7 * subject * i + i * i + 2, codes)
    return make_store(rows)


def test_samples_are_all_prefixes_of_two_and_more_with_a_next_encounter(cohort):
    found = EncounterHistories(form_of(cohort), cohort, cohort.subjects).samples.tolist()
    assert found == [[0, 2], [1, 2], [1, 3], [1, 4], [1, 5], [3, 2], [3, 3]]


def test_a_batch_of_mixed_lengths_is_its_singles_and_gaps_are_those_of_each_row(cohort):
    form = form_of(cohort)
    histories = EncounterHistories(form, cohort, cohort.subjects)
    batch = histories.batch(histories.samples)
    for row, (i, p) in enumerate(histories.samples.tolist()):
        single = histories.batch(np.array([[i, p]]))
        c, t = single.codes.shape[1:]
        assert (batch.codes[row, :c, :t] == single.codes[0]).all()
        assert not batch.codes[row, c:].any()
        assert (batch.days[row, :c] == single.days[0]).all()
        assert not batch.days[row, c:].any()
        assert batch.present[row].sum() == p == batch.context[row]
        visits = form.of(cohort, int(batch.subjects[row]))
        assert batch.gap_days[row] == single.gap_days[0] == visits[p].day - visits[p - 1].day
        assert batch.target_day[row] == visits[p].day
        target = batch.target_codes[row]
        assert target[target != PAD].tolist() == form.encode(visits[p]).tolist()


def test_one_sample_a_subject_by_seed_epoch_and_subject_alone(cohort):
    histories = EncounterHistories(form_of(cohort), cohort, cohort.subjects)
    drawn = [histories.one_each(epoch) for epoch in range(60)]
    assert all(each[:, 0].tolist() == [0, 1, 3] for each in drawn)
    assert {int(each[1, 1]) for each in drawn} == {2, 3, 4, 5}
    assert all((each[:, 1] < histories.lengths[each[:, 0]]).all() for each in drawn)
    some = EncounterHistories(form_of(cohort), cohort, [2, 4])
    assert all(some.one_each(epoch)[:, 1].tolist() == drawn[epoch][1:, 1].tolist() for epoch in range(60))


def test_a_target_beyond_the_history_is_refused(cohort):
    with pytest.raises(ValueError, match="target"):
        EncounterHistories(form_of(cohort), cohort, [1]).batch(np.array([[0, 3]]))


def test_a_diagnosis_coded_after_the_targets_admission_is_not_in_its_context(make_store):
    late = (1, 32 * DAY, "DIAGNOSIS//ICD//10//F329", np.nan, 232 * DAY, -1)
    rows = [*stay(1, 0, 2, ["I10"]), *stay(1, 30, 32), late, *stay(1, 60, 62, ["I10"]), *stay(1, 300, 301)]
    store = make_store(rows)
    histories = EncounterHistories(form_of(store), store, [1])
    batch = histories.batch(histories.samples)
    i10, f32 = FIRST + 1, FIRST
    assert histories.samples.tolist() == [[0, 2], [0, 3]]
    assert batch.codes.tolist() == [[[i10], [EMPTY], [PAD]], [[i10], [f32], [i10]]]
    assert batch.target_codes.tolist() == [[i10], [EMPTY]]


def test_an_encounter_whose_discharge_is_on_record_too_late_is_not_in_the_context(make_store):
    held = [(*row[:4], 70 * DAY if "DISCHARGE" in row[2] else row[4], -1) for row in stay(1, 30, 32, ["J18"])]
    rows = [*stay(1, 0, 2, ["I10"]), *stay(1, 20, 21, ["I10"]), *held, *stay(1, 60, 62), *stay(1, 80, 81)]
    store = make_store(rows)
    histories = EncounterHistories(form_of(store), store, [1])
    batch = histories.batch(np.array([[0, 3], [0, 4]]))
    assert batch.context.tolist() == [3, 4]
    assert batch.present.sum(1).tolist() == [2, 4]
    assert batch.gap_days.tolist() == [40, 20]
    assert [0, 3] in histories.samples.tolist()
    late = [(*row[:4], 70 * DAY, -1) for row in stay(2, 0, 2)]
    store = make_store([*late, *stay(2, 20, 21), *stay(2, 60, 61), *stay(2, 80, 81)])
    histories = EncounterHistories(form_of(store), store, [2])
    assert histories.samples.tolist() == [[0, 3]]
    assert histories.one_each(0).tolist() == [[0, 3]]
    with pytest.raises(ValueError, match="context"):
        histories.batch(np.array([[0, 1]]))


@example(
    gaps=[(1, 1)] * 3, rows=[("DIAGNOSIS//ICD//10//I10", 1, 0, 2)], held={}, when="stay"
)  # numbered before its stay
@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=2, max_size=6),
    rows=st.lists(
        st.tuples(
            st.sampled_from(["DIAGNOSIS//ICD//10//I10", "DIAGNOSIS//ICD//10//F20", "MEDICATION//START//A"]),
            st.integers(0, 80),
            st.integers(-5, 60),
            st.integers(-1, 5),
        ),
        max_size=8,
    ),
    held=st.dictionaries(st.integers(0, 11), st.integers(1, 40), max_size=2),
    when=st.sampled_from(["stay", "admission"]),
)
def test_every_context_is_the_record_as_known_when_its_target_was_admitted(make_store, gaps, rows, held, when):
    day, marks = 0, []
    for number, (gap, length) in enumerate(gaps):
        marks += [(1, (day + gap) * DAY, "HOSPITAL_ADMISSION//ER", np.nan, number)]
        day += gap + length
        marks += [(1, day * DAY, "HOSPITAL_DISCHARGE//HOME", np.nan, number)]
    made = [(*row[:4], row[1] + held.get(place, 0) * DAY, row[4]) for place, row in enumerate(marks)]
    made += [(1, at * DAY, code, np.nan, (at + delay) * DAY, hadm) for code, at, delay, hadm in rows]
    made += [(2, 0.0, "HOSPITAL_ADMISSION//ER"), (2, DAY, "HOSPITAL_DISCHARGE//HOME")]
    store = make_store(made)
    form = form_of(store, drugs_when=when)
    histories, whole = EncounterHistories(form, store, [1]), form.of(store, 1)
    for p in range(1, len(whole)):
        seen = form.of(store, 1, whole[p].admit_us)
        assert ([0, p] in histories.samples.tolist()) == (len(seen) >= 2 and p >= 2)
        if seen:
            batch = histories.batch(np.array([[0, p]]))
            found = [row[row != PAD].tolist() for row in batch.codes[0].numpy()]
            assert found == [form.encode(visit).tolist() for visit in seen]


visits = st.lists(
    st.tuples(st.integers(1, 50), st.integers(1, 9), st.lists(st.sampled_from(["I10", "F321", "4019"]), max_size=3)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(visits, visits)
def test_the_first_p_encounters_do_not_depend_on_what_follows(make_store, past, future):
    rows, day, ends = [], 0, []
    for gap, length, codes in past + future:
        rows.append(stay(1, day + gap, day + gap + length, codes))
        day += gap + length
        ends.append(day)
    store = make_store([row for each in rows for row in each])
    form = form_of(store)
    whole = form.of(store, 1)
    for p, end in enumerate(ends, 1):
        assert form.of(store, 1, int(end * DAY * HOUR_US)) == whole[:p]
    alone = make_store([row for each in rows[: len(past)] for row in each])
    assert form_of(alone).of(alone, 1) == whole[: len(past)]
    assert all(a.discharge_us < b.admit_us for a, b in pairwise(whole))


def test_readmission_reads_30_days_from_the_discharge_and_needs_an_f_code(make_store):
    rows = [*stay(1, 0, 5, ["I10"]), *stay(1, 35, 36, ["F321"]), *stay(1, 50, 51, ["I10"]), *stay(1, 82, 83, ["F321"])]
    found = labels_of(make_store, rows, followed_until_us=int(200 * DAY * HOUR_US))
    assert found.label_30d.tolist() == [1, 0, 0, 0]


def test_the_last_encounter_is_unknown_unless_followed_for_30_days_or_dead(make_store):
    rows = [*stay(1, 0, 5), *stay(1, 100, 101)]
    assert np.isnan(labels_of(make_store, rows).label_30d).tolist() == [False, True]
    for days in (130.9, 131):
        found = labels_of(make_store, rows, followed_until_us=int(days * DAY * HOUR_US))
        assert np.isnan(found.label_30d[1]) == (days < 131)
    assert labels_of(make_store, [*rows, (1, 110 * DAY, "MEDS_DEATH")]).label_30d.tolist() == [0, 0]


def test_a_readmission_that_ends_in_death_or_behind_the_last_encounter_kept_counts(make_store):
    rows = [*stay(1, 0, 5), *stay(1, 10, 12, ["F20"], discharge="DIED")]
    assert labels_of(make_store, rows).label_30d.tolist() == [1]
    store = make_store([*stay(1, 0, 5), *stay(1, 10, 12, ["F20"])])
    found = encounter_labels(form_of(store, max_encounters=1), store, 1)
    assert found.label_30d.tolist() == [1]
    assert found.next_icd_blocks == [("F",)]


def test_years_coded_in_icd9_are_unknown_and_never_negative(make_store):
    rows = [
        *stay(1, 0, 1, ["4019"]),
        *stay(1, 10, 11, ["29620"]),
        *stay(1, 20, 21, ["F321"]),
        *stay(1, 90, 91, ["F322"]),
    ]
    found = labels_of(make_store, rows)
    assert np.isnan(found.label_30d).tolist() == [False, False, False, True]
    long = int(200 * DAY * HOUR_US)
    assert np.isnan(labels_of(make_store, rows[:7], followed_until_us=long).label_30d).all()
    assert np.isnan(found.escalation).all()
    assert found.next_icd_blocks == [None, ("F",), ("F",), None]


def test_both_readmission_tasks_are_named_and_one_reads_a_step_further(make_store):
    rows = [*stay(1, 0, 1), *stay(1, 10, 11), *stay(1, 20, 21, ["J18"]), *stay(1, 30, 31, ["F20"])]
    found = labels_of(make_store, rows)
    assert found.label_30d[:3].tolist() == [1, 1, 1]
    rows = [*stay(1, 0, 1), *stay(1, 10, 11), *stay(1, 60, 61, ["J18"]), *stay(1, 70, 71, ["F20"])]
    at = labels_of(make_store, rows).at(2)
    assert (at["readmission_30d"], at["label_30d"], at["next_icd_blocks"]) == (0, 1, ("J",))


def visit_of(codes=(), drugs=()):
    return Encounter(0, 1, 0.0, (), tuple(codes), True, False, tuple(drugs), True)


@pytest.mark.parametrize(
    ("before", "now", "signs"),
    [
        (["I10"], ["F32.1"], {"new_subcategory"}),
        (["F32.1"], ["F33.1"], {"f32_to_f33"}),
        (["F32.0"], ["F32.2"], {"severity"}),
        (["F32.2"], ["F32.0"], set()),
        (["F32.1"], ["F32.1"], set()),
        (["F32.1"], ["F32.9"], set()),
        (["F32.1"], ["F32.4"], set()),
        (["F33.1"], ["F33.41"], set()),
        (["F10.20"], ["F10.231"], {"new_specifier"}),
        (["F10.231"], ["F10.20"], set()),
        (["F31.11"], ["F31.64"], {"severity"}),
    ],
)
def test_what_escalates_and_what_does_not(before, now, signs):
    assert escalations([visit_of(before), visit_of(now)]) == [set(), signs]


def test_psychiatric_drugs_escalate_by_class(make_store):
    drugs = [["Aspirin"], ["sertraline"], ["escitalopram oxalate"], ["quetiapine fumarate"]]
    found = escalations([visit_of(drugs=[name.lower() for name in names]) for names in drugs])
    assert found == [set(), {"first_drug"}, set(), {"new_drug_class"}]


def test_a_saved_form_is_the_same_and_another_is_refused(cohort, tmp_path):
    form = EncounterForm.fit(cohort, [1, 2], EncountersConfig(drugs_when="admission"))
    form.save(tmp_path / "form.json")
    again = EncounterForm.load(tmp_path / "form.json", expected=form.hash)
    assert (again.config, again.vocabulary, again.coverage) == (form.config, form.vocabulary, form.coverage)
    assert form.hash != EncounterForm.fit(cohort, [1], EncountersConfig(drugs_when="admission")).hash
    content = json.loads((tmp_path / "form.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(content | {"vocabulary": content["vocabulary"][::-1]}))
    with pytest.raises(Refusal, match="FORM_HASH"):
        EncounterForm.load(tmp_path / "other.json")


def test_a_cohort_without_hospital_stays_is_refused(make_store):
    store = make_store([(1, 0.0, "LAB//A", 1.0)])
    with pytest.raises(Refusal, match="ENCOUNTERS_EMPTY"):
        form_of(store)


@pytest.mark.real_data
def test_the_mimic_demo_gives_its_275_stays_of_which_15_ended_in_death(data_folder):
    from mmjepa.cohort import Cohort

    store = Cohort.open(data_folder / "mimic_iv_demo_meds").events()
    form = form_of(store)
    stays = [visit for subject in store.subjects for visit in form.admissions(store, int(subject))]
    assert (len(stays), sum(not visit.alive for visit in stays)) == (275, 15)
    assert all(visit.discharge_us < NEVER for visit in stays)
    assert form.coverage == {"encounters": 260, "with_diagnosis": 260, "with_drug": 236}
