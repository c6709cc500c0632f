"""Published reference scores of a nodule's malignancy, as log-odds: the bar that a learnt model has to clear.

Both were fitted to people, not to the synthetic world: here they rank cases, and their calibration means nothing.
"""

import numpy as np

from mmjepa.refusal import Refusal
from synthetic.draws import Array

_MAYO = {"smoker": 0.7917, "cancer": 1.3388, "spiculated": 1.0407, "upper_lobe": 0.7838}
_BROCK = {
    "female": 0.6011,
    "family_history": 0.2961,
    "emphysema": 0.2953,
    "part_solid": 0.3770,
    "non_solid": -0.1276,
    "upper_lobe": 0.6581,
    "spiculated": 0.7729,
}


def mayo(
    *, age_years: Array, diameter_mm: Array, smoker: Array, cancer: Array, spiculated: Array, upper_lobe: Array
) -> Array:
    """Mayo Clinic score (Swensen et al., Arch Intern Med 1997), log-odds [n].

    age_years and diameter_mm [n] float; the others [n] bool: ever smoked, an extrathoracic cancer more than five years ago,
    spiculated margin, upper lobe. Refusal ``SYNTHETIC_RANGE``: a diameter that is not positive.
    """
    signs = {"smoker": smoker, "cancer": cancer, "spiculated": spiculated, "upper_lobe": upper_lobe}
    return -6.8272 + 0.0391 * np.asarray(age_years) + 0.1274 * _positive(diameter_mm) + _sum(_MAYO, signs)


def brock(
    *,
    age_years: Array,
    diameter_mm: Array,
    nodules: Array,
    female: Array,
    family_history: Array,
    emphysema: Array,
    part_solid: Array,
    non_solid: Array,
    upper_lobe: Array,
    spiculated: Array,
) -> Array:
    """Brock (PanCan) score, the full model with spiculation (McWilliams et al., N Engl J Med 2013), log-odds [n].

    age_years, diameter_mm and nodules (how many the scan shows) [n]; the others [n] bool; a solid nodule is neither part solid
    nor non-solid, and no nodule is both. Age is centred at 62, the count at 4, and the size enters as
    (diameter / 10 mm)^-1/2, centred at 4 mm. Refusal ``SYNTHETIC_RANGE``: a diameter that is not positive, or both types.
    """
    signs = {
        "female": female,
        "family_history": family_history,
        "emphysema": emphysema,
        "part_solid": part_solid,
        "non_solid": non_solid,
        "upper_lobe": upper_lobe,
        "spiculated": spiculated,
    }
    if np.any(np.asarray(part_solid, bool) & np.asarray(non_solid, bool)):
        raise Refusal(
            "SYNTHETIC_RANGE", "a nodule is both part solid and non-solid", "It is one or the other, or solid"
        )
    size = (_positive(diameter_mm) / 10) ** -0.5 - 1.58113883
    centred = 0.0287 * (np.asarray(age_years) - 62) - 5.3854 * size - 0.0824 * (np.asarray(nodules) - 4)
    return -6.7892 + centred + _sum(_BROCK, signs)


def _sum(weights: dict[str, float], signs: dict[str, Array]) -> Array:
    total = np.zeros(())
    for name, weight in weights.items():
        total = total + weight * np.asarray(signs[name], bool)
    return total


def _positive(diameter_mm: Array) -> Array:
    diameter_mm = np.asarray(diameter_mm, float)
    if not np.all(diameter_mm > 0):
        raise Refusal("SYNTHETIC_RANGE", "a nodule's diameter_mm is not above 0")
    return diameter_mm
