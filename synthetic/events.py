"""EHR streams: visits, codes and labs of the five years before the index CT, from the readout t_ehr and label-free noise.

``history`` knows t alone; the one row that knows the label, the cancer code after the index, is added by ``outcome``.
Times are int64 microseconds since 1970, whole seconds; ``available`` is when the row could be read.
"""

from dataclasses import dataclass

import numpy as np

from synthetic.catalogue import Catalogue
from synthetic.draws import Array, generator
from synthetic.presets import Site

NO_TIME = np.iinfo(np.int64).min
NO_VISIT = -1
DAY, HOUR = 86_400, 3_600  # seconds
SECOND_US = 1_000_000
BASE = {
    "MEDS_BIRTH": "Birth",
    "GENDER//F": "Female sex",
    "GENDER//M": "Male sex",
    "HOSPITAL_ADMISSION//VISIT": "Start of a hospital visit",
    "HOSPITAL_DISCHARGE//HOME": "End of a hospital visit, discharged home",
    "CT//CHEST": "CT scan of the chest",
    "DIAGNOSIS//LUNG_CANCER": "Malignant neoplasm of the lung",
}


class Vocabulary:
    """Every code that may occur, with a description; rows hold its position."""

    def __init__(self, catalogue: Catalogue, site: Site | str) -> None:
        self.catalogue = catalogue
        site = site if isinstance(site, str) else site.name
        base = BASE | {f"SITE//{site}": f"Cared for at the site called {site}"}
        self.codes = [*base, *catalogue.codes, *catalogue.labs]
        self.descriptions = [*base.values(), *catalogue.descriptions, *catalogue.lab_descriptions]
        self.at = {code: i for i, code in enumerate(self.codes)}
        self.first_code = len(base)
        self.first_lab = len(base) + len(catalogue.codes)
        self.site = f"SITE//{site}"


@dataclass(frozen=True)
class Rows:
    """Rows of one subject, in order.

    time, available: us (NO_TIME: static). code: position in the vocabulary. value: NaN for none. visit: its number in the
    subject's record, NO_VISIT for none.
    """

    time: Array
    code: Array
    value: Array
    available: Array
    visit: Array

    @classmethod
    def of(
        cls,
        time_s: Array | list,
        code: Array | list,
        value: Array | float,
        available_s: Array | list,
        visit: Array | int,
    ) -> "Rows":
        """Columns in seconds; scalars are repeated."""
        time = np.asarray(time_s, np.int64) * SECOND_US
        n = len(time)
        return cls(
            time,
            np.asarray(code, np.int32),
            np.broadcast_to(np.asarray(value, np.float32), n),
            np.asarray(available_s, np.int64) * SECOND_US,
            np.broadcast_to(np.asarray(visit, np.int64), n),
        )

    @classmethod
    def joined(cls, parts: list["Rows"]) -> "Rows":
        """All parts in time order, static rows first; ties keep the order of the parts."""
        columns = [
            np.concatenate([getattr(p, c) for p in parts]) for c in ("time", "code", "value", "available", "visit")
        ]
        order = np.argsort(columns[0], kind="stable")
        return cls(*(column[order] for column in columns))


def index_time_s(uniform: Array) -> Array:
    """Second of each index CT, [n] int64: in working hours of 2012 to 2019."""
    first_day = np.datetime64("2012-01-01", "D").astype(np.int64)
    days = np.floor(uniform[:, 0] * 8 * 365.25).astype(np.int64)
    return (first_day + days) * DAY + 7 * HOUR + np.floor(uniform[:, 1] * 11 * HOUR).astype(np.int64)


def history(
    t: Array,
    names: list[str],
    vocabulary: Vocabulary,
    index_s: int,
    seed: int,
    subject: int,
    *,
    concepts: Array | None = None,
    seen: bool = True,
) -> Rows:
    """Everything up to and with the index CT at second ``index_s``; t: [q] the subject's EHR readout."""
    at, draw = vocabulary.at, generator(seed, "ehr/visits", subject)
    age_years = np.clip(62 + 9 * t[names.index("b1")], 40, 90)
    sex = "GENDER//F" if t[names.index("b2")] > 0 else "GENDER//M"
    birth_s = (index_s - int(age_years * 365.25 * DAY)) // DAY * DAY
    static = Rows(
        np.full(2, NO_TIME),
        np.array([at[sex], at[vocabulary.site]], np.int32),
        np.full(2, np.nan, np.float32),
        np.full(2, NO_TIME),
        np.full(2, NO_VISIT),
    )
    ends = Rows.of([birth_s, index_s], [at["MEDS_BIRTH"], at["CT//CHEST"]], np.nan, [birth_s, index_s], NO_VISIT)
    n = draw.poisson(5 * np.exp(np.log(1.2) + 0.3 * t[names.index("s2")]))
    # the last visit starts 7 days before the index at the latest and lasts up to 6: all of it is known by then
    start = np.sort(index_s - 7 * DAY - np.floor(draw.random(n) * (5 * 365.25 - 7) * DAY).astype(np.int64))
    stop = start + np.floor(draw.random(n) * 6 * DAY).astype(np.int64)
    stop[:-1] = np.maximum(start[:-1], np.minimum(stop[:-1], start[1:] - 60))  # one visit at a time
    visit = np.arange(n)
    admission = Rows.of(start, np.full(n, at["HOSPITAL_ADMISSION//VISIT"]), np.nan, start, visit)
    discharge = Rows.of(stop, np.full(n, at["HOSPITAL_DISCHARGE//HOME"]), np.nan, stop, visit)
    middle = [
        _codes(t, vocabulary, start, stop, visit, generator(seed, "ehr/codes", subject)),
        _labs(t, vocabulary, start, stop, visit, generator(seed, "ehr/labs", subject)),
    ]
    return Rows.joined([static, ends, admission, *middle, discharge])


def _codes(
    t: Array, vocabulary: Vocabulary, start: Array, stop: Array, visit: Array, draw: np.random.Generator
) -> Rows:
    """Code j is present at a visit when Poisson(exp(rate_j + loading_j . t)) > 0."""
    c = vocabulary.catalogue
    chance = -np.expm1(-np.exp(c.rate + c.loading @ t))
    v, j = np.nonzero(draw.random((len(start), len(chance))) < chance)
    time = start[v] + np.floor(draw.random(len(v)) * (stop - start + 1)[v]).astype(np.int64)
    return Rows.of(time, vocabulary.first_code + j, np.nan, np.where(c.at_discharge[j], stop[v], time), visit[v])


def _labs(t: Array, vocabulary: Vocabulary, start: Array, stop: Array, visit: Array, draw: np.random.Generator) -> Rows:
    """Lab j is measured with probability one half at mean + sd (loading . t + .5 eps); its result takes 1 to 12 hours."""
    c = vocabulary.catalogue
    v, j = np.nonzero(draw.random((len(start), len(c.labs))) < 0.5)
    value = c.lab_mean[j] + c.lab_sd[j] * ((c.lab_loading @ t)[j] + 0.5 * draw.standard_normal(len(v)))
    value = np.maximum(value, 0.05 * c.lab_mean[j])
    time = start[v] + np.floor(draw.random(len(v)) * (stop - start + 1)[v]).astype(np.int64)
    delay = HOUR + np.floor(draw.random(len(v)) * 11 * HOUR).astype(np.int64)
    return Rows.of(time, vocabulary.first_lab + j, value.round(3), time + delay, visit[v])


def outcome(
    y: bool, vocabulary: Vocabulary, index_s: int, seed: int, subject: int, *, diagnosis_days: float | None = None
) -> Rows:
    """The cancer code 30 to 365 days after the index CT if the label is true, else no row."""
    if not y:
        return Rows.of([], [], np.nan, [], NO_VISIT)
    if diagnosis_days is None:
        diagnosis_days = 30 + generator(seed, "ehr/outcome", subject).random() * 335
    later = index_s + int(diagnosis_days * DAY)
    return Rows.of([later], [vocabulary.at["DIAGNOSIS//LUNG_CANCER"]], np.nan, [later], NO_VISIT)
