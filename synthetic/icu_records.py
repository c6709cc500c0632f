"""ICU stays as records: one admission a stay, labs, treatments, the end, in rows that a cohort's ``ehr/`` holds.

Within hour t of a stay: labs are drawn in the first 20 minutes and known 5 to 35 minutes later, treatment is given from
minute 57 on, the stay ends at 59:30. So everything seen of hour t is known within it, and before what it leads to.
"""

from collections.abc import Iterator

import numpy as np

from synthetic.draws import Array, generator
from synthetic.events import DAY, HOUR, NO_TIME, NO_VISIT, Rows
from synthetic.icu import LABS, NONE, Stays

LAB_MEAN, LAB_SD = 100.0, 10.0  # a reading of y is written as LAB_MEAN + LAB_SD y
END_S = HOUR - 30


class IcuVocabulary:
    """Every code that may occur, with a description; rows hold its position. ``at``: code -> position."""

    def __init__(self, site: str) -> None:
        self.site = f"SITE//{site}"
        named = {
            "MEDS_BIRTH": "Birth",
            "MEDS_DEATH": "Death",
            "GENDER//F": "Female sex",
            "GENDER//M": "Male sex",
            self.site: f"Cared for at the site called {site}",
            "HOSPITAL_ADMISSION//EMERGENCY": "Start of a hospital visit",
            "HOSPITAL_DISCHARGE//HOME": "End of a hospital visit, discharged home",
            "HOSPITAL_DISCHARGE//DIED": "End of a hospital visit, died",
            "ICU_ADMISSION//UNIT": "Start of an ICU stay",
            "ICU_DISCHARGE//UNIT": "End of an ICU stay, or of its first days that are on record",
            "MEDICATION//SUPPORT": "Organ support, one hour",
        } | {f"LAB//I{j:02d}//u": f"Intensive care lab {j + 1}" for j in range(LABS)}
        self.codes, self.descriptions = list(named), list(named.values())
        self.at = {code: i for i, code in enumerate(self.codes)}
        self.first_lab = self.at["LAB//I00//u"]


def records(stays: Stays, row: int, vocabulary: IcuVocabulary, start_s: int, seed: int) -> Rows:
    """All rows of stay ``row``, admitted to the ICU in the hour of second ``start_s``, at its full hour.

    Age and sex, the hours in hospital around the stay and the minutes of labs are noise, fixed by (seed, stay). A stay
    that outlasts the law's hours is closed at their end. The default rules of a cohort leave out stays under 6 h.
    """
    at, start_s = vocabulary.at, start_s // HOUR * HOUR
    draw = generator(seed, "icu/record", int(stays.index[row]))
    age_years, into, out = np.clip(65 + 15 * draw.standard_normal(), 20, 95), draw.random(), draw.random()
    sex = at["GENDER//F" if draw.random() < 0.5 else "GENDER//M"]
    birth_s = (start_s - int(age_years * 365.25 * DAY)) // DAY * DAY
    static = Rows(
        np.full(2, NO_TIME),
        np.array([sex, at[vocabulary.site]], np.int32),
        np.full(2, np.nan, np.float32),
        np.full(2, NO_TIME),
        np.full(2, NO_VISIT),
    )
    hours, died = stays.law.hours, stays.death_h[row] != NONE
    end_h = stays.end_h[row]
    end_s = start_s + (int(end_h) * HOUR + END_S if end_h < hours else hours * HOUR)
    came_s, left_s = start_s - HOUR - int(into * 11 * HOUR), end_s + (0 if died else HOUR + int(out * 23 * HOUR))

    def mark(code: str, second: int, visit: int = 0) -> Rows:
        return Rows.of([second], [at[code]], np.nan, [second], visit)

    before = [
        mark("MEDS_BIRTH", birth_s, NO_VISIT),
        mark("HOSPITAL_ADMISSION//EMERGENCY", came_s),
        mark("ICU_ADMISSION//UNIT", start_s),
    ]
    after = [mark("ICU_DISCHARGE//UNIT", end_s)]
    after.append(mark("HOSPITAL_DISCHARGE//DIED" if died else "HOSPITAL_DISCHARGE//HOME", left_s))
    after += [mark("MEDS_DEATH", end_s, NO_VISIT)] if died else []
    return Rows.joined([static, *before, *_course(stays, row, vocabulary, start_s, draw), *after])


def _course(
    stays: Stays, row: int, vocabulary: IcuVocabulary, start_s: int, draw: np.random.Generator
) -> Iterator[Rows]:
    """Labs and treatments while in the unit. Every lab of every hour has its own minutes, drawn or not."""
    hours = stays.law.hours
    drawn_s = np.floor(draw.random((hours, LABS)) * 20 * 60).astype(np.int64)
    delay_s = 300 + np.floor(draw.random((hours, LABS)) * 30 * 60).astype(np.int64)
    given_s = 57 * 60 + np.floor(draw.random(hours) * 120).astype(np.int64)
    labs = stays.labs[row]
    hour, lab = np.nonzero(~np.isnan(labs))
    time = start_s + hour * HOUR + drawn_s[hour, lab]
    value = (LAB_MEAN + LAB_SD * labs[hour, lab].astype(np.float64)).round(3)
    yield Rows.of(time, vocabulary.first_lab + lab, value, time + delay_s[hour, lab], 0)
    treated = np.flatnonzero(stays.treated[row] & stays.inside()[row])
    time = start_s + treated * HOUR + given_s[treated]
    yield Rows.of(time, np.full(len(treated), vocabulary.at["MEDICATION//SUPPORT"]), np.nan, time, 0)


def hourly_truth(stays: Stays) -> dict[str, Array]:
    """The truth in long form, [n T] a column: stay, hour, state_1 .. state_3, treated, drifting, in_unit."""
    n, hours = stays.treated.shape
    columns = {"stay": np.repeat(stays.index, hours), "hour": np.tile(np.arange(hours), n)}
    columns |= {f"state_{k + 1}": stays.states[..., k].ravel() for k in range(stays.states.shape[2])}
    return columns | {
        "treated": stays.treated.ravel(),
        "drifting": stays.on().ravel(),
        "in_unit": stays.inside().ravel(),
    }
