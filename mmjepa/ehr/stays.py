"""ICU stays, derived from the admission and discharge rows of each subject (arXiv 2605.10840, cohort rules).

MEDS files seldom keep visit ids, so an ICU admission is closed by the first ICU discharge after it, and belongs to the
hospital admission whose interval it overlaps most.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from mmjepa.ehr.store import EventStore

HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US
YEAR_US = 365.25 * DAY_US
NEVER = np.iinfo(np.int64).max
EXCLUDED = (
    "no_discharge",
    "not_first_of_admission",
    "age_unknown",
    "under_age",
    "short",
    "after_death",
    "few_observations",
    "no_vital_sign",
)


@dataclass(frozen=True)
class StaysConfig:
    """Code prefixes of the rows that mark a stay, and who is kept.

    min_age_years: 0 also keeps subjects without a birth row.
    min_observations: rows of ``observations`` that a stay needs, each in an hour of it (``Stay``) by when it became available. The
        published cohort asks for 10; they are counted over the whole stay, so who is kept at an hour then depends on what comes
        after it, and by default nothing is asked.
    vitals: it needs one of these too, as in the published cohort; the codes are the source's own, and the same caution holds. Of
        MIMIC-IV for instance LAB//220045 (heart rate), LAB//220052 and LAB//220181 (mean arterial pressure), LAB//220210
        (breaths) and LAB//220277 (oxygen saturation). On the MIMIC-IV demo neither rule leaves out a stay: the poorest has 485
        observations.
    """

    icu_in: str = "ICU_ADMISSION"
    icu_out: str = "ICU_DISCHARGE"
    hospital_in: str = "HOSPITAL_ADMISSION"
    hospital_out: str = "HOSPITAL_DISCHARGE"
    birth: str = "MEDS_BIRTH"
    death: str = "MEDS_DEATH"
    observations: tuple[str, ...] = ("LAB", "SUBJECT_FLUID_OUTPUT")
    vitals: tuple[str, ...] = ()
    min_age_years: float = 18.0
    min_los_hours: float = 6.0
    min_observations: int = 0
    max_hours: int = 336

    def __post_init__(self) -> None:
        if self.max_hours < 1 or self.min_observations < 0:
            raise ValueError("max_hours must be at least 1, min_observations 0")


class Stay(NamedTuple):
    """One ICU stay. Times are int64 microseconds; hospital times and death are NEVER where unknown; age is NaN where unknown.

    hours: n = min(max_hours, max(1, ceil(LOS in hours))); hour h is [icu_in + h, icu_in + h + 1). Rows at or after
    ``end_us`` = min(icu_in + n hours, just after death) are outside.
    """

    subject_id: int
    stay: int
    icu_in_us: int
    icu_out_us: int
    hospital_in_us: int
    hospital_out_us: int
    death_us: int
    end_us: int
    age_years: float
    los_hours: float
    hours: int


def derive_stays(store: EventStore, config: StaysConfig | None = None) -> tuple[pd.DataFrame, dict[str, int]]:
    """Find the ICU stays of a store.

    Returns one row a kept stay (the fields of ``Stay``; ``stay`` numbers the ICU stays of a subject from 0), and counts:
    icu_admissions; excluded for the reasons in ``EXCLUDED`` (each stay counted once, in this order); kept; deaths;
    rows_after_death (in all subjects; never inside a stay).
    """
    config = config or StaysConfig()
    marks, observed = _marks(store, config), _Observed(store, config)
    counts = dict.fromkeys(("icu_admissions", *EXCLUDED, "kept", "deaths", "rows_after_death"), 0)
    kept: list[Stay] = []
    for row, subject in enumerate(np.asarray(store.subjects).tolist()):
        mine = {name: times[slice(*ends[row : row + 2])] for name, (times, ends) in marks.items()}
        death = death_time(mine["death"])
        if death < NEVER:
            counts["deaths"] += 1
            times = store.times_us[store.offsets[row] : store.offsets[row + 1]]
            counts["rows_after_death"] += int((times > death).sum())
        admissions = pair_intervals(mine["hospital_in"], mine["hospital_out"])
        used: set[int] = set()
        for number, (start, stop) in enumerate(pair_intervals(mine["icu_in"], mine["icu_out"])):
            counts["icu_admissions"] += 1
            admission = _around(admissions, start, stop)
            birth = int(mine["birth"][0]) if len(mine["birth"]) else NEVER
            stay = _stay(
                subject,
                number,
                (start, stop),
                admissions[admission] if admission is not None else None,
                birth,
                death,
                config,
            )
            reason = _excluded(stay, admission in used, config) or observed.lacks(row, stay)
            if stop < NEVER and admission is not None:
                used.add(admission)
            counts[reason or "kept"] += 1
            if reason is None:
                kept.append(stay)
    return pd.DataFrame(kept, columns=list(Stay._fields)), counts


def iterate(stays: pd.DataFrame) -> Iterator[Stay]:
    """The rows of a frame of stays as ``Stay`` tuples."""
    for values in zip(*(stays[name].tolist() for name in Stay._fields), strict=True):
        yield Stay(*values)


def death_time(deaths_us: np.ndarray) -> int:
    """First death in microseconds, NEVER without one. A midnight time is a date only: it counts as that day's 23:59:59."""
    if not len(deaths_us):
        return NEVER
    first = int(deaths_us[0])
    return first + DAY_US - 1_000_000 if first % DAY_US == 0 else first


def pair_intervals(starts_us: np.ndarray, stops_us: np.ndarray) -> list[tuple[int, int]]:
    """Close each start by the first stop after it, if no other start comes before; else by NEVER. Both ascending."""
    starts = np.unique(starts_us)
    after = np.searchsorted(stops_us, starts, side="right")
    stops = np.append(stops_us, NEVER)[after]
    following = np.append(starts[1:], NEVER)
    return list(zip(starts.tolist(), np.where(stops <= following, stops, NEVER).tolist(), strict=True))


def _marks(store: EventStore, config: StaysConfig) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each kind of marking row: its times, ascending in each subject, and [subjects + 1] where each subject's end."""
    codes, offsets = np.asarray(store.codes), np.asarray(store.offsets)
    marks = {}
    for name in ("icu_in", "icu_out", "hospital_in", "hospital_out", "birth", "death"):
        rows = np.flatnonzero(store.match([getattr(config, name)])[codes])
        times, ends = np.asarray(store.times_us[rows]), np.searchsorted(rows, offsets)
        subject = np.repeat(np.arange(len(offsets) - 1), np.diff(ends))
        marks[name] = (times[np.lexsort((times, subject))], ends)
    return marks


def _around(admissions: list[tuple[int, int]], start: int, stop: int) -> int | None:
    """The hospital admission that overlaps an ICU stay most, None without overlap."""
    overlap = [min(stop, out) - max(start, into) for into, out in admissions]
    best = int(np.argmax(overlap)) if overlap else None
    return best if best is not None and overlap[best] > 0 else None


def _stay(
    subject: int,
    number: int,
    icu: tuple[int, int],
    hospital: tuple[int, int] | None,
    birth: int,
    death: int,
    config: StaysConfig,
) -> Stay:
    start, stop = icu
    los = (stop - start) / HOUR_US if stop < NEVER else np.nan
    hours = min(config.max_hours, max(1, math.ceil(los))) if stop < NEVER else 0
    into, out = hospital or (NEVER, NEVER)
    age = (start - birth) / YEAR_US if birth < NEVER else np.nan
    end = min(start + hours * HOUR_US, death + 1 if death < NEVER else NEVER)
    return Stay(subject, number, start, stop, into, out, death, end, age, los, hours)


def _excluded(stay: Stay, repeated: bool, config: StaysConfig) -> str | None:
    if stay.icu_out_us == NEVER:
        return "no_discharge"
    if repeated:
        return "not_first_of_admission"
    if config.min_age_years > 0 and np.isnan(stay.age_years):
        return "age_unknown"
    if stay.age_years < config.min_age_years:
        return "under_age"
    if stay.los_hours < config.min_los_hours:
        return "short"
    return "after_death" if stay.end_us <= stay.icu_in_us else None


class _Observed:
    """What is observed in the hours of a stay."""

    def __init__(self, store: EventStore, config: StaysConfig) -> None:
        self.store, self.config = store, config
        self.observation, self.vital = store.match(config.observations), store.match(config.vitals)

    def lacks(self, row: int, stay: Stay) -> str | None:
        """Why a stay of the store's subject in ``row`` is left out."""
        span = slice(int(self.store.offsets[row]), int(self.store.offsets[row + 1]))
        known = np.maximum(self.store.times_us[span], self.store.available_us[span])
        codes = self.store.codes[span][(known >= stay.icu_in_us) & (known < stay.end_us)]
        if self.observation[codes].sum() < self.config.min_observations:
            return "few_observations"
        return "no_vital_sign" if self.config.vitals and not self.vital[codes].any() else None
