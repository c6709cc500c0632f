"""Checks 4 and 11: the event that a label is made of, found from the labels themselves, and where it lies.

A label that can be recomputed from one code gives away its own window: positives have an event of that code near their
prediction time and negatives have none. A window that needs events at or before the prediction time reads the past.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln
from scipy.stats import fisher_exact

from mmjepa.audit.events import NEVER, Events, Ranks
from mmjepa.audit.finding import Finding, judge, not_applicable
from mmjepa.audit.labels import Task
from mmjepa.audit.scan import SIGNIFICANT, Rows

EXPLAINED = 0.95  # sensitivity + specificity - 1 at which a code counts as what the label is made of
SAME_OFFSET = 0.95  # share of the labels at one distance from an event, for that event to be their anchor
SECOND_US, DAY_US = 1_000_000, 86_400_000_000


@dataclass(frozen=True)
class Outcome:
    """The code, or the codes, that the label is made of.

    code: in words. codes [K] int64: into the vocabulary. rows: the label rows looked at. behind [N] bool: true labels whose event lies at or before t and not
    after. event_us [N] int64: the nearest event, ``NEVER`` where there is none. reach_us: how far from t events count. explains: whether
    the label follows from the codes alone; codes that are declared need not, as where a value decides.
    """

    code: str
    codes: np.ndarray
    rows: Rows
    behind: np.ndarray
    event_us: np.ndarray
    reach_us: int
    explains: bool = True


def outcome_of(events: Events, rows: Rows, named: Sequence[str] = ()) -> Outcome | None:
    """The code whose events tell the label best; None where none tells it. ``named``: the codes it is declared to be made of.

    events: with the static rows. Declared codes that do not tell it are behind where none of them follows. Where several tell it equally, the one that needs the past least, so that an honest explanation wins.
    """
    best: tuple[float, int] | None = None
    found = None
    for codes in [np.flatnonzero(np.isin(events.vocabulary, named))] if named else _candidates(events, rows):
        ahead, back = _distances(events, rows, codes)
        after, limit_after = _youden(ahead, rows.y)
        either, limit = _youden(np.minimum(ahead, back), rows.y)
        if either > after:
            behind = (rows.y == 1) & (ahead > limit) & (back <= limit)
        else:
            behind, limit = np.zeros(len(rows.y), bool), limit_after
        explains = max(after, either) >= EXPLAINED
        if not explains:
            behind = (rows.y == 1) & (ahead == NEVER) & (back != NEVER)
        score = max(after, either), -int(behind.sum())
        if (explains or len(named)) and len(codes) and (best is None or score > best):
            event_us = np.where(ahead <= back, _shifted(rows.t_us, ahead, 1), _shifted(rows.t_us, back, -1))
            name = ", ".join(map(str, events.vocabulary[codes]))
            best, found = score, Outcome(name, codes, rows, behind, event_us, int(limit), explains)
    return found


def window_reads_the_past(
    outcome: Outcome | None, named: Sequence[str] = (), window_declared: bool = False
) -> list[Finding]:
    """Check 4: true labels whose event lies at or before the prediction time; and one label for all of a subject's times."""
    names = "label window opens too early", "one label for all times of a subject"
    if outcome is None:
        why = "not judged: no single code tells the label, so its window cannot be read off; "
        why += "only the declared window is judged, 4f" if window_declared else "declare it and its codes in task.json"
        if named:
            why = "not judged: none of the declared outcome codes is in the record"
        return [not_applicable("4d", names[0], why), not_applicable("4e", names[1], why)]
    count, rows = int(outcome.behind.sum()), outcome.rows
    made = "can be recomputed from" if outcome.explains else "is declared to be made of"
    sentence = (
        f"the label {made} {outcome.code}; for {count} of {int(rows.y.sum())} true labels it lies at or before the "
    )
    advice = "Open the window after it, or drop the rows"
    early = judge("4d", names[0], count, sentence + "prediction time and not after", advice)
    if not outcome.explains:
        return [early, not_applicable("4e", names[1], "not judged: the declared codes alone do not tell the label")]
    repeated = _repeated(outcome)
    sentence = f"{repeated} subjects have a true label both before and after {outcome.code}, and no subject's label ever changes"
    return [
        early,
        judge("4e", names[1], repeated, sentence, "Label each prediction time by what follows it, not each subject"),
    ]


def left_out_by_outcome(events: Events, task: Task, outcome: Outcome | None, flow_declared: bool = False) -> Finding:
    """Check 11: subjects with the event that prediction times follow, yet without a label: are they chosen by the outcome?

    Asked are those whose record reaches to the time at which they would have been labelled, unless a code known by then sets
    them apart from all who are labelled. Fails where none of them, or all,
    have the outcome afterwards though the share among the labelled says otherwise; warns where the shares merely differ.
    """
    name = "cohort filtered on the outcome"
    anchor = _anchor(events, outcome.rows) if outcome is not None and outcome.explains else None
    if outcome is None or anchor is None:
        tells = outcome is not None and outcome.explains
        why = "no code marks the prediction times" if tells else "the label does not follow from a code's presence"
        then = "only the declared flow is judged, 11b to 11d" if flow_declared else "declare its flow in task.json"
        sentence = f"not judged: {why}, so subjects left out because of the outcome would go unseen; {then}"
        return not_applicable("11", name, sentence)
    code, offset_us = anchor
    at = _would_be_asked(events, outcome.rows, code, offset_us)
    without = np.setdiff1d(np.flatnonzero(at != -NEVER), task.subject)
    without = without[~_set_apart(events, without, at, outcome.rows, offset_us)]
    ahead, _ = _distances(events, Rows(without, at[without], np.zeros(len(without))), outcome.codes)
    sick = int((ahead <= outcome.reach_us).sum())
    positive, negative = outcome.rows.class_sizes()
    p = fisher_exact([[sick, len(without) - sick], [positive, negative]]).pvalue if len(without) else 1.0
    sentence = (
        f"{len(without)} subjects reach {_later(offset_us)}{events.vocabulary[code]} and have no label; {sick} of them have "
        f"{outcome.code} afterwards, of those labelled {positive} of {positive + negative} (p {p:.1g})"
    )
    one_sided = sick in (0, len(without))
    fires = len(without) if p < SIGNIFICANT else 0
    advice = "Choose subjects by what is known at the prediction time; show the positives' share by inclusion step"
    return judge("11", name, fires, sentence, advice, fires="fail" if one_sided else "warn")


def _candidates(events: Events, rows: Rows) -> np.ndarray:
    """[n, 1]: codes that nearly every subject with a true label has, if the subjects are too many for chance."""
    positive, negative = rows.class_sizes()
    subject, code, _ = events.first_seen()
    theirs = np.isin(subject, rows.subject[rows.y == 1])
    have = np.bincount(code[theirs], minlength=len(events.vocabulary))
    ways = gammaln(positive + negative + 1) - gammaln(positive + 1) - gammaln(negative + 1)
    if min(positive, negative) < 2 or ways < np.log(len(events.vocabulary) * len(rows.y) / SIGNIFICANT):
        return np.zeros((0, 1), np.int64)
    return np.flatnonzero(have >= EXPLAINED * positive)[:, None]


def _distances(events: Events, rows: Rows, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[N], [N] int64 us from t to the next event of some codes after t, and back to the last at or before t; else ``NEVER``."""
    mine = np.flatnonzero(np.isin(events.codes, codes))
    mine = mine[np.lexsort((events.times_us[mine], events.subject[mine]))]
    ahead, back = np.full((2, len(rows.t_us)), NEVER, np.int64)
    if not len(mine):
        return ahead, back
    subject, times_us = events.subject[mine], events.times_us[mine]
    ranks = Ranks(np.concatenate([times_us, rows.t_us]))
    after = np.searchsorted(ranks.key(subject, times_us), ranks.key(rows.subject, rows.t_us), side="right")
    for distance, at in ((ahead, after), (back, after - 1)):
        safe = at.clip(0, len(mine) - 1)
        there = (at >= 0) & (at < len(mine)) & (subject[safe] == rows.subject)
        distance[there] = np.abs(times_us[safe] - rows.t_us)[there]
    return ahead, back


def _youden(distance: np.ndarray, y: np.ndarray) -> tuple[float, int]:
    """The best sensitivity + specificity - 1 of "an event within a limit", and that limit (us)."""
    order = np.argsort(distance, kind="stable")
    found, truth = distance[order], y[order]
    gain = np.cumsum(truth) / max(truth.sum(), 1) - np.cumsum(1 - truth) / max((1 - truth).sum(), 1)
    ends = (np.diff(found, append=NEVER) > 0) & (found < NEVER)  # equal distances are one step
    if not ends.any():
        return 0.0, 0
    best = np.flatnonzero(ends)[np.argmax(gain[ends])]
    return float(gain[best]), int(found[best])


def _shifted(t_us: np.ndarray, distance: np.ndarray, sign: int) -> np.ndarray:
    return np.where(distance == NEVER, NEVER, t_us + sign * np.where(distance == NEVER, 0, distance))


def _would_be_asked(events: Events, rows: Rows, code: int, offset_us: int) -> np.ndarray:
    """[S] int64 us: when a subject would have been asked by the rule that the labelled follow; -``NEVER``: could not be.

    The record must reach to that time, and the subject be alive.
    """
    at = np.full(len(events.subjects), -NEVER)
    marks = events.codes == code
    np.maximum.at(at, events.subject[marks], events.times_us[marks] + offset_us)
    last = np.full(len(events.subjects), -NEVER)
    np.maximum.at(last, events.subject, events.times_us)
    return np.where((at <= last) & (at <= events.deaths_us), at, -NEVER)


def _set_apart(events: Events, without: np.ndarray, at: np.ndarray, rows: Rows, offset_us: int) -> np.ndarray:
    """Which of ``without`` a code known at their time sets apart: many of them have it and nobody labelled has.

    Such a code (they had left the unit, say) is an honest reason not to be asked. Looked at are all codes known by then, and
    those since the event that prediction times follow.
    """
    asked = np.full(len(at), -NEVER)
    np.maximum.at(asked, rows.subject, rows.t_us)
    asked[without] = at[without]
    left_out = np.zeros(len(at), bool)
    left_out[without] = True
    apart = np.zeros(len(at), bool)
    known = events.available_us <= asked[events.subject]
    for seen in (known, known & (events.times_us >= asked[events.subject] - offset_us)):
        subject, code = np.unique(np.stack([events.subject[seen], events.codes[seen]]), axis=1)
        theirs, others = (
            np.bincount(code[left_out[subject] == side], minlength=len(events.vocabulary)) for side in (1, 0)
        )
        people = len(np.unique(rows.subject))
        telling = [
            c
            for c in np.flatnonzero((theirs > 0) & (others == 0))
            if fisher_exact([[theirs[c], len(without) - theirs[c]], [0, people]]).pvalue < SIGNIFICANT
        ]
        apart[subject[np.isin(code, telling) & left_out[subject]]] = True
    return apart[without]


def _later(offset_us: int) -> str:
    return f"{offset_us / DAY_US:.2g} days after " if offset_us else ""


def _repeated(outcome: Outcome) -> int:
    """Subjects with true labels on both sides of the event, in a task where no subject has two different labels."""
    rows = outcome.rows
    positive = np.unique(rows.subject[rows.y == 1])
    if np.isin(positive, rows.subject[rows.y == 0]).any():
        return 0
    before = rows.subject[(rows.y == 1) & ~outcome.behind & (outcome.event_us > rows.t_us)]
    return len(np.intersect1d(before, rows.subject[outcome.behind]))


def _anchor(events: Events, rows: Rows) -> tuple[int, int] | None:
    """(code, offset us) when labels stand at one fixed distance behind an event of one code; the rarest such code."""
    subject, code, _ = events.first_seen()
    have = np.bincount(code[np.isin(subject, rows.subject)], minlength=len(events.vocabulary))
    enough = np.flatnonzero(have >= SAME_OFFSET * len(np.unique(rows.subject)))
    total = np.bincount(events.codes, minlength=len(events.vocabulary))
    for candidate in enough[np.argsort(total[enough], kind="stable")]:
        _, back = _distances(events, rows, candidate[None])
        known = back[back != NEVER]
        if not len(known):
            continue
        offset = int(np.median(known))
        if (np.abs(back - offset) <= SECOND_US).mean() >= SAME_OFFSET:
            return int(candidate), offset
    return None
