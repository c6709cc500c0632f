"""Rendered records."""

import numpy as np
import pytest

from synthetic import events
from synthetic.catalogue import N_CODES, catalogue
from synthetic.draws import normals, uniforms
from synthetic.world import World

NAMES = World.named("li2025", 0).loaded("ehr")
VOCABULARY = events.Vocabulary(catalogue(0, NAMES), "internal")
T = normals(0, "t", 0, 120, len(NAMES))
INDEX_S = events.index_time_s(uniforms(0, "u", 0, 120, 2))


def history(i, t=None):
    return events.history(T[i] if t is None else t, NAMES, VOCABULARY, int(INDEX_S[i]), 0, i)


def test_everything_but_the_cancer_code_is_known_by_the_index_ct():
    for i in range(120):
        many_visits = np.where(np.array(NAMES) == "s2", 8.0, T[i])
        rows, end = history(i, many_visits), INDEX_S[i] * events.SECOND_US
        timed = rows.time != events.NO_TIME
        assert (rows.time[timed] <= end).all()
        assert (rows.available[timed] <= end).all()
        assert (rows.available[timed] >= rows.time[timed]).all()
        assert (rows.time[1:] >= rows.time[:-1]).all()
        assert rows.code[-1] == VOCABULARY.at["CT//CHEST"]


def test_visits_follow_one_another_and_lie_in_the_five_years_before():
    for i in range(60):
        rows = history(i)
        starts = rows.time[rows.code == VOCABULARY.at["HOSPITAL_ADMISSION//VISIT"]]
        stops = rows.time[rows.code == VOCABULARY.at["HOSPITAL_DISCHARGE//HOME"]]
        assert (stops >= starts).all()
        assert (starts[1:] > stops[:-1]).all()
        assert (starts >= (INDEX_S[i] - 5 * 366 * events.DAY) * events.SECOND_US).all()


def test_labs_come_hours_later_diagnoses_at_discharge_and_the_rest_at_once():
    rows = events.Rows.joined([history(i) for i in range(60)])
    kind = np.array([code.split("//")[0] for code in VOCABULARY.codes])[rows.code]
    delay_h = (rows.available - rows.time) / events.SECOND_US / events.HOUR
    assert delay_h[kind == "LAB"].min() >= 1
    assert delay_h[kind == "LAB"].max() <= 12
    assert delay_h[kind == "DIAGNOSIS"].max() > 24
    assert (delay_h[np.isin(kind, ["MEDICATION", "PROCEDURE", "REFERRAL", "PROTOCOL"])] == 0).all()


def test_the_care_pathway_shows_in_referral_and_protocol_codes_alone():
    pathway = {i for i, code in enumerate(VOCABULARY.codes) if code.startswith(("REFERRAL", "PROTOCOL"))}
    assert len(pathway) == 12
    counts = []
    for value in (-2.0, 2.0):
        rest, hits = [], 0
        for i in range(60):
            rows = history(i, np.where(np.array(NAMES) == "c1", value, T[i]))
            hits += sum(code in pathway for code in rows.code)
            rest.append(
                sorted(
                    (int(c), float(v))
                    for c, v in zip(rows.code, np.nan_to_num(rows.value, nan=-1), strict=True)
                    if c not in pathway
                )
            )
        counts.append((hits, rest))
    assert counts[0][1] == counts[1][1]
    assert counts[1][0] > 2 * counts[0][0]


def test_every_other_coordinate_is_seen_by_codes_and_labs():
    c = VOCABULARY.catalogue
    assert ((c.loading[:, :-1] != 0).sum(0) > 20).all()
    assert ((c.lab_loading[:, :-1] != 0).sum(0) >= 1).all()
    assert (c.lab_loading[:, -1] == 0).all()


def test_codes_are_unique_and_described():
    assert len(VOCABULARY.catalogue.codes) == N_CODES
    assert len(set(VOCABULARY.codes)) == len(VOCABULARY.codes) == len(set(VOCABULARY.descriptions))
    assert all(len(text) > 4 for text in VOCABULARY.descriptions)


def test_age_sex_and_visits_are_read_from_the_readout():
    t = np.zeros(len(NAMES))
    rows = history(0, t)
    birth = rows.time[rows.code == VOCABULARY.at["MEDS_BIRTH"]][0]
    assert (INDEX_S[0] * events.SECOND_US - birth) / (events.SECOND_US * events.DAY * 365.25) == pytest.approx(
        62, abs=0.01
    )
    assert VOCABULARY.at["GENDER//M"] in rows.code
    t[NAMES.index("b2")] = 1
    assert VOCABULARY.at["GENDER//F"] in history(0, t).code
    start = VOCABULARY.at["HOSPITAL_ADMISSION//VISIT"]
    visits = [(history(i).code == start).sum() for i in range(120)]
    assert np.corrcoef(visits, T[:, NAMES.index("s2")])[0, 1] > 0.3
    assert np.mean(visits) == pytest.approx(6, abs=1)


def test_the_cancer_code_comes_30_to_365_days_after_the_index_if_and_only_if_the_label_is_true():
    assert len(events.outcome(False, VOCABULARY, 0, 0, 0).time) == 0
    days = [events.outcome(True, VOCABULARY, 0, 0, i).time[0] / events.SECOND_US / events.DAY for i in range(300)]
    assert min(days) >= 30
    assert max(days) <= 365
    assert np.ptp(days) > 300
