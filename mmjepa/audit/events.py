"""The flat event table that the checks read: arrays over all events, and what the codes mean."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

ADMISSION = re.compile(r"(HOSPITAL_)?ADMISSION(//|$)")
DISCHARGE = re.compile(r"(HOSPITAL_)?DISCHARGE(//|$)")
CODED_AFTERWARDS = re.compile(r"(DIAGNOSIS|DRG|BILLING)(//|$)")  # written by coders after the stay, about the stay
DIED = re.compile(r"\b(DIED|EXPIRED|DEAD|DEATH|DECEASED)\b", re.IGNORECASE)
DEATH = re.compile(r"MEDS_DEATH(//|$)")
BIRTH = re.compile(r"MEDS_BIRTH(//|$)")
DAY_US = 86_400_000_000
NEVER = np.iinfo(np.int64).max
ALWAYS = -(1 << 62)  # the time of static rows: before any prediction time, its distance to any is an int64


@dataclass(frozen=True)
class Stays:
    """Hospital admissions paired with the first later discharge of the same subject, sorted by (subject, start).

    subject: int64 index into the subjects. start_us, end_us: int64; an admission without a discharge ends ``NEVER``.
    """

    subject: np.ndarray
    start_us: np.ndarray
    end_us: np.ndarray

    def current(self, subject: np.ndarray, t_us: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each (subject, t): whether t lies in a stay (both ends included), its start and its end."""
        if not len(self.subject):
            return np.zeros(len(t_us), bool), np.zeros(len(t_us), np.int64), np.zeros(len(t_us), np.int64)
        rank = Ranks(np.concatenate([self.start_us, t_us]))
        at = np.searchsorted(rank.key(self.subject, self.start_us), rank.key(subject, t_us), side="right") - 1
        found = at.clip(0)
        inside = (at >= 0) & (self.subject[found] == subject) & (t_us <= self.end_us[found])
        return inside, self.start_us[found], self.end_us[found]


class Ranks:
    """Turns (subject, time) into one sortable int64."""

    def __init__(self, times_us: np.ndarray) -> None:
        self._times = np.unique(times_us)

    def key(self, subject: np.ndarray, times_us: np.ndarray) -> np.ndarray:
        return (subject.astype(np.int64) << 32) + np.searchsorted(self._times, times_us, side="right")


@dataclass(frozen=True)
class Events:
    """All events of a cohort, flat.

    subjects [S] int64 ids; subject [E] int64 index into them; times_us, available_us [E] int64; codes [E] int32 into
    vocabulary [C] str; values [E] float32, NaN where there is none.
    """

    subjects: np.ndarray
    subject: np.ndarray
    times_us: np.ndarray
    available_us: np.ndarray
    codes: np.ndarray
    values: np.ndarray
    vocabulary: np.ndarray

    @classmethod
    def of(cls, store: Any) -> "Events":
        """From an event store of ``mmjepa.ehr``. Births are left out: they date a subject, nothing was observed."""
        lengths = np.diff(store.offsets)
        codes, vocabulary = np.asarray(store.codes), np.asarray(store.vocabulary, dtype=object)
        keep = ~np.fromiter((bool(BIRTH.match(code)) for code in vocabulary), bool)[codes]
        return cls(
            subjects=np.asarray(store.subjects),
            subject=np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)[keep],
            times_us=np.asarray(store.times_us)[keep],
            available_us=np.asarray(store.available_us)[keep],
            codes=codes[keep],
            values=np.asarray(store.values)[keep],
            vocabulary=vocabulary,
        )

    @classmethod
    def visible(cls, store: Any) -> "Events":
        """As ``of``, and before them each subject's static rows, known ``ALWAYS``: what an input may show at some time."""
        timed, static = cls.of(store), np.asarray(store.static_codes)
        owner = np.repeat(np.arange(len(store.subjects), dtype=np.int64), np.diff(store.static_offsets))
        subject = np.concatenate([owner, timed.subject])
        order = np.argsort(subject, kind="stable")
        always = np.full(len(static), ALWAYS)
        return cls(
            subjects=timed.subjects,
            subject=subject[order],
            times_us=np.concatenate([always, timed.times_us])[order],
            available_us=np.concatenate([always, timed.available_us])[order],
            codes=np.concatenate([static.astype(timed.codes.dtype), timed.codes])[order],
            values=np.concatenate([np.asarray(store.static_values), timed.values])[order],
            vocabulary=timed.vocabulary,
        )

    def matching(self, pattern: re.Pattern[str], also: re.Pattern[str] | None = None) -> np.ndarray:
        """[E] bool: events whose code starts with ``pattern`` (and holds ``also`` anywhere)."""
        hit = [bool(pattern.match(code)) and (also is None or bool(also.search(code))) for code in self.vocabulary]
        return np.asarray(hit, bool)[self.codes]

    def by_time(self, which: np.ndarray) -> np.ndarray:
        """The indices where ``which`` [E] is true, sorted by (subject, time)."""
        rows = np.flatnonzero(which)
        return rows[np.lexsort((self.times_us[rows], self.subject[rows]))]

    @cached_property
    def stays(self) -> Stays:
        """The hospital stays; empty where the codes name none."""
        starts, ends = self.by_time(self.matching(ADMISSION)), self.by_time(self.matching(DISCHARGE))
        if not len(starts) or not len(ends):
            return Stays(self.subject[starts], self.times_us[starts], np.full(len(starts), NEVER))
        ranks = Ranks(self.times_us[np.concatenate([starts, ends])])
        end_keys, start_keys = (ranks.key(self.subject[rows], self.times_us[rows]) for rows in (ends, starts))
        after = np.searchsorted(end_keys, start_keys, side="right")
        found = ends[after.clip(max=len(ends) - 1)]
        same = (after < len(ends)) & (self.subject[found] == self.subject[starts])
        return Stays(self.subject[starts], self.times_us[starts], np.where(same, self.times_us[found], NEVER))

    @cached_property
    def recorded_deaths_us(self) -> np.ndarray:
        """[S] int64: the death time as recorded; ``NEVER`` where there is none."""
        deaths = np.full(len(self.subjects), NEVER)
        dead = self.matching(DEATH)
        np.minimum.at(deaths, self.subject[dead], self.times_us[dead])
        return deaths

    @cached_property
    def deaths_us(self) -> np.ndarray:
        """[S] int64: the last moment a subject may have been alive; ``NEVER`` where no death is recorded.

        A death at midnight sharp is a date without an hour, read as 23:59:59 of that day.
        """
        deaths = self.recorded_deaths_us
        return np.where((deaths != NEVER) & (deaths % DAY_US == 0), deaths + DAY_US - 1_000_000, deaths)

    @cached_property
    def first_us(self) -> np.ndarray:
        """[S] int64: when the first event of each subject became known; ``NEVER`` where there is none."""
        first = np.full(len(self.subjects), NEVER)
        np.minimum.at(first, self.subject, self.available_us)
        return first

    @cached_property
    def last_us(self) -> np.ndarray:
        """[S] int64: when the last event of each subject became known; -``NEVER`` where there is none."""
        last = np.full(len(self.subjects), -NEVER)
        np.maximum.at(last, self.subject, self.available_us)
        return last

    def first_seen(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(subject, code, first available time) of each pair that occurs, sorted by (code, subject)."""
        order = np.lexsort((self.available_us, self.subject, self.codes))
        subject, code = self.subject[order], self.codes[order]
        first = np.ones(len(order), bool)
        first[1:] = (subject[1:] != subject[:-1]) | (code[1:] != code[:-1])
        return subject[first], code[first], self.available_us[order][first]
