"""Check 15: codes and units that jump between splits or sites."""

import itertools
from typing import Any

import numpy as np
from scipy.stats import false_discovery_control, norm, rankdata

from mmjepa.audit.events import Events
from mmjepa.audit.finding import Finding, judge, not_applicable
from mmjepa.audit.scan import MIN_CLASS, fisher, null_error

SITE = "SITE"  # static codes SITE//<name> say where a subject was cared for
RATE_Q, JUMP = 0.01, 0.20


def jumps(events: Events, store: Any) -> list[Finding]:
    """Check 15: for the splits and for the sites: codes whose share of subjects, or whose values' median, differs between a
    group and the others by more than 20 % at a false discovery rate of 1 % (Benjamini-Hochberg)."""
    return [
        _finding("15", "jumps between splits", events, _splits(store)),
        _finding("15b", "jumps between sites", events, _sites(store)),
    ]


def _finding(check: str, name: str, events: Events, groups: dict[str, np.ndarray]) -> Finding:
    groups = {who: members for who, members in groups.items() if MIN_CLASS <= members.sum() <= len(members) - MIN_CLASS}
    if len(groups) < 2:
        return not_applicable(check, name, f"there are not two groups of {MIN_CLASS} subjects")
    tests = [test for who, members in groups.items() for test in _tests(events, who, members)]
    if not tests:
        return not_applicable(check, name, f"no code is held by {MIN_CLASS} subjects")
    q = false_discovery_control([test[0] for test in tests])
    hits = [what for (_, jump, what), rate in zip(tests, q, strict=True) if rate < RATE_Q and jump > JUMP]
    sentence = f"{len(hits)} code rates and value medians jump by more than 20 %"
    sentence += f": {'; '.join(hits[:5])}" if hits else ""
    advice = "Compare units and coding; map them to one before pooling, and judge each group alone"
    return judge(check, name, len(hits), sentence, advice, fires="warn")


def _tests(events: Events, who: str, members: np.ndarray) -> list[tuple[float, float, str]]:
    """(p, relative jump, what) of each code's share of subjects and of its values' median."""
    subject, code, _ = events.first_seen()
    size, inside = len(events.vocabulary), int(members.sum())
    outside = len(members) - inside
    held, others = (np.bincount(code[members[subject] == here], minlength=size) for here in (True, False))
    enough = np.flatnonzero((held + others >= MIN_CLASS) & (held + others < len(members)))
    held, others = held[enough], others[enough]
    p = fisher(held, others, inside, outside)
    a, b = held / inside, others / outside
    jump = np.abs(a - b) / np.maximum(a, b)
    found = [
        (float(p[k]), float(jump[k]), f"{events.vocabulary[c]} in {who} {a[k]:.0%} against {b[k]:.0%}")
        for k, c in enumerate(enough)
    ]
    return found + _value_tests(events, who, members)


def _value_tests(events: Events, who: str, members: np.ndarray) -> list[tuple[float, float, str]]:
    rows = np.flatnonzero(np.isfinite(events.values))
    rows = rows[np.lexsort((events.values[rows], events.subject[rows], events.codes[rows]))]
    pair = events.codes[rows].astype(np.int64) * len(events.subjects) + events.subject[rows]
    starts = np.flatnonzero(np.diff(pair, prepend=-1))
    middles = (starts + np.append(starts[1:], len(rows)) - 1) // 2  # of each subject's sorted values: the lower median
    code, subject, value = (column[rows[middles]] for column in (events.codes, events.subject, events.values))
    found, edges = [], np.append(np.flatnonzero(np.diff(code, prepend=-1)), len(code))
    for low, high in itertools.pairwise(edges):
        here, mine = value[low:high].astype(float), members[subject[low:high]]
        n, m = int(mine.sum()), int((~mine).sum())
        if min(n, m) >= MIN_CLASS:
            auroc = (rankdata(here)[mine].sum() - n * (n + 1) / 2) / (n * m)
            a, b = float(np.median(here[mine])), float(np.median(here[~mine]))
            jump = abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0
            what = f"{events.vocabulary[code[low]]} median in {who} {a:.4g} against {b:.4g}"
            found.append((float(2 * norm.sf(abs(auroc - 0.5) / null_error(n, m))), jump, what))
    return found


def _splits(store: Any) -> dict[str, np.ndarray]:
    return {name: np.isin(store.subjects, members) for name, members in store.splits.items()}


def _sites(store: Any) -> dict[str, np.ndarray]:
    owner = np.repeat(np.arange(len(store.subjects)), np.diff(store.static_offsets))
    groups = {}
    for code in np.flatnonzero(store.match([SITE])):
        members = np.zeros(len(store.subjects), bool)
        members[owner[store.static_codes == code]] = True
        groups[store.vocabulary[code]] = members
    return groups
