"""How a site writes down what happened: its vocabulary, and the drifts of coding that set it apart from other sites.

Three knobs, each nested in its value (what is hit at a small one stays hit at a larger one) and inert at 0:

- ``vocabulary_split``: that share of the visit codes got a second code. From the code's own cut-over date on, a coin decides
  event by event which of the two is written: coding drifts over time, and adoption never completes. A date alone would be
  undone by a table of dates, a coin alone would not drift.
- ``vocabulary_merge``: that share of the visit codes comes in pairs within a family, and the pair's first code stands for both.
- ``lab_unit``: that share of the labs is reported in another unit, which the code names.
"""

import numpy as np

from synthetic.catalogue import Catalogue
from synthetic.draws import Array, generator
from synthetic.presets import Site

BASE = {
    "MEDS_BIRTH": "Birth",
    "GENDER//F": "Female sex",
    "GENDER//M": "Male sex",
    "SMOKING//EVER": "Smokes or has smoked",
    "SMOKING//NEVER": "Has never smoked",
    "HISTORY//CANCER": "A cancer outside the chest more than five years ago",
    "HOSPITAL_ADMISSION//VISIT": "Start of a hospital visit",
    "HOSPITAL_DISCHARGE//HOME": "End of a hospital visit, discharged home",
    "CT//CHEST": "CT scan of the chest",
    "DIAGNOSIS//LUNG_CANCER": "Malignant neoplasm of the lung",
}
_CUTOVERS = np.arange("2008", "2018", dtype="datetime64[Y]").astype("datetime64[s]").astype(np.int64)  # New Year's days


class Vocabulary:
    """Every code that a site may write, with a description; rows hold its position.

    catalogue: what can happen. delay_days: from a discharge to the diagnosis codes. splits: whether some codes have a second one.
    """

    def __init__(self, catalogue: Catalogue, site: Site) -> None:
        self.catalogue, self.delay_days = catalogue, site.coding_delay_days
        n, n_labs = len(catalogue.codes), len(catalogue.labs)
        base = BASE | {f"SITE//{site.name}": f"Cared for at the site called {site.name}"}
        self.site = f"SITE//{site.name}"
        split, cutover_s = _split(catalogue, site.vocabulary_split)
        self.splits = len(split) > 0
        self._first = len(base)
        self._first_lab = len(base) + n
        self._standing = _merged(catalogue, site.vocabulary_merge)
        self._second, self._cutover_s = self._first + np.arange(n), cutover_s
        self._second[split] = self._first_lab + n_labs + np.arange(len(split))
        self._other = np.zeros(n_labs, bool)
        self._other[_order(catalogue, "lab_unit", n_labs)[: int(site.lab_unit * n_labs)]] = True
        labs = np.where(self._other, catalogue.other_labs, catalogue.labs).tolist()
        self.codes = [*base, *catalogue.codes, *labs, *(f"{catalogue.codes[j]}//NEW" for j in split)]
        self.descriptions = [
            *base.values(),
            *catalogue.descriptions,
            *catalogue.lab_descriptions,
            *(f"{catalogue.descriptions[j]}, new code" for j in split),
        ]
        self.at = {code: i for i, code in enumerate(self.codes)}

    def write(self, j: Array, time_s: Array, coin: Array | None) -> Array:
        """Positions of catalogue codes ``j`` recorded at ``time_s``; coin: uniforms, one an event, where codes are split."""
        standing = self._standing[j]
        if coin is None:
            return self._first + standing
        second = (coin < 0.5) & (time_s >= self._cutover_s[standing])
        return np.where(second, self._second[standing], self._first + standing)

    def write_labs(self, j: Array, value: Array) -> tuple[Array, Array]:
        """Positions of labs ``j`` and their values in the unit that the site reports."""
        if not self._other.any():
            return self._first_lab + j, value
        return self._first_lab + j, np.where(self._other[j], value * self.catalogue.lab_factor[j], value)


def _order(catalogue: Catalogue, knob: str, n: int) -> Array:
    return generator(catalogue.seed, f"world/{knob}").permutation(n)


def _split(catalogue: Catalogue, share: float) -> tuple[Array, Array]:
    """The codes with a second code, [k], and from when on each code would be written by it, [400] s."""
    n = len(catalogue.codes)
    when = generator(catalogue.seed, "world/vocabulary_split/cutover").choice(_CUTOVERS, n)
    return _order(catalogue, "vocabulary_split", n)[: int(share * n)], when


def _merged(catalogue: Catalogue, share: float) -> Array:
    """The code that stands for each code, [400]."""
    order = _order(catalogue, "vocabulary_merge", len(catalogue.codes))
    family = np.array([code.split("//")[0] for code in catalogue.codes])
    members = [order[family[order] == name] for name in np.unique(family)]
    pairs = np.concatenate([mine[: len(mine) // 2 * 2].reshape(-1, 2) for mine in members])
    pairs = pairs[np.argsort(np.argsort(order)[pairs[:, 0]])]  # families mixed: pairs in the order of their first codes
    pairs = pairs[: int(share * len(order)) // 2]
    standing = np.arange(len(order))
    standing[pairs[:, 1]] = pairs[:, 0]
    return standing
