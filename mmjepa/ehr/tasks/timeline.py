"""Where the events of each predicate lie: counts in windows and next or last events, for all rows of a task at once."""

import re

import numpy as np
import pandas as pd

from mmjepa.ehr.stays import DAY_US
from mmjepa.ehr.store import EventStore, to_us
from mmjepa.ehr.tasks.language import ANY_EVENT, FollowUp, Predicate, Task
from mmjepa.refusal import Refusal

EVER = np.int64(2**62)  # past every time; its negative is before every time
SECOND_US = 1_000_000


class Timeline:
    """The timed events that a task looks at, as sorted integer keys (subject, rank of the time), repeated as often as rows.

    extra: further events (subject_id, time, code, perhaps numeric_value) of subjects of the store, an onset table for instance.
    Raises Refusal TASK_PREDICATE when a predicate fits no code that the store lists or ``extra`` holds: its label would
    silently be false for everyone.
    """

    def __init__(self, store: EventStore, task: Task, extra: pd.DataFrame | None = None) -> None:
        self._store, self._task = store, task
        self._extra = _extra_events(store, extra)
        self._vocabulary = np.asarray([*store.vocabulary, *self._extra["code"].unique()], object)
        self._deaths = self._matching(Predicate(regex=r"^MEDS_DEATH(//|$)"))
        rows = {name: self._rows(name) for name in task.used if task.predicates[name].how is None}
        rows[ANY_EVENT] = (
            self._any_event() if _needs_any_event(task) else (np.zeros(0, np.int64), np.zeros(0, np.int64))
        )
        self._times = np.unique(np.concatenate([times for _, times in rows.values()]))
        self._step = np.int64(len(self._times) + 1)
        self._keys = {
            name: np.sort(subject * self._step + np.searchsorted(self._times, times))
            for name, (subject, times) in rows.items()
        }
        self._keys[ANY_EVENT] = np.unique(self._keys[ANY_EVENT])
        for name in task.used:
            if (rule := task.predicates[name]).how is not None:
                self._keys[name] = self._combined(rule)

    def all(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(row of the subject, time in us) of every moment at which a predicate holds, [n] int64 each."""
        keys = np.unique(self._keys[name])
        return keys // self._step, self._times[keys % self._step]

    def count(
        self, name: str, subject: np.ndarray, low: np.ndarray, high: np.ndarray, inclusive: tuple[bool, bool]
    ) -> np.ndarray:
        """[n] int64: events of a predicate from low to high (us), each end included or not."""
        first = np.searchsorted(self._keys[name], self._edge(subject, low, "left" if inclusive[0] else "right"))
        stop = np.searchsorted(self._keys[name], self._edge(subject, high, "right" if inclusive[1] else "left"))
        return (stop - first).clip(0)

    def next(self, name: str, subject: np.ndarray, t_us: np.ndarray, *, at: bool) -> tuple[np.ndarray, np.ndarray]:
        """(time in us, bool: there is one) [n] of the first event after t, or at it where ``at``."""
        place = np.searchsorted(self._keys[name], self._edge(subject, t_us, "left" if at else "right"))
        return self._at(name, subject, place)

    def last(self, name: str, subject: np.ndarray, t_us: np.ndarray, *, at: bool) -> tuple[np.ndarray, np.ndarray]:
        """(time in us, bool: there is one) [n] of the last event before t, or at it where ``at``."""
        place = np.searchsorted(self._keys[name], self._edge(subject, t_us, "right" if at else "left")) - 1
        return self._at(name, subject, place)

    def codes(self, name: str) -> np.ndarray:
        """The codes that a predicate is made of, sorted."""
        if name == ANY_EVENT:
            return self._vocabulary
        rule = self._task.predicates[name]
        if rule.how is None:
            return np.sort(self._vocabulary[self._matching(rule)])
        return np.unique(np.concatenate([self.codes(part) for part in rule.parts]))

    def only_dates(self) -> tuple[np.ndarray, np.ndarray]:
        """(row of the subject, midnight in us) of the deaths whose time is a bare date, as they are stamped."""
        subject, times, _ = self._select(self._deaths)
        bare = times % DAY_US == 0
        return subject[bare], times[bare]

    def death_us(self) -> np.ndarray:
        """[subjects] int64: the first death as the task counts it, ``EVER`` without one."""
        subject, times, _ = self._select(self._deaths)
        found = np.full(len(self._store.subjects), EVER)
        np.minimum.at(found, subject, self._as_counted(times))
        return found

    def followed_until_us(self, follow_up: FollowUp, label: str) -> np.ndarray:
        """[subjects] int64: until when the label's events would be known: the last event, or longer where declared."""
        names = "|".join(map(re.escape, follow_up.known_after_last_event))
        declared = self._matching(Predicate(regex=rf"^({names})(//|$)" if names else r"(?!)"))
        longer = set(self.codes(label)) <= set(self._vocabulary[declared])
        others = ~declared if longer else np.ones(len(self._vocabulary), bool)
        subject, times, _ = self._select(others)
        found = np.full(len(self._store.subjects), -EVER)
        np.maximum.at(found, subject, times)
        return found + (round(follow_up.days * DAY_US) if longer else 0)

    def _edge(self, subject: np.ndarray, t_us: np.ndarray, side: str) -> np.ndarray:
        rank = np.searchsorted(self._times, t_us, side="left" if side == "left" else "right")
        return subject * self._step + rank

    def _at(self, name: str, subject: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        keys = self._keys[name]
        if not len(keys):
            return np.full(len(subject), EVER), np.zeros(len(subject), bool)
        key = keys[place.clip(0, len(keys) - 1)]
        there = (place >= 0) & (place < len(keys)) & (key // self._step == subject)
        return np.where(there, self._times[key % self._step * there], EVER), there

    def _combined(self, rule: Predicate) -> np.ndarray:
        parts = [np.unique(self._keys[part]) for part in rule.parts]
        keys, how_many = np.unique(np.concatenate(parts), return_counts=True)
        return keys if rule.how == "or" else keys[how_many == len(parts)]

    def _matching(self, rule: Predicate) -> np.ndarray:
        """bool [vocabulary]."""
        if rule.regex is None:
            return np.isin(self._vocabulary, rule.codes)
        pattern = re.compile(rule.regex)
        return np.fromiter((bool(pattern.search(code)) for code in self._vocabulary), bool, len(self._vocabulary))

    def _rows(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        rule = self._task.predicates[name]
        wanted = self._matching(rule)
        if not wanted.any():
            raise Refusal(
                "TASK_PREDICATE",
                f"predicate {name} of task {self._task.name} fits no code of this cohort",
                "Correct it in the predicates file, or give the events with --events",
            )
        subject, times, values = self._select(wanted)
        keep = np.ones(len(times), bool)
        if rule.value_min is not None:
            keep &= values >= rule.value_min if rule.value_min_inclusive else values > rule.value_min
        if rule.value_max is not None:
            keep &= values <= rule.value_max if rule.value_max_inclusive else values < rule.value_max
        if self._task.extras.midnight_deaths == "end_of_day" and (wanted & self._deaths).any():
            if (wanted & ~self._deaths).any():
                raise Refusal("TASK_PREDICATE", f"predicate {name} mixes deaths with other codes", "Join two with expr")
            times = self._as_counted(times)
        return subject[keep], times[keep]

    def _as_counted(self, deaths_us: np.ndarray) -> np.ndarray:
        """Times of deaths, bare dates at the end of their day where the task says so."""
        late = (deaths_us % DAY_US == 0) & (self._task.extras.midnight_deaths == "end_of_day")
        return np.where(late, deaths_us + DAY_US - SECOND_US, deaths_us)

    def _select(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Subject rows, times (us) and values of the timed rows whose code is wanted."""
        store, extra = self._store, self._extra
        rows = np.flatnonzero(wanted[: len(store.vocabulary)][np.asarray(store.codes)])
        subject = np.searchsorted(store.offsets, rows, side="right") - 1
        more = extra[extra["code"].isin(self._vocabulary[wanted])]
        return (
            np.concatenate([subject, more["row"].to_numpy(np.int64)]),
            np.concatenate([np.asarray(store.times_us)[rows], more["time_us"].to_numpy(np.int64)]),
            np.concatenate([np.asarray(store.values)[rows], more["value"].to_numpy(np.float32)]),
        )

    def _any_event(self) -> tuple[np.ndarray, np.ndarray]:
        (alive, times, _), (dead, deaths, _) = self._select(~self._deaths), self._select(self._deaths)
        return np.concatenate([alive, dead]), np.concatenate([times, self._as_counted(deaths)])


def _needs_any_event(task: Task) -> bool:
    bounds = [bound.predicate for window in task.windows for bound in (window.start, window.end)]
    counted = [name for window in task.windows for name in (*window.has, window.label)]
    parts = [part for name in task.used for part in task.predicates[name].parts]
    return ANY_EVENT in (task.trigger, *bounds, *counted, *parts)


def _extra_events(store: EventStore, extra: pd.DataFrame | None) -> pd.DataFrame:
    """row, time_us, code, value. Raises Refusal EVENTS_SCHEMA, SUBJECT_UNKNOWN."""
    if extra is None:
        return pd.DataFrame({"row": [], "time_us": [], "code": [], "value": []}).astype(
            {"row": np.int64, "time_us": np.int64, "code": object, "value": np.float32}
        )
    values = extra["numeric_value"] if "numeric_value" in extra else np.full(len(extra), np.nan, np.float32)
    times, codes = to_us(extra["time"]), extra["code"].to_numpy(object)
    rows = store.rows(extra["subject_id"].to_numpy(np.int64))
    return pd.DataFrame({"row": rows, "time_us": times, "code": codes, "value": np.asarray(values, np.float32)})
