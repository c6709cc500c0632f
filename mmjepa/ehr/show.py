"""Some hours of one ICU stay in all four forms beside the raw rows, for a person to compare by eye."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmjepa.cohort import Cohort
from mmjepa.ehr.daily import DailyForm
from mmjepa.ehr.encounters import EncounterForm
from mmjepa.ehr.names import read_names
from mmjepa.ehr.stays import DAY_US, EXCLUDED, HOUR_US, Stay, derive_stays, iterate
from mmjepa.ehr.store import EventStore
from mmjepa.ehr.text import TextWriter
from mmjepa.ehr.tokens import FIRST, JointTokens
from mmjepa.refusal import Refusal

FIT_ON = 1000  # training subjects: enough to look at, and a large cohort takes no longer than a small one
BLOCK = 64  # subjects looked at together for the first that has a stay


def show_forms(
    cohort: Path | str,
    subject_id: int | None = None,
    *,
    stay: int = 0,
    hours: tuple[int, int] = (0, 1),
    names: Path | None = None,
) -> dict[str, Any]:
    """Raw rows and the four forms of the hours [first, last) of a subject's ICU stay number ``stay`` (from 0).

    subject_id: None takes the first who has such a stay. Forms are fitted on at most FIT_ON subjects of the training split,
    of everybody where there is none. Times are hours since the admission to the unit; no id and no date is given back. The
    daily text is cut to the days of these hours; encounters are empty too where the cohort has no hospital stays.
    Raises Refusal: COHORT_*, SUBJECT_UNKNOWN, STAY_UNKNOWN, HOURS_OUTSIDE, NAMES_*.
    """
    store, named = Cohort.open(cohort).events(), read_names(names) if names else None
    found = _stay(store, subject_id, stay)
    low, high = hours
    if not 0 <= low < high <= found.hours:
        raise Refusal(
            "HOURS_OUTSIDE", f"the stay has hours 0 to {found.hours}, not {low} to {high}", "Name hours of the stay"
        )
    train, subject_id = store.splits.get("train", store.subjects)[:FIT_ON], found.subject_id
    edges = found.icu_in_us + low * HOUR_US, found.icu_in_us + high * HOUR_US - 1
    _, ends = store.as_of(np.array([subject_id, subject_id]), np.array([edges[0] - 1, edges[1]]))
    rows = np.arange(*ends)
    texts = TextWriter(store, names=named)(found)
    daily = DailyForm.fit(store, train, names=named).text(store, subject_id, edges[1])
    return {
        "hours": [low, high],
        "rows": _rows(store, found, rows),
        "hourly": {"static": texts.static, "state": texts.state[low:high], "action": texts.action[low:high]},
        "daily": _days_of(daily, len(np.unique(store.times_us[rows] // DAY_US))),
        "tokens": _tokens(store, JointTokens.fit(store, train), subject_id, rows, edges[1]),
        "encounters": _encounters(store, train, named, subject_id, edges[1]),
    }


def print_forms(result: Mapping[str, Any]) -> None:
    """On standard output, one form after the other."""
    hourly = result["hourly"]
    parts = {
        "raw rows (hour, hour when known, code, value)": [_line(row) for row in result["rows"]],
        "hourly text, static": [hourly["static"]],
        "hourly text, state": hourly["state"],
        "hourly text, action": hourly["action"],
        "daily text of these days": result["daily"].splitlines(),
        "joint tokens (token, code, z-score, days to the end of these hours)": [_line(row) for row in result["tokens"]],
        "encounters that had ended by then (day, tokens, codes)": [_line(row) for row in result["encounters"]],
    }
    for title, lines in parts.items():
        print(f"== {title}: {len(lines)} line{'s' * (len(lines) != 1)}", *lines, sep="\n")


def _stay(store: EventStore, subject_id: int | None, number: int) -> Stay:
    """The stay, found without going through the whole cohort."""
    if subject_id is None:
        for low in range(0, len(store.subjects), BLOCK):
            for one in iterate(derive_stays(_part(store, low, low + BLOCK))[0]):
                if one.stay == number:
                    return one
        raise Refusal("STAY_UNKNOWN", f"nobody has an ICU stay number {number} that is kept")
    row = store.row(subject_id)
    stays, counts = derive_stays(_part(store, row, row + 1))
    for one in iterate(stays):
        if one.stay == number:
            return one
    known = ", ".join(str(one) for one in stays["stay"]) or "none"
    left = ", ".join(f"{reason} {counts[reason]}" for reason in EXCLUDED if counts[reason]) or "none"
    raise Refusal(
        "STAY_UNKNOWN", f"the subject has no ICU stay number {number}; stays that are kept: {known}; left out: {left}"
    )


def _part(store: EventStore, low: int, high: int) -> EventStore:
    """The timed rows of the subjects in rows [low, high), all that stays are derived from."""
    offsets = np.asarray(store.offsets[low : high + 1])
    inside = slice(int(offsets[0]), int(offsets[-1]))
    rows = {name: getattr(store, name)[inside] for name in ("times_us", "available_us", "codes", "values", "hadm_id")}
    return replace(store, subjects=store.subjects[low:high], offsets=offsets - offsets[0], **rows)


def _rows(store: EventStore, stay: Stay, rows: np.ndarray) -> list[list[Any]]:
    hours = [
        np.round((np.asarray(at[rows]) - stay.icu_in_us) / HOUR_US, 4) for at in (store.times_us, store.available_us)
    ]
    codes = [store.vocabulary[code] for code in store.codes[rows]]
    return [list(row) for row in zip(*(at.tolist() for at in hours), codes, _numbers(store.values[rows]), strict=True)]


def _days_of(text: str, days: int) -> str:
    """The header and the last days of a daily text."""
    header, *sections = text.split("\n\n")
    return "\n\n".join([header, *sections[len(sections) - min(days, len(sections)) :]])


def _tokens(store: EventStore, tokens: JointTokens, subject_id: int, rows: np.ndarray, t_us: int) -> list[list[Any]]:
    if not len(rows):
        return []
    row = store.row(subject_id)
    most = len(rows) + int(store.static_offsets[row + 1] - store.static_offsets[row])
    made = tokens.encode(store, subject_id, int(rows[0]), int(rows[-1]) + 1, t_us, most)
    ids = made["codes"].tolist()
    codes = [tokens.codes[token - FIRST] if token >= FIRST else "unknown" for token in ids]
    scores = _numbers(np.where(made["has_value"], made["values"], np.nan))
    return [list(row) for row in zip(ids, codes, scores, made["days"].round(5).tolist(), strict=True)]


def _encounters(
    store: EventStore, train: np.ndarray, names: Mapping[str, tuple[str, str]] | None, subject_id: int, t_us: int
) -> list[list[Any]]:
    try:
        form = EncounterForm.fit(store, train, names=names)
    except Refusal as refusal:
        if refusal.code == "ENCOUNTERS_EMPTY":
            return []
        raise
    known = form.of(store, subject_id, t_us)
    return [[round(visit.day, 4), form.encode(visit).tolist(), [*visit.codes, *visit.drugs]] for visit in known]


def _numbers(values: np.ndarray) -> list[float | None]:
    return [None if value != value else value for value in np.asarray(values).tolist()]


def _line(row: list[Any]) -> str:
    return "  ".join("-" if cell is None else f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in row)
