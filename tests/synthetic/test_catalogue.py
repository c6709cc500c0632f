"""What can be recorded."""

import numpy as np
import pytest

from synthetic import concepts, signs
from synthetic.catalogue import N_CODES, N_LABS, N_PATHWAY, catalogue
from synthetic.world import World


@pytest.fixture(scope="module", params=[("li2025", 0), ("li2025", 7), ("base", 3)], ids=str)
def world(request):
    names = World.named(*request.param).loaded("ehr")
    return catalogue(request.param[1], names), names


def test_codes_are_400_and_20_labs_unique_and_described(world):
    c, _ = world
    codes, texts = [*c.codes, *c.labs, *c.other_labs], [*c.descriptions, *c.lab_descriptions]
    assert (len(c.codes), len(c.labs)) == (N_CODES, N_LABS)
    assert len(set(codes)) == len(codes)
    assert len(set(texts)) == len(texts)
    assert all(len(text) > 4 and text[0].isupper() for text in texts)


def test_frequencies_fall_from_exp_minus_2_to_minus_6_in_the_pathway_s_list_and_in_the_clinical_one(world):
    c, _ = world
    for rate in (c.rate[:N_PATHWAY], c.rate[N_PATHWAY:]):
        assert rate[0] == -2
        assert (np.diff(rate) < 0).all()
        assert rate.min() > -6


def test_the_care_pathway_moves_its_12_codes_and_nothing_else_and_they_follow_it_alone(world):
    c, names = world
    of_pathway = np.array([name.startswith("c") for name in names])
    assert [code.startswith(("REFERRAL", "PROTOCOL")) for code in c.codes] == [i < 12 for i in range(N_CODES)]
    assert (np.abs(c.loading[:N_PATHWAY]).sum(1) == 1.5).all()
    assert c.loading[:N_PATHWAY].sum() == c.loading[:4].sum() == 0
    assert (c.loading[:N_PATHWAY, ~of_pathway] == 0).all()
    assert (c.loading[N_PATHWAY:, of_pathway] == 0).all()
    assert (c.lab_loading[:, of_pathway] == 0).all()


def test_two_coordinates_of_a_pathway_share_its_codes():
    c = catalogue(0, ["s1", "s2", "c1", "c2"])
    assert ((c.loading[:N_PATHWAY, 2:] != 0).sum(0) == 6).all()
    assert (c.loading[:N_PATHWAY].sum(0) == 0).all()


def test_every_other_coordinate_is_seen_by_many_codes_and_by_a_lab_of_its_own(world):
    c, names = world
    other = [j for j, name in enumerate(names) if not name.startswith("c")]
    entries = (c.loading[N_PATHWAY:] != 0).sum(1)
    assert set(entries) == {1, 2}
    assert ((c.loading[:, other] != 0).sum(0) > 20).all()
    assert c.loading[N_PATHWAY:][c.loading[N_PATHWAY:] != 0].std() == pytest.approx(0.5, rel=0.1)
    assert ((np.abs(c.lab_loading[:, other]) == 1).sum(0) >= 1).all()
    assert ((np.abs(c.lab_loading) == 1).sum(1) == 1).all()
    assert (np.abs(c.lab_loading) == 0.5).sum() == N_LABS // 2


def test_each_recorded_concept_is_one_diagnosis_rare_without_it(world):
    c, _ = world
    assert len(set(c.concept)) == len(c.concept) == len(concepts.IN_EHR)
    assert all(c.codes[j].startswith("DIAGNOSIS") for j in c.concept)
    assert c.rate[c.concept].max() < -4
    said = [c.descriptions[j] for j in c.concept]
    assert said[0] == "Asbestos exposure"
    # the last 12 say what images show
    shown = signs.NAMES[12:]
    for word, place in (
        ("bronchiectasis", "Bronchiectasis"),
        ("wire", "Wires"),
        ("pleural_effusion", "Long-standing pleural"),
    ):
        assert said[40 + shown.index(word)].startswith(place)


def test_only_diagnoses_wait_for_the_discharge(world):
    c, _ = world
    assert c.at_discharge.tolist() == [code.startswith("DIAGNOSIS") for code in c.codes]
