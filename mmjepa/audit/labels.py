"""Checks of one task's labels against the record: is the time knowable, does the input give the answer away."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import gammaln

from mmjepa.audit.events import CODED_AFTERWARDS, DAY_US, DEATH, DIED, DISCHARGE, NEVER, Events, Ranks
from mmjepa.audit.finding import Finding, judge, not_applicable
from mmjepa.audit.scan import (
    MIN_CLASS,
    SIGNIFICANT,
    Rows,
    fisher,
    grouped_auroc,
    out_of_fold_scores,
    record_size,
    standard_error,
)
from mmjepa.audit.scores import auroc_draws

TOO_GOOD, BY_SIZE = 0.95, 0.60
COMMON, USUAL = (
    0.25,
    0.50,
)  # share of one class that has a code; that lacks it, as long records of the other may explain
MUCH_RARER = 20  # how many times rarer that is in the other class
SURE = 2.58  # standard errors to the end of a 99 % interval
SHAPE = ["shape_x", "shape_y", "shape_z"]
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
    """Check 4: prediction times inside the record of a known subject, or within a day after it, while alive."""
    strangers = int((task.subject < 0).sum())
    subject, t_us = task.subject[task.subject >= 0], task.t_us[task.subject >= 0]
    dead = int((t_us > events.deaths_us[subject]).sum())
    before = int((t_us < events.first_us[subject]).sum())
    after = int((t_us - DAY_US > events.last_us[subject]).sum())
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
            before + after,
            f"{before} prediction times lie before the first thing known of the subject, {after} over a day after the last",
            "Look at how the times were made: nothing is observed there",
            fires="warn",
        ),
    ]


def outcome_in_input(events: Events, task: Task) -> Finding:
    """Check 7: death codes and discharges that spell death, visible as of the prediction time.

    events: with the static rows.
    """
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
    if ways < np.log(max((found["kind"] == "presence").sum(), 1) / SIGNIFICANT):
        return not_applicable("5", name, "too few subjects to tell it from chance")
    codes = found.loc[found["agrees"], "code"].tolist()
    sentence = f"{len(codes)} codes are present exactly where the label is true, or false" + _named(codes)
    return judge("5", name, len(codes), sentence, "They are the label: block them or mend the prediction times")


def single_features(found: pd.DataFrame, rows: Rows) -> Finding:
    """Check 9: one code's presence, values or count separates the classes almost perfectly.

    Fails where the AUROC's 99 % interval lies above .95; warns where only the AUROC does, as it may by chance with few subjects.
    """
    name = "one feature that gives the label away"
    if min(rows.class_sizes()) < MIN_CLASS:
        return not_applicable("9", name, TOO_FEW)
    size = 0.5 + (found["auroc"] - 0.5).abs()
    low = size - SURE * np.array([standard_error(auroc, *rows.class_sizes()) for auroc in size])
    strong, sure = found[size > TOO_GOOD], found[low > TOO_GOOD]
    codes = (strong if sure.empty else sure)["code"].drop_duplicates().tolist()
    sentence = (
        f"{len(codes)} of {found['code'].nunique()} codes alone (present or not; first, last, lowest, highest value; count) reach an AUROC above {TOO_GOOD}"
        + _named(codes)
    )
    advice = "Ask how it can be known at the prediction time"
    return judge("9", name, len(codes), sentence, advice, fires="warn" if sure.empty else "fail")


def codes_of_one_class(found: pd.DataFrame, rows: Rows) -> Finding:
    """Check 9: a code that a quarter of one class or more has, or that half of it lacks, and hardly anyone of the other.

    Hardly anyone: at most a twentieth of that share. Warns, where Fisher's exact test over subjects is sure after correction for
    all codes: severe illness may do the same.
    """
    name = "codes of one class alone"
    if min(rows.class_sizes()) < MIN_CLASS:
        return not_applicable("9b", name, TOO_FEW)
    seen = found[found["kind"] == "presence"]
    p = fisher(seen["positives"].to_numpy(), seen["negatives"].to_numpy(), *rows.class_sizes())
    a, b = (
        seen[side].to_numpy(float) / size
        for side, size in zip(("positives", "negatives"), rows.class_sizes(), strict=True)
    )
    apart = _of_one(a, b, COMMON) | _of_one(1 - a, 1 - b, USUAL)
    hits = (p * max(len(seen), 1) < SIGNIFICANT) & apart
    worst = np.flatnonzero(hits)[np.argsort(p[hits], kind="stable")]
    shown = [f"{seen['code'].iloc[k]} in {a[k]:.0%} of true labels and {b[k]:.0%} of false" for k in worst]
    sentence = f"{len(shown)} codes, or the want of them, are nearly one class's own" + _named(shown)
    advice = "Ask whether it is a consequence of the outcome, and whether it is known at the prediction time"
    return judge("9b", name, len(shown), sentence, advice, fires="warn")


def _of_one(a: np.ndarray, b: np.ndarray, enough: float) -> np.ndarray:
    least, most = np.minimum(a, b), np.maximum(a, b)
    return (most >= enough) & (least <= most / MUCH_RARER)


def record_size_tells(events: Events, rows: Rows, scores: pd.DataFrame | None = None) -> Finding:
    """Check 10: a model that sees only how much was recorded, and when.

    Warns where its AUROC's 99 % interval lies above .60. scores: of a tuned model (subject_id, prediction_time, score); fails
    where record size alone is inside that model's interval, or above it, on the rows that both have.
    """
    name = "counts and lengths predict the label"
    if min(rows.class_sizes()) < MIN_CLASS:
        return not_applicable("10", name, TOO_FEW)
    by_size = out_of_fold_scores(record_size(events, rows), rows)
    auroc = float(grouped_auroc(by_size[:, None], rows)[0][0])
    fires = auroc - SURE * standard_error(auroc, *rows.class_sizes()) > BY_SIZE
    sentence = f"a model of event counts, record length and gaps alone reaches an AUROC of {auroc:.2f}"
    advice = "Show it as a baseline row: a model must beat it before it has learnt medicine"
    if scores is not None:
        mine = {"subject_id": events.subjects[rows.subject], "prediction_time": rows.t_us.astype("datetime64[us]")}
        both = pd.DataFrame(mine).assign(y=rows.y, size=by_size).merge(scores, on=["subject_id", "prediction_time"])
        if both.groupby("y")["subject_id"].nunique().reindex([0, 1], fill_value=0).min() >= MIN_CLASS:
            columns = both[["score", "size"]].to_numpy(float).T
            value, draws = auroc_draws(columns, both["y"].to_numpy(bool), both["subject_id"].to_numpy())
            low, high = np.nanquantile(draws[0], [0.025, 0.975])
            sentence += f"; the model {value[0]:.2f} ({low:.2f} to {high:.2f}), record size on its rows {value[1]:.2f}"
            if value[1] >= low:
                return judge("10", name, 1, sentence, "The model may have learnt how much is recorded and nothing else")
    return judge("10", name, int(fires), sentence, advice, fires="warn")


def order_tells(task: Task, index: pd.DataFrame | None = None) -> Finding:
    """Check 12: numbers without meaning predict the label: the subject's, the row's place, the image's id and size, the clock.

    index: the image index; the image of a row is the last one taken by its prediction time.
    """
    name = "subject number or row order predicts the label"
    rows = task.rows()
    if min(rows.class_sizes()) < MIN_CLASS:
        return not_applicable("12", name, TOO_FEW)
    table = {"subject_id": task.subject_id, "row order": task.place}
    table["second of the minute"] = task.t_us % 60_000_000
    if index is not None:
        table |= _image_numbers(task, index)
    columns = np.stack([np.asarray(column, float)[task.binary] for column in table.values()], axis=1)
    known = ~np.isnan(columns)
    found = {}
    for k, what in enumerate(table):
        some = Rows(*(column[known[:, k]] for column in (rows.subject, rows.t_us, rows.y)))
        if min(some.class_sizes()) >= MIN_CLASS:
            auroc, p = grouped_auroc(columns[known[:, k], k : k + 1], some)
            found[what] = float(auroc[0]), float(p[0])
    hits = sum(p * len(found) < SIGNIFICANT for _, p in found.values())
    shown = "AUROC of " + ", of ".join(f"{what} {auroc:.2f}" for what, (auroc, _) in found.items())
    return judge("12", name, hits, shown, "Number subjects and order rows at random; ask where the order came from")


def _image_numbers(task: Task, index: pd.DataFrame) -> dict[str, np.ndarray]:
    """Rank of the id and number of voxels of the last image at or before each prediction time; NaN where there is none."""
    taken = index.dropna(subset=["time"]).sort_values("time")
    taken = taken.assign(rank=taken["image_id"].rank(), size=taken[SHAPE].prod(axis=1))
    taken = taken.astype({"time": "datetime64[us]"})
    asked = pd.DataFrame({"subject_id": task.subject_id, "time": task.t_us.astype("datetime64[us]")})
    asked = asked.reset_index().sort_values("time")
    found = pd.merge_asof(asked, taken[["subject_id", "time", "rank", "size"]], on="time", by="subject_id")
    found = found.sort_values("index")
    return {"image_id": found["rank"].to_numpy(float), "image size": found["size"].to_numpy(float)}


def _named(codes: list[str]) -> str:
    return f": {', '.join(codes[:5])}{', ...' if len(codes) > 5 else ''}" if codes else ""
