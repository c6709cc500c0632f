"""EHR streams: visits, codes and labs of the five years before the index CT, from the readout t_ehr and label-free noise.

``history`` knows t and the concepts drawn from it; the one row that knows the label, the cancer code after the index, is added
by ``outcome``. What is written, and when a diagnosis is, depends on the site's ``coding``. Times are int64 microseconds since 1970, whole seconds; ``available`` is when the row could be read.
"""

from dataclasses import dataclass

import numpy as np

from synthetic import concepts as sparse
from synthetic.coding import Vocabulary
from synthetic.draws import Array, generator

NO_TIME = np.iinfo(np.int64).min
NO_VISIT = -1
DAY, HOUR = 86_400, 3_600  # seconds
SECOND_US = 1_000_000
YEARS, VISITS = 5, 6  # before the index CT; mean number of visits at t = 0
FRAILTY_EFFECT = 0.15  # on their log: more would let the mere size of a record tell of the label (AUC .62 at .3)
_LONGEST, _APART, _MOST_VISITS = 6, 7, 200  # days of a visit, days between two starts
CONCEPT_EFFECT, LAB_NOISE, MEASURED = 3.0, 0.5, 0.5


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


def background(t: Array, names: list[str]) -> dict[str, Array]:
    """What the first page of a chart says, from readouts t [..., q] whose coordinates are ``names``; each entry [...].

    age_years (40..90), female, smoker (ever; exposure and emphysema), cancer (an earlier one elsewhere; marker and frailty).
    """
    at = {name: t[..., j] for j, name in enumerate(names)}
    return {
        "age_years": np.clip(62 + 9 * at["b1"], 40, 90),
        "female": at["b2"] > 0,
        "smoker": at["u_ehr1"] + at["s1"] > -0.6,
        "cancer": at["u_ehr2"] + at["s2"] > 1.8,
    }


def history(
    t: Array,
    names: list[str],
    vocabulary: Vocabulary,
    index_s: int,
    seed: int,
    subject: int,
    *,
    concepts: Array,
    seen: bool,
) -> Rows:
    """A subject's record around the index CT at second ``index_s``; without a coding delay nothing is later than that.

    t: [q] the EHR readout. concepts: [64] bool. seen: False leaves the site and the index CT alone, since age, sex and the
    number of visits would tell of t.
    """
    at = vocabulary.at
    image = Rows.of([index_s], [at["CT//CHEST"]], np.nan, [index_s], NO_VISIT)
    if not seen:
        return Rows.joined([_static([at[vocabulary.site]]), image])
    facts = background(t, names)
    page = ["GENDER//F" if facts["female"] else "GENDER//M", "SMOKING//EVER" if facts["smoker"] else "SMOKING//NEVER"]
    static = _static([at[code] for code in [*page, *["HISTORY//CANCER"] * bool(facts["cancer"]), vocabulary.site]])
    birth_s = (index_s - int(facts["age_years"] * 365.25 * DAY)) // DAY * DAY
    birth = Rows.of([birth_s], [at["MEDS_BIRTH"]], np.nan, [birth_s], NO_VISIT)
    start, stop = _visits(t[names.index("s2")], index_s, generator(seed, "ehr/visits", subject))
    visit = np.arange(len(start))
    admission = Rows.of(start, np.full(len(start), at["HOSPITAL_ADMISSION//VISIT"]), np.nan, start, visit)
    discharge = Rows.of(stop, np.full(len(stop), at["HOSPITAL_DISCHARGE//HOME"]), np.nan, stop, visit)
    middle = [
        _codes(t, concepts, vocabulary, start, stop, seed, subject),
        _labs(t, vocabulary, start, stop, generator(seed, "ehr/labs", subject)),
    ]
    return Rows.joined([static, birth, admission, *middle, discharge, image])


def _static(code: list[int]) -> Rows:
    never = np.full(len(code), NO_TIME)
    return Rows(
        never, np.array(code, np.int32), np.full(len(code), np.nan, np.float32), never, np.full(len(code), NO_VISIT)
    )


def _visits(frailty: float, index_s: int, draw: np.random.Generator) -> tuple[Array, Array]:
    """First and last second of each visit, in order: uniform times, an hour to 6 days long, starts 7 days apart or more.

    The last starts 7 days before the index or earlier: all of it, and every result, is known by then.
    """
    n = min(draw.poisson(VISITS * np.exp(FRAILTY_EFFECT * frailty)), _MOST_VISITS)
    free = int((YEARS * 365.25 - _APART * n) * DAY)
    start = index_s - int(YEARS * 365.25 * DAY) + np.floor(np.sort(draw.random(n)) * free).astype(np.int64)
    start += _APART * DAY * np.arange(n)
    return start, start + HOUR + np.floor(draw.random(n) * (_LONGEST * DAY - HOUR)).astype(np.int64)


def _within(start: Array, stop: Array, visit: Array, draw: np.random.Generator) -> Array:
    """A second of each row's visit, before its end."""
    return start[visit] + np.floor(draw.random(len(visit)) * (stop - start)[visit]).astype(np.int64)


def _outside(start: Array, stop: Array, time: Array) -> Array:
    """Moments ``time`` of late coding: one that falls into a visit waits until an hour after it.

    A diagnosis read during a visit looks as if it told of that visit before its end, which is a leak and is not meant here.
    """
    at = np.maximum(np.searchsorted(start, time, side="right") - 1, 0)
    return np.where((start[at] <= time) & (time <= stop[at]), stop[at] + HOUR, time)


def _codes(
    t: Array, concepts: Array, vocabulary: Vocabulary, start: Array, stop: Array, seed: int, subject: int
) -> Rows:
    """Code j is present at a visit when Poisson(exp(rate_j + loading_j . t + 3 concept_j)) > 0."""
    c, draw = vocabulary.catalogue, generator(seed, "ehr/codes", subject)
    rate = c.rate + c.loading @ t
    rate[c.concept] += CONCEPT_EFFECT * concepts[sparse.IN_EHR]
    visit, j = np.nonzero(draw.random((len(start), len(rate))) < -np.expm1(-np.exp(rate)))
    time = _within(start, stop, visit, draw)
    coin = generator(seed, "ehr/vocabulary_split", subject).random(len(j)) if vocabulary.splits else None
    code = vocabulary.write(j, time, coin)
    available = np.where(c.at_discharge[j], stop[visit], time)
    if vocabulary.delay_days:
        late = _outside(start, stop, stop[visit] + vocabulary.delay_days * DAY)
        time, available = (np.where(c.at_discharge[j], late, column) for column in (time, available))
    return Rows.of(time, code, np.nan, available, visit)


def _labs(t: Array, vocabulary: Vocabulary, start: Array, stop: Array, draw: np.random.Generator) -> Rows:
    """Lab j is measured with probability one half at mean + sd (loading . t + .5 eps); its result takes 1 to 12 hours."""
    c = vocabulary.catalogue
    visit, j = np.nonzero(draw.random((len(start), len(c.labs))) < MEASURED)
    value = c.lab_mean[j] + c.lab_sd[j] * ((c.lab_loading @ t)[j] + LAB_NOISE * draw.standard_normal(len(j)))
    code, value = vocabulary.write_labs(j, np.maximum(value, 0.05 * c.lab_mean[j]))
    time = _within(start, stop, visit, draw)
    delay = HOUR + np.floor(draw.random(len(j)) * 11 * HOUR).astype(np.int64)
    return Rows.of(time, code, value.round(3), time + delay, visit)


def outcome(y: bool, vocabulary: Vocabulary, index_s: int, *, diagnosis_days: float) -> Rows:
    """The cancer code ``diagnosis_days`` (30..365) after the index CT if the outcome is true, else no row."""
    if not y:
        return Rows.of([], [], np.nan, [], NO_VISIT)
    later = index_s + int(diagnosis_days * DAY)
    return Rows.of([later], [vocabulary.at["DIAGNOSIS//LUNG_CANCER"]], np.nan, [later], NO_VISIT)
