"""Hourly text of an ICU stay: one state text, one action text an hour, and one static text (arXiv 2605.10840).

``t=7h | Heart rate: 91 bpm. MAP: 58 mmHg.`` Every reading of the hour is kept, in the order category, variable, time.
A reading belongs to the hour in which it became available, so the texts of hours <= h depend on nothing later.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from mmjepa.ehr.charlson import charlson_groups, charlson_score
from mmjepa.ehr.names import format_value, name_and_unit
from mmjepa.ehr.stays import HOUR_US, Stay
from mmjepa.ehr.store import EventStore

NO_STATE, NO_ACTION, NO_STATIC = "No observations recorded.", "No active interventions.", "No static information."
# What the paper takes out of MIMIC-IV's actions: flushes, and what only carries a drug (dextrose 5 %, solution, sterile water,
# piggyback). Saline 0.9 % stays: it is given as a treatment too.
FLUSHES = (
    "Sodium Chloride 0.9%  Flush",
    "Heparin Flush (10 units/ml)",
    "Heparin Flush (100 units/ml)",
    "Heparin Flush (1000 units/mL)",
)
CARRIERS = ("220949", "225943", "225944", "226089")


@dataclass(frozen=True)
class HourlyTextConfig:
    """Which codes (prefixes of whole ``//`` parts) go where.

    state, action: in the order in which their categories are written.
    continuous: pairs (start, end) of the same item; the start's text is repeated in every hour until the end. A start
        without an end lapses after ``max_open_hours`` (so does one whose end comes later: what is written in an hour
        must not depend on rows after it).
    units: families whose last of three or more parts is a unit.
    exclude: they win over state and action. Codes that spell an outcome (LAB//223758 and LAB//229784 are MIMIC's code status),
        coded procedures (known at discharge, stamped with it or with a midnight before them), flushes and carriers.
    charlson: "earlier": from diagnoses coded before this hospital admission; "admission": from those coded within it, as
        published, which tells hour 0 what is coded at discharge; nothing is written where there are none.
    max_readings: the most recent readings kept in one text; None keeps all. Values are as recorded, outliers too.
    """

    state: tuple[str, ...] = ("LAB", "SUBJECT_FLUID_OUTPUT")
    action: tuple[str, ...] = ("INFUSION_START", "PROCEDURE", "MEDICATION")
    continuous: tuple[tuple[str, str], ...] = (
        ("INFUSION_START", "INFUSION_END"),
        ("PROCEDURE//START", "PROCEDURE//END"),
    )
    max_open_hours: int = 72
    units: tuple[str, ...] = ("LAB", "SUBJECT_FLUID_OUTPUT")
    sex: tuple[str, ...] = ("GENDER", "SEX")
    race: tuple[str, ...] = ("RACE", "ETHNICITY")
    exclude: tuple[str, ...] = (
        "MEDS_DEATH",
        "HOSPITAL_DISCHARGE",
        "ICU_DISCHARGE",
        "TRANSFER_TO//discharge",
        "DIAGNOSIS",
        "DRG",
        "LAB//223758",
        "LAB//229784",
        "PROCEDURE//ICD",
        *(f"MEDICATION//{part}{name}" for part in ("", "START//", "STOP//") for name in FLUSHES),
        *(f"INFUSION_START//{item}" for item in CARRIERS),
    )
    charlson: Literal["earlier", "admission"] = "earlier"
    max_readings: int | None = None

    def __post_init__(self) -> None:
        if self.max_open_hours < 1 or (self.max_readings is not None and self.max_readings < 1):
            raise ValueError("max_open_hours and max_readings must be at least 1")


@dataclass(frozen=True)
class HourlyTexts:
    """The texts of a stay: ``state[h]`` and ``action[h]`` for each hour h, and ``static``."""

    state: list[str]
    action: list[str]
    static: str


@dataclass(frozen=True)
class _Rows:
    """Readings or actions of one stay: vocabulary code, value, clock (us), and the hour in which each is written."""

    code: np.ndarray
    value: np.ndarray
    clock: np.ndarray
    hour: np.ndarray


class TextWriter:
    """Writes the hourly texts of one store's stays; what depends on the codes alone is made once.

    names: code -> (name, unit), which wins over the store's descriptions; see ``names.read_names``.
    """

    def __init__(
        self,
        store: EventStore,
        config: HourlyTextConfig | None = None,
        names: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        self.store, self.config, self._names = store, config or HourlyTextConfig(), names or {}
        size, blocked = len(store.vocabulary), store.match(self.config.exclude)
        self._item = np.full(size, -1)
        self._ends = np.zeros(size, bool)
        self._state, self._action = (
            self._categories(part, blocked) for part in (self.config.state, self.config.action)
        )
        items: dict[tuple[int, str], int] = {}
        for pair, prefixes in enumerate(self.config.continuous):
            for end, prefix in enumerate(prefixes):
                for code in np.flatnonzero(store.match([prefix]) & ~blocked):
                    item = store.vocabulary[code].removeprefix(prefix)
                    self._item[code] = items.setdefault((pair, item), len(items))
                    self._ends[code] = bool(end)
        self._item[(self._action < 0) & ~self._ends] = -1
        self._facts = {"Sex": store.match(self.config.sex), "Race": store.match(self.config.race)}
        self._charlson = charlson_groups(store.vocabulary)
        self._heads: dict[int, tuple[str, str]] = {}

    def __call__(self, stay: Stay) -> HourlyTexts:
        """The texts of one stay."""
        store, row = self.store, self.store.row(stay.subject_id)
        span = slice(int(store.offsets[row]), int(store.offsets[row + 1]))
        code = np.asarray(store.codes[span])
        clock = np.maximum(store.times_us[span], store.available_us[span])
        value = np.asarray(store.values[span])
        past = clock < stay.end_us
        hour = (clock - stay.icu_in_us) // HOUR_US
        inside = past & (hour >= 0)
        state = np.flatnonzero(inside & (self._state[code] >= 0))
        single = np.flatnonzero(inside & (self._action[code] >= 0) & (self._item[code] < 0))
        running = np.flatnonzero(past & (self._item[code] >= 0))
        states = _Rows(code[state], value[state], clock[state], hour[state])
        spread = self._spread(code[running], value[running], clock[running], stay)
        actions = _Rows(
            np.append(code[single], spread.code),
            np.append(value[single], spread.value),
            np.append(clock[single], spread.clock),
            np.append(hour[single], spread.hour),
        )
        return HourlyTexts(
            self._write(states, self._state, stay.hours, NO_STATE),
            self._write(actions, self._action, stay.hours, NO_ACTION),
            self._static(stay, row, code, clock),
        )

    def _categories(self, prefixes: tuple[str, ...], blocked: np.ndarray) -> np.ndarray:
        """int [vocabulary]: place of the first prefix that a code matches, -1 for none."""
        category = np.full(len(blocked), -1)
        for place in reversed(range(len(prefixes))):
            category[self.store.match([prefixes[place]]) & ~blocked] = place
        return category

    def _spread(self, code: np.ndarray, value: np.ndarray, clock: np.ndarray, stay: Stay) -> _Rows:
        """Continuous actions, once in every hour from floor(start) to ceil(stop) - 1.

        A start that carries no value takes its end's (an amount) in the hour of that end, when it is known.
        """
        limit = self.config.max_open_hours * HOUR_US
        starts, stops, ends = match_intervals(self._item[code], clock, self._ends[code], limit)
        first = (clock[starts] - stay.icu_in_us) // HOUR_US
        last = np.maximum(-((stay.icu_in_us - stops) // HOUR_US) - 1, first)
        horizon = min(stay.hours, -((stay.icu_in_us - stay.end_us) // HOUR_US))
        low, high = np.maximum(first, 0), np.minimum(last, horizon - 1)
        length = np.maximum(high - low + 1, 0)
        which = np.repeat(np.arange(len(starts)), length)
        hour = np.arange(len(which)) - np.repeat(np.cumsum(length) - length, length) + low[which]
        amount = np.where(ends >= 0, value[ends], np.nan) if len(value) else np.empty(0, np.float32)
        shown = value[starts][which]
        known = (stops - stay.icu_in_us) // HOUR_US  # an end on the hour is known only in the next
        shown = np.where(np.isnan(shown) & (hour == known[which]), amount[which], shown)
        return _Rows(code[starts][which], shown.astype(np.float32), clock[starts][which], hour)

    def _write(self, rows: _Rows, category: np.ndarray, hours: int, empty: str) -> list[str]:
        """One text an hour: exact duplicates dropped, then ordered by category, variable, time and file order."""
        bits = rows.value.view(np.int32)
        variable = category[rows.code] * len(category) + rows.code
        order = np.lexsort((bits, rows.clock, variable, rows.hour))
        keys = np.stack([rows.hour, variable, rows.clock, bits])[:, order]
        fresh = np.ones(len(order), bool)
        fresh[1:] = (np.diff(keys) != 0).any(axis=0)
        kept = np.sort(order[fresh])
        kept = kept[np.lexsort((rows.clock[kept], variable[kept], rows.hour[kept]))]
        if self.config.max_readings is not None:
            kept = _latest(kept, rows, self.config.max_readings)
        fragments = self._fragments(rows.code[kept], bits[kept])
        edges = np.searchsorted(rows.hour[kept], np.arange(hours + 1))
        texts = (" ".join(fragments[a:b]) or empty for a, b in pairwise(edges.tolist()))
        return [f"t={hour}h | {text}" for hour, text in enumerate(texts)]

    def _fragments(self, code: np.ndarray, bits: np.ndarray) -> list[str]:
        distinct, inverse = np.unique((code.astype(np.int64) << 32) | bits.view(np.uint32), return_inverse=True)
        values = (distinct & 0xFFFFFFFF).astype(np.uint32).view(np.float32).tolist()
        made = []
        for one, value in zip((distinct >> 32).tolist(), values, strict=True):
            name, unit = self._heads.get(one) or self._head(one)
            reading = "" if value != value else f": {format_value(value)}{unit}"
            made.append(f"{name}{reading}.")
        return [made[i] for i in inverse.tolist()]

    def _head(self, code: int) -> tuple[str, str]:
        """Name of a code, and what stands behind its value; remembered."""
        name, unit = self.name_of(code)
        self._heads[code] = (name, f" {unit}" if unit else "")
        return self._heads[code]

    def name_of(self, code: int) -> tuple[str, str]:
        """Name and unit of a code (its place in the vocabulary)."""
        text = self.store.vocabulary[code]
        name, unit = name_and_unit(text, self.store.descriptions, self._names, self.config.units)
        if self._item[code] >= 0 and text not in self._names and text not in self.store.descriptions:
            prefix = next(prefix for pair in self.config.continuous for prefix in pair if text.startswith(prefix))
            name = " ".join(text.removeprefix(prefix).split("//")).strip() or name
        return name, unit

    def _static(self, stay: Stay, row: int, code: np.ndarray, clock: np.ndarray) -> str:
        """``Age: 67 y. Sex: F. Charlson: 2.`` from static rows and from timed rows known at admission."""
        static = self.store.static_codes[slice(*self.store.static_offsets[row : row + 2])]
        codes = np.append(static, code[clock <= stay.icu_in_us])
        parts = [f"Age: {int(stay.age_years)} y."] if stay.age_years == stay.age_years else []
        for label, named in self._facts.items():
            found = codes[named[codes]]
            if len(found):
                parts.append(f"{label}: {self._head(int(found[0]))[0]}.")
        if self.config.charlson == "earlier":
            coded = self._charlson[code[clock < min(stay.hospital_in_us, stay.icu_in_us)]]
        else:
            coded = self._charlson[code[(clock >= stay.hospital_in_us) & (clock <= stay.hospital_out_us)]]
        if (coded >= 0).any():
            parts.append(f"Charlson: {charlson_score(coded[coded >= 0])}.")
        return " ".join(parts) or NO_STATIC


def match_intervals(
    item: np.ndarray, clock: np.ndarray, is_end: np.ndarray, limit_us: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Close every start by an end of its item: an end closes the oldest open start, at equal clocks ends come first.

    item, clock (us), is_end: [rows]. Returns, one entry a start: its row; its stop in us (start + limit_us if no end
    came by then); the row of its end, or -1.
    """
    stop, closer = clock + limit_us, np.full(len(clock), -1)
    open_: dict[int, deque[int]] = {}
    unused: dict[int, int] = {}  # an end that closed nothing may close a start of the same moment
    for row in np.lexsort((~is_end, clock)).tolist():
        queue = open_.setdefault(int(item[row]), deque())
        while queue and stop[queue[0]] < clock[row]:
            queue.popleft()
        if not is_end[row]:
            end = unused.pop(int(item[row]), -1)
            if end >= 0 and clock[end] == clock[row]:
                stop[row], closer[row] = clock[row], end
            else:
                queue.append(row)
        elif queue:
            start = queue.popleft()
            stop[start], closer[start] = clock[row], row
        else:
            unused[int(item[row])] = row
    starts = np.flatnonzero(~is_end)
    return starts, stop[starts], closer[starts]


def hourly_texts(
    store: EventStore,
    stay: Stay,
    config: HourlyTextConfig | None = None,
    names: Mapping[str, tuple[str, str]] | None = None,
) -> HourlyTexts:
    """The hourly texts of one stay; for many stays of a store make one ``TextWriter``."""
    return TextWriter(store, config, names)(stay)


def _latest(kept: np.ndarray, rows: _Rows, most: int) -> np.ndarray:
    """Of rows ordered by hour, the ``most`` latest of each hour, in the order they had."""
    by_clock = np.lexsort((rows.clock[kept], rows.hour[kept]))
    hour = rows.hour[kept][by_clock]
    left = np.searchsorted(hour, hour, side="right") - np.arange(len(hour))
    return kept[np.sort(by_clock[left <= most])]
