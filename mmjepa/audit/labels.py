"""Checks of one task's labels against the record: is the time knowable, does the input give the answer away."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import gammaln

from mmjepa.audit.events import CODED_AFTERWARDS, DEATH, DIED, DISCHARGE, NEVER, Events, Ranks
from mmjepa.audit.finding import Finding, judge, not_applicable
from mmjepa.audit.scan import MIN_CLASS, SIGNIFICANT, Rows, grouped_auroc, out_of_fold_auroc, record_size

TOO_GOOD, BY_SIZE = 0.95, 0.60
TOO_FEW = f"fewer than {MIN_CLASS} subjects in a class"


@dataclass(frozen=True)
class Task:
    """Labels of one task, matched to the subjects.

    subject [N] int64 index into the cohort's subjects, -1 for a stranger; t_us [N] int64; y [N] float: 0, 1, or NaN where the
    task is not binary; subject_id, place [N] int64: the subject's number and the row's place in the label files.
    """

    name: str
    subject: np.ndarray
    t_us: np.ndarray
    y: np.ndarray
    subject_id: np.ndarray
    place: np.ndarray

    @classmethod
    def of(cls, name: str, table: pd.DataFrame, events: Events) -> "Task":
        """From a cohort's label table with the column ``place`` added."""
        binary = table["value"].dtype == bool
        return cls(
            name=name,
            subject=pd.Index(events.subjects).get_indexer(pd.Index(table["subject_id"])).astype(np.int64),
            t_us=table["prediction_time"].to_numpy("datetime64[us]").astype(np.int64),
            y=table["value"].to_numpy(float) if binary else np.full(len(table), np.nan),
            subject_id=table["subject_id"].to_numpy(np.int64),
            place=table["place"].to_numpy(np.int64),
        )

    @property
    def binary(self) -> np.ndarray:
        """[N] bool: rows of known subjects with a yes or a no."""
        return (self.subject >= 0) & ~np.isnan(self.y)

    def rows(self) -> Rows:
        """The binary rows."""
        return Rows(self.subject[self.binary], self.t_us[self.binary], self.y[self.binary])


def time_is_knowable(events: Events, task: Task) -> list[Finding]:
    """Check 4: prediction times inside the record of a known subject, while alive."""
    strangers = int((task.subject < 0).sum())
    subject, t_us = task.subject[task.subject >= 0], task.t_us[task.subject >= 0]
    dead = int((t_us > events.deaths_us[subject]).sum())
    first, last = np.full(len(events.subjects), NEVER), np.full(len(events.subjects), -NEVER)
    np.minimum.at(first, events.subject, events.available_us)
    np.maximum.at(last, events.subject, events.available_us)
    outside = int(((t_us < first[subject]) | (t_us > last[subject])).sum())
    return [
        judge(
            "4",
            "label of an unknown subject",
            strangers,
            f"{strangers} label rows name no subject of the cohort",
            "Drop them",
        ),
        judge(
            "4b",
            "prediction after death",
            dead,
            f"{dead} prediction times lie after the death",
            "Drop them: the label is known then",
        ),
        judge(
            "4c",
            "prediction outside the record",
            outside,
            f"{outside} prediction times lie before the first or after the last thing known of the subject",
            "Look at how the times were made: nothing is observed there",
            fires="warn",
        ),
    ]


def outcome_in_input(events: Events, task: Task) -> Finding:
    """Check 7: death codes and discharges that spell death, visible as of the prediction time."""
    telling = events.matching(DEATH) | events.matching(DISCHARGE, also=DIED)
    seen = np.full(len(events.subjects), NEVER)
    np.minimum.at(seen, events.subject[telling], events.available_us[telling])
    known = task.subject >= 0
    count = int((seen[task.subject[known]] <= task.t_us[known]).sum())
    sentence = f"{count} prediction times see a code that says the subject has died"
    return judge(
        "7c", "death code in the input", count, sentence, "Move the prediction times before it, or drop the rows"
    )


def stay_coding_in_input(events: Events, task: Task) -> Finding:
    """Check 6: diagnosis or DRG rows of the current stay, visible as of the prediction time."""
    coded = events.matching(CODED_AFTERWARDS)
    name = "same-stay diagnoses in the input"
    if not coded.any() or not len(events.stays.subject):
        return not_applicable("6c", name, "the record has no stays with diagnosis rows")
    rows = np.flatnonzero(coded)
    rows = rows[np.lexsort((events.available_us[rows], events.subject[rows]))]
    known = task.subject >= 0
    subject, t_us = task.subject[known], task.t_us[known]
    inside, start_us, _ = events.stays.current(subject, t_us)
    ranks = Ranks(np.concatenate([events.available_us[rows], t_us, start_us]))
    keys = ranks.key(events.subject[rows], events.available_us[rows])
    # a row stamped exactly at the admission describes an earlier stay that ended then
    before = np.searchsorted(keys, ranks.key(subject, start_us), side="right")
    count = int((inside & (np.searchsorted(keys, ranks.key(subject, t_us), side="right") > before)).sum())
    sentence = f"{count} prediction times see diagnosis or DRG rows of the stay they lie in"
    return judge("6c", name, count, sentence, "Predict before the discharge, or block these codes for this task")


def one_to_one_codes(found: pd.DataFrame, rows: Rows) -> Finding:
    """Check 5: a code whose presence as of the prediction time is the label, one to one."""
    name = "codes one-to-one with the label"
    positive, negative = rows.class_sizes()
    if min(positive, negative) < 2:
        return not_applicable("5", name, "fewer than 2 subjects in a class")
    ways = gammaln(positive + negative + 1) - gammaln(positive + 1) - gammaln(negative + 1)
    if ways < np.log(max(len(found), 1) / SIGNIFICANT):
        return not_applicable("5", name, "too few subjects to tell it from chance")
    codes = found.loc[found["agrees"], "code"].tolist()
    sentence = f"{len(codes)} codes are present exactly where the label is true, or false" + _named(codes)
    return judge("5", name, len(codes), sentence, "They are the label: block them or mend the prediction times")


def single_features(found: pd.DataFrame, rows: Rows) -> Finding:
    """Check 9: one code's presence or last value separates the classes almost perfectly."""
    name = "one feature that gives the label away"
    if min(rows.class_sizes()) < MIN_CLASS:
        return not_applicable("9", name, TOO_FEW)
    strong = found[(found["auroc"] - 0.5).abs() > TOO_GOOD - 0.5]
    sure = strong[strong["p"] * len(found) < SIGNIFICANT]
    codes = (strong if sure.empty else sure)["code"].drop_duplicates().tolist()
    sentence = f"{len(codes)} of {found['code'].nunique()} codes alone reach an AUROC above {TOO_GOOD}" + _named(codes)
    advice = "Ask how it can be known at the prediction time"
    return judge("9", name, len(codes), sentence, advice, fires="warn" if sure.empty else "fail")


def record_size_tells(events: Events, rows: Rows) -> Finding:
    """Check 10: a model that sees only how much was recorded, and when."""
    name = "counts and lengths predict the label"
    if min(rows.class_sizes()) < MIN_CLASS:
        return not_applicable("10", name, TOO_FEW)
    auroc, error = out_of_fold_auroc(record_size(events, rows), rows)
    fires = int(auroc > BY_SIZE and auroc - 2 * error > 0.5)
    sentence = f"a model of event counts, record length and gaps alone reaches an AUROC of {auroc:.2f}"
    advice = "Show it as a baseline row: a model must beat it before it has learnt medicine"
    return judge("10", name, fires, sentence, advice, fires="warn")


def order_tells(task: Task) -> Finding:
    """Check 12: the subject's number or the row's place in the file predicts the label."""
    name = "subject number or row order predicts the label"
    rows = task.rows()
    if min(rows.class_sizes()) < MIN_CLASS:
        return not_applicable("12", name, TOO_FEW)
    table = np.stack([task.subject_id, task.place], axis=1)[task.binary]
    auroc, p = grouped_auroc(table, rows)
    hits = int((p * len(p) < SIGNIFICANT).sum())
    shown = f"AUROC of subject_id {auroc[0]:.2f}, of row order {auroc[1]:.2f}"
    return judge("12", name, hits, shown, "Number subjects and order rows at random; ask where the order came from")


def _named(codes: list[str]) -> str:
    return f": {', '.join(codes[:5])}{', ...' if len(codes) > 5 else ''}" if codes else ""
