"""Rendered records."""

from dataclasses import replace
from itertools import pairwise

import meds
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthetic import concepts, events, tables
from synthetic.catalogue import catalogue
from synthetic.coding import Vocabulary
from synthetic.draws import normals, uniforms
from synthetic.presets import find_site
from synthetic.world import World

NAMES = World.named("li2025", 0).loaded("ehr")
AT = {name: j for j, name in enumerate(NAMES)}
CATALOGUE = catalogue(0, NAMES)
SITE = find_site("li2025", "internal")
VOCABULARY = Vocabulary(CATALOGUE, SITE)
N = 200
T = normals(0, "t", 0, N, len(NAMES))
INDEX_S = events.index_time_s(uniforms(0, "u", 0, N, 2))
NONE = np.zeros(concepts.N, bool)
COLUMNS = ("time", "code", "value", "available", "visit")
US_DAY = events.DAY * events.SECOND_US


def history(i, t=None, vocabulary=VOCABULARY, known=NONE, seen=True):
    t = T[i % N] if t is None else t
    return events.history(t, NAMES, vocabulary, int(INDEX_S[i % N]), 0, i, concepts=known, seen=seen)


def at_site(**knobs):
    return Vocabulary(CATALOGUE, replace(SITE, **knobs))


def codes(rows, vocabulary=VOCABULARY):
    return np.array(vocabulary.codes)[rows.code]


def family(rows, vocabulary=VOCABULARY):
    return np.array([code.split("//")[0] for code in codes(rows, vocabulary)])


def times(rows, code):
    return rows.time[rows.code == VOCABULARY.at[code]]


def same(a, b):
    return all(getattr(a, c).tobytes() == getattr(b, c).tobytes() for c in COLUMNS)


READOUTS = st.lists(st.floats(-5, 5), min_size=len(NAMES), max_size=len(NAMES)).map(np.array)


@settings(max_examples=60, deadline=None)
@given(
    t=READOUTS,
    subject=st.integers(0, 10**6),
    index_s=st.integers(1_325_376_000, 1_577_836_800),
    known=st.lists(st.booleans(), min_size=64, max_size=64),
    delay=st.sampled_from([0, 0, 30, 365]),
    share=st.sampled_from([0.0, 0.4, 1.0]),
)
def test_any_record_keeps_the_order_of_a_life(t, subject, index_s, known, delay, share):
    v = at_site(coding_delay_days=delay, vocabulary_split=share, vocabulary_merge=share, lab_unit=share)
    rows = events.history(t, NAMES, v, index_s, 3, subject, concepts=np.array(known), seen=True)
    timed = rows.time != events.NO_TIME
    assert not timed[: (~timed).sum()].any()
    assert (np.diff(rows.time[timed]) >= 0).all()
    assert (rows.available >= rows.time).all()
    birth, index = (rows.time[rows.code == v.at[code]] for code in ("MEDS_BIRTH", "CT//CHEST"))
    assert len(birth) == len(index) == 1
    assert birth[0] == rows.time[timed][0]
    assert index[0] == index_s * events.SECOND_US
    assert 40 - 0.01 <= (index[0] - birth[0]) / US_DAY / 365.25 <= 90.01
    starts = rows.time[rows.code == v.at["HOSPITAL_ADMISSION//VISIT"]]
    stops = rows.time[rows.code == v.at["HOSPITAL_DISCHARGE//HOME"]]
    assert (stops - starts >= events.HOUR * events.SECOND_US).all()
    assert (stops - starts <= 6 * US_DAY).all()
    assert (starts[1:] > stops[:-1]).all()
    assert (starts >= index[0] - 5 * 365.25 * US_DAY).all()
    late = rows.available > index[0]
    assert delay or not late.any()
    assert (family(rows, v)[late] == "DIAGNOSIS").all()
    visited = rows.visit != events.NO_VISIT
    inside = (rows.time >= starts[rows.visit % max(len(starts), 1)]) if len(starts) else visited
    assert inside[visited].all()
    meds.DataSchema.validate(tables.record(rows, 7, 7000, v.codes, {int(index[0]): "a"}))


def test_visits_are_poisson_uniform_over_five_years_and_an_hour_to_six_days_long():
    # 6 e^(.15 s2): the mean at s2 = 0, and its growth
    for s2 in (0.0, 4.0):
        t = np.where(np.array(NAMES) == "s2", s2, 0.0)
        every = [history(i, t) for i in range(600)]
        n = np.array([len(times(rows, "HOSPITAL_ADMISSION//VISIT")) for rows in every])
        mean = 6 * np.exp(0.15 * s2)
        assert n.mean() == pytest.approx(mean, abs=4 * np.sqrt(mean / 600))
        assert n.var() == pytest.approx(mean, rel=0.25)
    ahead = np.concatenate(
        [INDEX_S[i % N] * events.SECOND_US - times(r, "HOSPITAL_ADMISSION//VISIT") for i, r in enumerate(every)]
    )
    long = np.concatenate([times(r, "HOSPITAL_DISCHARGE//HOME") - times(r, "HOSPITAL_ADMISSION//VISIT") for r in every])
    assert 7 <= ahead.min() / US_DAY < 8
    assert np.histogram(ahead / US_DAY, 5, (0, 5 * 365.25))[0] == pytest.approx(len(ahead) / 5, rel=0.1)
    assert np.histogram(long / US_DAY, 6, (0, 6))[0] == pytest.approx(len(long) / 6, rel=0.1)


def test_results_take_1_to_12_hours_diagnoses_wait_for_the_discharge_and_the_rest_is_known_at_once():
    rows = events.Rows.joined([history(i) for i in range(60)])
    kind, delay_h = family(rows), (rows.available - rows.time) / events.SECOND_US / events.HOUR
    assert delay_h[kind == "LAB"].min() >= 1
    assert delay_h[kind == "LAB"].max() <= 12
    assert np.ptp(delay_h[kind == "LAB"]) > 10
    assert (delay_h[~np.isin(kind, ["LAB", "DIAGNOSIS"])] == 0).all()
    for rows in map(history, range(60)):
        diagnosis = family(rows) == "DIAGNOSIS"
        stops = times(rows, "HOSPITAL_DISCHARGE//HOME")
        assert (rows.available[diagnosis] == stops[rows.visit[diagnosis]]).all()


def test_age_sex_smoking_and_earlier_cancer_are_read_from_the_readout():
    facts = events.background(T, NAMES)
    for i in range(60):
        rows, said = history(i), set(codes(history(i)))
        age = (INDEX_S[i] * events.SECOND_US - times(rows, "MEDS_BIRTH")[0]) / US_DAY / 365.25
        assert age == pytest.approx(np.clip(62 + 9 * T[i, AT["b1"]], 40, 90), abs=0.01)
        assert facts["age_years"][i] == pytest.approx(age, abs=0.01)
        assert ("GENDER//F" in said, "GENDER//M" in said) == (T[i, AT["b2"]] > 0, T[i, AT["b2"]] <= 0)
        assert ("SMOKING//EVER" in said, "SMOKING//NEVER" in said) == (facts["smoker"][i], not facts["smoker"][i])
        assert ("HISTORY//CANCER" in said) == facts["cancer"][i]
        assert (rows.time[np.isin(family(rows), ["GENDER", "SMOKING", "HISTORY", "SITE"])] == events.NO_TIME).all()
    many = events.background(normals(1, "t", 0, 20_000, len(NAMES)), NAMES)
    assert many["smoker"].mean() == pytest.approx(0.66, abs=0.02)
    assert many["cancer"].mean() == pytest.approx(0.10, abs=0.01)


def counted(known):
    """Codes seen, [400], and expected by the formula, with the variance, of the first N subjects."""
    seen, expected, variance = (np.zeros(400) for _ in range(3))
    for i in range(N):
        rows = history(i, known=known[i])
        seen += np.bincount(rows.code, minlength=len(VOCABULARY.codes))[VOCABULARY.at[CATALOGUE.codes[0]] :][:400]
        rate = CATALOGUE.rate + CATALOGUE.loading @ T[i]
        rate[CATALOGUE.concept] += 3 * known[i][concepts.IN_EHR]
        chance = 1 - np.exp(-np.exp(rate))
        visits = len(times(rows, "HOSPITAL_ADMISSION//VISIT"))
        expected += visits * chance
        variance += visits * chance * (1 - chance)
    return seen, expected, variance


def test_codes_come_at_the_rate_of_the_formula_and_a_concept_raises_its_own_by_e_cubed():
    known = uniforms(0, "known", 0, N, concepts.N) < 0.3
    seen, expected, variance = counted(known)
    z = (seen - expected) / np.sqrt(variance)
    assert np.abs(z).max() < 4.5
    assert z.std() == pytest.approx(1, abs=0.12)
    # and without the formula: twenty times the rate at a readout of 0, where every concept's code is rare
    t, at = np.zeros(len(NAMES)), np.isin(np.arange(400), CATALOGUE.concept)
    every = [np.concatenate([history(i, t, known=np.full(64, k)).code for i in range(300)]) for k in (False, True)]
    visits = (every[0] == VOCABULARY.at["HOSPITAL_ADMISSION//VISIT"]).sum()
    first = VOCABULARY.at[CATALOGUE.codes[0]]
    without, with_ = (np.bincount(code, minlength=first + 400)[first : first + 400] for code in every)
    assert np.log1p(-with_[at] / visits).sum() / np.log1p(-without[at] / visits).sum() == pytest.approx(
        np.e**3, rel=0.1
    )
    assert (with_[~at] == without[~at]).all()


def test_concepts_that_images_alone_show_leave_no_trace():
    only_image = NONE.copy()
    only_image[concepts.IMAGE_ONLY] = True
    assert all(same(history(i), history(i, known=only_image)) for i in range(20))


def test_the_care_pathway_shows_in_referral_and_protocol_codes_alone_some_more_some_less_often():
    up = [CATALOGUE.codes[j] for j in np.flatnonzero(CATALOGUE.loading[:, -1] > 0)]
    rest, hits = [], []
    for value in (-2.0, 2.0):
        every = [history(i, np.where(np.array(NAMES) == "c1", value, T[i])) for i in range(60)]
        kind = [np.isin(family(rows), ["REFERRAL", "PROTOCOL"]) for rows in every]
        more = sum(np.isin(codes(rows), up).sum() for rows in every)
        hits.append((more, sum(k.sum() for k in kind) - more))
        others = [(rows.code[~k], np.nan_to_num(rows.value[~k], nan=-1)) for rows, k in zip(every, kind, strict=True)]
        rest.append([sorted(zip(*columns, strict=True)) for columns in others])
    assert rest[0] == rest[1]
    assert hits[1][0] > 10 * hits[0][0]
    assert hits[0][1] > 10 * hits[1][1]
    # the size of the record does not tell which way
    assert sum(hits[1]) == pytest.approx(sum(hits[0]), rel=0.1)


def estimate(rows):
    """The readout that explains a record best, and the sd of its error by the curvature there: exact likelihood, prior N(0, I)."""
    c, first = CATALOGUE, VOCABULARY.at[CATALOGUE.codes[0]]
    keep = ~np.isin(np.arange(400), c.concept)
    seen = np.bincount(rows.code, minlength=first + 420)[first : first + 400][keep]
    rate, loading = c.rate[keep], c.loading[keep]
    lab = np.flatnonzero(~np.isnan(rows.value))
    j = rows.code[lab] - first - 400
    z, Q = (rows.value[lab] - c.lab_mean[j]) / c.lab_sd[j], c.lab_loading[j]
    visits, t = rows.visit.max() + 1, np.zeros(len(NAMES))
    for _ in range(40):
        lam = np.exp(rate + loading @ t)
        odds = lam * np.exp(-lam) / -np.expm1(-lam)
        often = 6 * np.exp(0.15 * t[AT["s2"]])
        gradient = loading.T @ (seen * odds - (visits - seen) * lam) + Q.T @ (z - Q @ t) / 0.25 - t
        gradient[AT["s2"]] += 0.15 * (visits - often)
        curvature = (loading.T * (visits * lam * odds)) @ loading + Q.T @ Q / 0.25 + np.eye(len(t))
        curvature[AT["s2"], AT["s2"]] += 0.0225 * often
        t = t + np.clip(np.linalg.solve(curvature, gradient), -1, 1)
    return t, np.sqrt(np.diag(np.linalg.inv(curvature)))


def test_a_reader_who_knows_the_law_gets_the_readout_back_as_precisely_as_the_law_says():
    found, sd = (np.array(part) for part in zip(*(estimate(history(i)) for i in range(N)), strict=True))
    error = found - T
    assert (error.std(0) < 0.5).all()
    assert (error / sd).std() == pytest.approx(1, abs=0.05)
    assert np.abs((error / sd).mean(0)).max() < 4 / np.sqrt(N)


def test_without_a_record_only_the_site_and_the_index_ct_are_left_whatever_the_readout():
    for i in range(20):
        rows = history(i, seen=False)
        assert codes(rows).tolist() == ["SITE//internal", "CT//CHEST"]
        assert same(rows, history(i, T[i] + 1, known=~NONE, seen=False))


def test_a_split_vocabulary_changes_the_codes_of_events_alone_and_more_so_over_the_years():
    v, new, old = at_site(vocabulary_split=1.0), [], []
    for i in range(N):
        plain, rows = history(i), history(i, vocabulary=v)
        assert [code.removesuffix("//NEW") for code in codes(rows, v)] == codes(plain).tolist()
        assert same(replace(rows, code=plain.code), plain)
        hit = np.char.endswith(codes(rows, v), "//NEW")
        event = np.isin(family(plain), [*{code.split("//")[0] for code in CATALOGUE.codes}])
        assert not hit[~event].any()
        new += rows.time[hit].tolist()
        old += rows.time[event & ~hit].tolist()
    early, late = (np.datetime64(year, "us").astype(np.int64) for year in ("2009", "2018"))
    new, old = np.array(new), np.array(old)
    assert (new > late).sum() / ((new > late).sum() + (old > late).sum()) == pytest.approx(0.5, abs=0.05)
    assert (new < early).sum() < 0.15 * ((new < early).sum() + (old < early).sum())


def test_a_merged_vocabulary_changes_the_codes_of_events_alone():
    v = at_site(vocabulary_merge=1.0)
    kept = set()
    for i in range(60):
        plain, rows = history(i), history(i, vocabulary=v)
        assert same(replace(rows, code=plain.code), plain)
        assert family(rows, v).tolist() == family(plain).tolist()
        kept |= set(codes(rows, v)) & set(CATALOGUE.codes)
    assert len(kept) <= 200


def test_another_unit_scales_a_lab_and_renames_it_and_touches_nothing_else():
    v = at_site(lab_unit=0.5)
    for i in range(40):
        plain, rows = history(i), history(i, vocabulary=v)
        assert same(replace(rows, code=plain.code, value=plain.value), plain)
        for before, after, x, y in zip(codes(plain), codes(rows, v), plain.value, rows.value, strict=True):
            if before == after:
                assert x == y or np.isnan([x, y]).all()
            else:
                j = CATALOGUE.labs.index(before)
                assert after == CATALOGUE.other_labs[j]
                assert y == pytest.approx(x * CATALOGUE.lab_factor[j], abs=0.0006 * (1 + CATALOGUE.lab_factor[j]))


@pytest.mark.parametrize("delay", [14, 200])
def test_a_coding_delay_moves_diagnoses_past_their_discharge_some_past_the_index_and_nothing_else(delay):
    v, late, met = at_site(coding_delay_days=delay), 0, 0
    for i in range(60):
        plain, rows = history(i), history(i, vocabulary=v)
        was, now = family(plain) == "DIAGNOSIS", family(rows, v) == "DIAGNOSIS"
        for c in COLUMNS:
            assert getattr(plain, c)[~was].tobytes() == getattr(rows, c)[~now].tobytes()
        assert sorted(zip(plain.code[was], plain.visit[was], strict=True)) == sorted(
            zip(rows.code[now], rows.visit[now], strict=True)
        )
        starts, stops = times(rows, "HOSPITAL_ADMISSION//VISIT"), times(rows, "HOSPITAL_DISCHARGE//HOME")
        due, time = stops[rows.visit[now]] + delay * US_DAY, rows.time[now]
        waits = ((starts <= due[:, None]) & (due[:, None] <= stops)).any(1)
        assert (time[~waits] == due[~waits]).all()
        assert ((time[waits] > due[waits]) & (time[waits] <= due[waits] + 6 * US_DAY + US_DAY / 24)).all()
        assert not ((starts <= time[:, None]) & (time[:, None] <= stops)).any()
        assert (rows.available[now] == time).all()
        met += waits.sum()
        late += (rows.time > INDEX_S[i] * events.SECOND_US).sum()
    assert late > 0
    assert met > 0


def test_records_are_the_same_bytes_again_and_differ_between_subjects_and_seeds():
    assert same(history(5), history(5))
    assert not same(history(5, T[0]), history(6, T[0]))
    a, b = (
        events.history(T[0], NAMES, VOCABULARY, int(INDEX_S[0]), seed, 0, concepts=NONE, seen=True) for seed in (0, 1)
    )
    assert not same(a, b)


def test_the_cancer_code_stands_on_the_day_of_the_diagnosis_if_and_only_if_there_is_one():
    assert len(events.outcome(False, VOCABULARY, 0, diagnosis_days=50.0).time) == 0
    rows = events.outcome(True, VOCABULARY, 1000, diagnosis_days=50.5)
    assert codes(rows).tolist() == ["DIAGNOSIS//LUNG_CANCER"]
    assert rows.time[0] == rows.available[0] == 1000 * events.SECOND_US + 50.5 * US_DAY


def test_index_cts_are_taken_by_day_from_2012_to_2019():
    when = events.index_time_s(uniforms(0, "u", 0, 5000, 2))
    hour = when % events.DAY / events.HOUR
    assert hour.min() >= 7
    assert hour.max() <= 18
    years = when.astype("datetime64[s]").astype("datetime64[Y]").astype(int) + 1970
    assert (years.min(), years.max()) == (2012, 2019)
    assert all(b > a - 150 for a, b in pairwise(np.bincount(years)[2012:]))
