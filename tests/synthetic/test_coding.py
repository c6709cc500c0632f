"""How sites write things down."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthetic.catalogue import N_CODES, N_LABS, catalogue
from synthetic.coding import Vocabulary
from synthetic.presets import find_site
from synthetic.world import World

CATALOGUE = catalogue(0, World.named("li2025", 0).loaded("ehr"))
SITE = find_site("li2025", "internal")
J = np.arange(N_CODES)
EARLY, LATE = (int(np.datetime64(day, "s").astype(np.int64)) for day in ("2007-12-31", "2018-01-01"))


def vocabulary(**knobs):
    return Vocabulary(CATALOGUE, replace(SITE, **knobs))


def written(v, time_s=LATE, coin=0.0):
    """The code written for each of the catalogue's."""
    positions = v.write(J, np.full(N_CODES, time_s), np.full(N_CODES, coin) if v.splits else None)
    return np.array(v.codes)[positions]


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_codes_are_unique_described_and_those_that_may_be_written(split, merge, unit):
    v = vocabulary(vocabulary_split=split, vocabulary_merge=merge, lab_unit=unit)
    assert len(set(v.codes)) == len(v.codes) == len(v.descriptions) == len(v.at)
    assert len(set(v.descriptions)) == len(v.descriptions)
    assert set(written(v)) <= set(v.codes)
    labs, _ = v.write_labs(np.arange(N_LABS), np.ones(N_LABS))
    assert all(v.codes[i].startswith("LAB") for i in labs)


def test_neutral_knobs_write_every_code_and_lab_as_the_catalogue_does():
    v, value = vocabulary(), np.linspace(1, 9, N_LABS)
    assert written(v).tolist() == CATALOGUE.codes
    labs, same = v.write_labs(np.arange(N_LABS), value)
    assert [v.codes[i] for i in labs] == CATALOGUE.labs
    assert same is value


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_split_codes_are_written_as_one_of_two_from_their_cut_over_date_on(share):
    v = vocabulary(vocabulary_split=share)
    old = np.array(CATALOGUE.codes)
    assert (written(v, EARLY, coin=0.0) == old).all()
    assert (written(v, LATE, coin=0.9) == old).all()
    new = written(v, LATE, coin=0.1)
    assert (new != old).sum() == share * N_CODES
    assert all(a in (b, f"{b}//NEW") for a, b in zip(new, old, strict=True))


def test_cut_over_dates_differ_from_code_to_code():
    v = vocabulary(vocabulary_split=1.0)
    years = np.arange("2007", "2020", dtype="datetime64[Y]").astype("datetime64[s]").astype(np.int64)
    share = [(written(v, time) != CATALOGUE.codes).mean() for time in years]
    assert share[0] == 0
    assert share[-1] == 1
    assert max(np.diff(share)) < 0.2


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_merged_codes_come_in_pairs_of_a_family_under_the_code_of_one(share):
    old, new = np.array(CATALOGUE.codes), written(vocabulary(vocabulary_merge=share))
    moved = old != new
    assert moved.sum() == share * N_CODES / 2
    assert len(set(new)) == N_CODES - moved.sum()
    assert all(a.split("//")[0] == b.split("//")[0] for a, b in zip(old[moved], new[moved], strict=True))
    assert not set(new[moved]) & set(old[moved])
    if share < 1:
        assert len({code.split("//")[0] for code in old[moved]}) > 2


def test_a_code_may_be_merged_and_split():
    new = written(vocabulary(vocabulary_merge=1.0, vocabulary_split=1.0))
    assert len(set(new)) == N_CODES / 2
    assert all(code.endswith("//NEW") for code in new)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_labs_in_another_unit_name_it_and_scale_their_value(share):
    v, value = vocabulary(lab_unit=share), CATALOGUE.lab_mean
    labs, scaled = v.write_labs(np.arange(N_LABS), value)
    other = np.array([v.codes[i] for i in labs]) == CATALOGUE.other_labs
    assert other.sum() == share * N_LABS
    assert scaled == pytest.approx(np.where(other, value * CATALOGUE.lab_factor, value))
    assert (CATALOGUE.lab_factor != 1).all()
    # same test, other unit: the second part of the code stays
    for a, b in zip(CATALOGUE.labs, CATALOGUE.other_labs, strict=True):
        assert a.split("//")[:2] == b.split("//")[:2]
        assert a != b


@given(st.sampled_from(["vocabulary_split", "vocabulary_merge", "lab_unit"]), st.floats(0, 1), st.floats(0, 1))
def test_what_a_small_share_hits_a_larger_one_hits_too(knob, a, b):
    def hit(share):
        v = vocabulary(**{knob: share})
        labs, _ = v.write_labs(np.arange(N_LABS), CATALOGUE.lab_mean)
        lab_codes = np.array([v.codes[i] for i in labs])
        return np.r_[written(v) != CATALOGUE.codes, lab_codes != CATALOGUE.labs]

    assert not (hit(min(a, b)) & ~hit(max(a, b))).any()
