"""The Mayo and Brock scores against independent statements of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmjepa.refusal import Refusal
from synthetic.risk_scores import brock, mayo

MAYO_SIGNS = ("smoker", "cancer", "spiculated", "upper_lobe")
BROCK_SIGNS = ("female", "family_history", "emphysema", "part_solid", "non_solid", "upper_lobe", "spiculated")


def plain_mayo(age_years: float = 62, diameter_mm: float = 10, **signs: bool) -> float:
    return float(mayo(age_years=age_years, diameter_mm=diameter_mm, **(dict.fromkeys(MAYO_SIGNS, False) | signs)))


def plain_brock(age_years: float = 62, diameter_mm: float = 4, nodules: int = 4, **signs: bool) -> float:
    signs = dict.fromkeys(BROCK_SIGNS, False) | signs
    return float(brock(age_years=age_years, diameter_mm=diameter_mm, nodules=nodules, **signs))


@given(
    age=st.floats(30, 90),
    diameter=st.floats(2, 30),
    nodules=st.integers(1, 9),
    signs=st.lists(st.booleans(), min_size=7, max_size=7),
)
def test_the_scores_equal_the_uncentred_tables_of_eur_radiol_2019(
    age: float, diameter: float, nodules: int, signs: list[bool]
) -> None:
    """Table 2 of Eur Radiol 2019;29:5367 restates both; its Brock has no centring and an intercept of .2761 in its stead.

    (Its Mayo intercept is misprinted as -6.872; Swensen's is -6.8272.)
    """
    female, family, emphysema, part, non, upper, spiculated = signs
    non = non and not part
    expected = 0.2761 + 0.0287 * age - 5.3854 / np.sqrt(diameter / 10) - 0.0824 * nodules
    expected += 0.6011 * female + 0.2961 * family + 0.2953 * emphysema + 0.6581 * upper + 0.7729 * spiculated
    expected += 0.377 * part - 0.1276 * non
    given_signs = dict(zip(BROCK_SIGNS, (female, family, emphysema, part, non, upper, spiculated), strict=True))
    assert plain_brock(age, diameter, nodules, **given_signs) == pytest.approx(expected, abs=5e-5)
    expected = -6.8272 + 0.0391 * age + 0.1274 * diameter
    expected += 0.7917 * female + 1.3388 * family + 1.0407 * spiculated + 0.7838 * upper
    scored = plain_mayo(age, diameter, smoker=female, cancer=family, spiculated=spiculated, upper_lobe=upper)
    assert scored == pytest.approx(expected, abs=1e-9)


def test_hand_worked_cases_agree() -> None:
    # 65 years, smoker, 15 mm, spiculated, upper lobe: -6.8272 + 2.5415 + .7917 + 1.911 + 1.0407 + .7838
    assert plain_mayo(65, 15, smoker=True, spiculated=True, upper_lobe=True) == pytest.approx(0.2415, abs=1e-4)
    # a man of 62 with four solid 4 mm nodules and no sign has the intercept alone, a risk of .11 %
    assert plain_brock() == pytest.approx(-6.7892, abs=1e-7)
    # 70 years, woman, one part-solid 10 mm nodule, spiculated, upper lobe, emphysema: 10 mm adds 5.3854 * .58113883
    expected = -6.7892 + 0.2296 + 0.6011 + 0.377 + 3.12967 + 0.2472 + 0.7729 + 0.6581 + 0.2953
    woman = {"female": True, "part_solid": True, "spiculated": True, "upper_lobe": True, "emphysema": True}
    assert plain_brock(70, 10, 1, **woman) == pytest.approx(expected, abs=1e-4)


def test_each_sign_raises_the_score_but_a_non_solid_nodule_and_more_nodules_lower_it() -> None:
    assert all(plain_mayo(**{sign: True}) > plain_mayo() for sign in MAYO_SIGNS)
    assert all(plain_brock(**{sign: True}) > plain_brock() for sign in BROCK_SIGNS if sign != "non_solid")
    assert plain_brock(non_solid=True) < plain_brock()
    assert plain_brock(nodules=5) < plain_brock()


@given(st.floats(2, 30), st.floats(0.1, 10), st.floats(30, 80), st.floats(0.1, 10))
def test_older_people_and_larger_nodules_score_higher(d: float, larger: float, age: float, older: float) -> None:
    for score in (plain_mayo, plain_brock):
        assert score(age, d + larger) > score(age, d)
        assert score(age + older, d) > score(age, d)


def test_arrays_give_one_score_a_case() -> None:
    n = 5
    signs = {sign: np.arange(n) % 2 == 0 for sign in MAYO_SIGNS}
    scores = mayo(age_years=np.full(n, 60.0), diameter_mm=np.linspace(4, 22, n), **signs)
    assert scores.shape == (n,)
    assert scores[1] == pytest.approx(plain_mayo(60, 8.5))


def test_impossible_nodules_are_refused() -> None:
    for score in (plain_mayo, plain_brock):
        for bad in (0.0, -3.0, float("nan")):
            with pytest.raises(Refusal, match="diameter_mm"):
                score(60, bad)
    with pytest.raises(Refusal):
        plain_brock(part_solid=True, non_solid=True)
