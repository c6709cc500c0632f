"""A task on an event store: its rows, their labels, and how many rows each step leaves."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from mmjepa.ehr.stays import DAY_US
from mmjepa.ehr.store import EventStore
from mmjepa.ehr.tasks.language import Bound, FollowUp, Task, Window
from mmjepa.ehr.tasks.timeline import EVER, SECOND_US, Timeline
from mmjepa.refusal import Refusal


@dataclass(frozen=True)
class FlowStep:
    """What one step leaves. reads_until_days: how far after the prediction time its criterion looks (0: not at all).

    kind: ``cohort`` (who is in), or ``censored`` (who is lost before the outcome could be known), or ``merged`` (rows of one
    subject and prediction time made one, which loses no subject).
    """

    step: str
    kind: str
    rows: int
    positive_rows: int
    subjects: int
    positives: int
    reads_until_days: float


@dataclass(frozen=True)
class Labelled:
    """frame: subject_id int64, prediction_time datetime64[us], boolean_value, sorted. codes: what the label is made of.

    window_days: from and to, days after the prediction time, where the label's window is of one length; else None.
    """

    frame: pd.DataFrame
    flow: tuple[FlowStep, ...]
    codes: tuple[str, ...]
    window_days: tuple[float, float] | None


def evaluate(store: EventStore, task: Task, extra: pd.DataFrame | None = None) -> Labelled:
    """Label a store. Windows, ends and counts are those of ACES 0.7; see ``language.Extras`` for what goes beyond it.

    extra: see ``Timeline``. The order of work is that of the flow: triggers; the dead; each window's existence and ``has``;
    deaths of an unknown hour in windows under a day; the lost; triggers of one prediction time made one row. Raises Refusal
    TASK_PREDICATE, TASK_WINDOW (a label window that opens before the prediction time, or ends before it opens), TASK_AMBIGUOUS,
    SUBJECT_UNKNOWN.
    """
    return _Evaluation(store, task, Timeline(store, task, extra)).run()


class _Evaluation:
    def __init__(self, store: EventStore, task: Task, line: Timeline) -> None:
        self.store, self.task, self.line = store, task, line
        self.subject, trigger = line.all(task.trigger)
        self.ends = {"trigger": trigger}
        self.exists = {"trigger": np.ones(len(trigger), bool)}
        self.alive = np.ones(len(trigger), bool)
        self.flow: list[FlowStep] = []

    def run(self) -> Labelled:
        task = self.task
        for window in task.windows:
            self._place(window)
        label, index = task.label_window, task.index_window
        self.t_us = self.ends[f"{index.name}.{index.index_timestamp}"]
        events = self._count(label, str(label.label))
        self.present = (events > 0) & self.exists[label.name]
        self.y = self.present if task.extras.true_when == "present" else ~self.present & self.exists[label.name]
        self._note(f"trigger {task.trigger}", "cohort", 0.0)
        if task.extras.follow_up:
            self._leave_out_dead(self.exists[index.name])
        for window in task.windows:
            self._require(window)
        self._check_label_window(label)
        self._leave_out_unknown_hours(label)
        if task.extras.follow_up:
            self._leave_out_lost(label)
        self._merge()
        keep = np.flatnonzero(self.alive)
        return Labelled(
            self._frame(keep), tuple(self.flow), tuple(self.line.codes(str(label.label))), self._days(label, keep)
        )

    def _place(self, window: Window) -> None:
        """The times of a window's two ends; an end that refers to the other comes second."""
        order = ("end", "start") if window.start.reference == "end" else ("start", "end")
        exists = np.ones(len(self.subject), bool)
        for side in order:
            bound: Bound = getattr(window, side)
            inclusive = window.end_inclusive if bound.arrow == "->" else window.start_inclusive
            if bound.reference is None:
                times = np.full(len(self.subject), -EVER if side == "start" else EVER)
            else:
                name = f"{window.name}.{bound.reference}" if bound.reference in ("start", "end") else bound.reference
                exists &= self.exists.get(name.split(".")[0], True)
                times = self.ends[name] + bound.offset_us
                if bound.arrow:  # ACES lets the far end lie at the near one when the far end is included
                    find = self.line.next if bound.arrow == "->" else self.line.last
                    times, there = find(bound.predicate, self.subject, times, at=inclusive)
                    exists &= there
            self.ends[f"{window.name}.{side}"] = times
        self.exists[window.name] = exists

    def _count(self, window: Window, predicate: str) -> np.ndarray:
        low, high = self.ends[f"{window.name}.start"], self.ends[f"{window.name}.end"]
        return self.line.count(predicate, self.subject, low, high, (window.start_inclusive, window.end_inclusive))

    def _require(self, window: Window) -> None:
        end, is_label = self.ends[f"{window.name}.end"], window.label is not None
        if not self.exists[window.name][self.alive].all():
            self.alive &= self.exists[window.name]
            self._note(f"{window.name} has both ends", "censored" if is_label else "cohort", self._reach(end))
        for predicate, (low, high) in window.has.items():
            counts = self._count(window, predicate)
            self.alive &= counts >= (low or 0)
            if high is not None:
                self.alive &= counts <= high
            limits = f"{low or 0}..{'' if high is None else high}"
            self._note(f"{window.name} has {limits} {predicate}", "cohort", self._reach(end))

    def _check_label_window(self, label: Window) -> None:
        low, high = self.ends[f"{label.name}.start"], self.ends[f"{label.name}.end"]
        for wrong, says in (
            (low < self.t_us, "opens before the prediction time"),
            (high < low, "ends before it opens"),
        ):
            if (rows := int((wrong & self.alive).sum())) > 0:
                raise Refusal(
                    "TASK_WINDOW",
                    f"label window {label.name} of task {self.task.name} {says} in {rows} of {int(self.alive.sum())} rows",
                    "Let it open at the prediction time or later, or leave such rows out by the has of another window",
                )

    def _leave_out_unknown_hours(self, label: Window) -> None:
        """A death known by its date alone says nothing within a day: rows whose window touches that day are left out."""
        if self.task.extras.midnight_deaths == "as_stamped" or not any(
            code.startswith("MEDS_DEATH") for code in self.line.codes(str(label.label))
        ):
            return
        start, end = self.ends[f"{label.name}.start"], self.ends[f"{label.name}.end"]
        short = label.end.arrow == "" and label.end.reference is not None
        short = (end - start < DAY_US) if short else np.zeros(len(end), bool)
        day = np.full(len(self.store.subjects), EVER)
        subject, midnight = self.line.only_dates()
        day[subject] = midnight
        mine = day[self.subject]
        touched = (mine != EVER) & (mine <= end) & (mine + DAY_US > start)
        if (short & touched & self.alive).any():
            self.alive &= ~(short & touched)
            self._note("the hour of death is known within a day's window", "censored", self._reach(end))

    def _leave_out_dead(self, known: np.ndarray) -> None:
        """Rows at or after a death are no survivors; ``known``: where there is a prediction time."""
        dead = known & (self.line.death_us()[self.subject] <= self.t_us)
        if (dead & self.alive).any():
            self.alive &= ~dead
            self._note("alive at the prediction time", "cohort", 0.0)

    def _leave_out_lost(self, label: Window) -> None:
        end = self.ends[f"{label.name}.end"]
        until = self.line.followed_until_us(self.task.follow_up, str(label.label))[self.subject]
        died = self.line.death_us()[self.subject] <= end
        self.alive &= self.present | (until >= end) | died
        self._note("followed to the end of the label window, or to the event or death", "censored", self._reach(end))

    def _merge(self) -> None:
        """Triggers that lead to one prediction time of a subject are one row."""
        keep = np.flatnonzero(self.alive)
        rows = pd.DataFrame({"subject": self.subject[keep], "t": self.t_us[keep], "y": self.y[keep]})
        again = rows.duplicated(["subject", "t"]).to_numpy()
        if (again & ~rows.duplicated().to_numpy()).any():
            raise Refusal(
                "TASK_AMBIGUOUS",
                f"two triggers of task {self.task.name} lead to one prediction time with different labels",
                "Let the label window hang on the prediction time alone",
            )
        if again.any():
            self.alive[keep[again]] = False
            self._note("triggers of one prediction time are one row", "merged", 0.0)

    def _reach(self, end_us: np.ndarray) -> float:
        """Days after the prediction time to which a window's end reads; an open end counts to the last event there is."""
        ends = end_us[self.alive]
        latest = self.line.followed_until_us(FollowUp(), str(self.task.label_window.label))
        ends = np.minimum(ends, latest[self.subject[self.alive]]) if (ends >= EVER).any() else ends
        return float(max(0, (ends - self.t_us[self.alive]).max(initial=0)) / DAY_US)

    def _note(self, step: str, kind: str, reads_until_days: float) -> None:
        positive = self.alive & self.y
        subjects, positives = len(np.unique(self.subject[self.alive])), len(np.unique(self.subject[positive]))
        rows, positive_rows = int(self.alive.sum()), int(positive.sum())
        self.flow.append(FlowStep(step, kind, rows, positive_rows, subjects, positives, round(reads_until_days, 6)))

    def _frame(self, keep: np.ndarray) -> pd.DataFrame:
        frame = pd.DataFrame(
            {
                "subject_id": np.asarray(self.store.subjects, np.int64)[self.subject[keep]],
                "prediction_time": self.t_us[keep].view("datetime64[us]"),
                "boolean_value": self.y[keep],
            }
        )
        return frame.sort_values(["subject_id", "prediction_time"], ignore_index=True)

    def _days(self, label: Window, keep: np.ndarray) -> tuple[float, float] | None:
        low, high = (self.ends[f"{label.name}.{side}"][keep] - self.t_us[keep] for side in ("start", "end"))
        if not len(keep) or np.ptp(low) > SECOND_US or np.ptp(high) > SECOND_US or abs(high[0]) > EVER // 2:
            return None
        return float(low[0] / DAY_US), float(high[0] / DAY_US)
