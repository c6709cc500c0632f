"""What a task says of itself in ``labels/<task>/task.json``, which the MEDS label schema has no place for.

Every key may be left out. ``window_days``: from and to, days after the prediction time, in which the outcome is looked for.
``includes_start``: whether an event at the window's very start counts. ``within_stay``: the outcome must fall into the stay that
holds the prediction time. ``outcome_codes``: the codes the label is made of. ``flow``: the steps by which subjects were
included, each with ``step``, ``subjects``, ``positives`` left after it and ``reads_until_days`` (how far after the prediction
time its criterion looks; 0: not at all). ``outcome_given``: the outcome comes from a table beside the record, so that its codes need
not be in it. Where ``flow.json`` of ``mmjepa label`` lies beside, the labels are compared with its last step, which censoring
has passed too.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.stats import fisher_exact

from mmjepa.audit.events import DAY_US, NEVER, Events
from mmjepa.audit.finding import Finding, judge
from mmjepa.audit.labels import Task
from mmjepa.audit.outcome import Outcome
from mmjepa.audit.scan import SIGNIFICANT
from mmjepa.config import build
from mmjepa.files import read_json
from mmjepa.refusal import Refusal

FILE, STEPS_FILE = "task.json", "flow.json"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of inclusion, see the head of this module."""

    step: str
    subjects: int
    positives: int
    reads_until_days: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.positives <= self.subjects:
            raise ValueError(f"positives={self.positives} is not within 0..{self.subjects}")


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What is declared of a task, see the head of this module."""

    window_days: tuple[float, float] | None = None
    includes_start: bool = False
    within_stay: bool = False
    outcome_codes: tuple[str, ...] = ()
    outcome_given: bool = False
    flow: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        if self.window_days and self.window_days[0] >= self.window_days[1]:
            raise ValueError(f"window_days={list(self.window_days)} does not rise")
        if any(b.subjects > a.subjects or b.positives > a.positives for a, b in pairwise(self.flow)):
            raise ValueError("a step of flow has more subjects or positives than the one before it")


def read_declaration(task_folder: Path) -> Declaration:
    """The task's ``task.json``; an empty declaration where there is none. Raises FILE_BROKEN and the CONFIG_* refusals."""
    path = task_folder / FILE
    return build(Declaration, read_json(path)) if path.is_file() else Declaration()


def declared_window(declared: Declaration) -> list[Finding]:
    """Check 4: a declared window that opens at or before the prediction time; nothing where none is declared."""
    if declared.window_days is None:
        return []
    start, stop = declared.window_days
    opens_early = start < 0 or (start == 0 and declared.includes_start)
    sentence = f"the declared window is {start:g} to {stop:g} days after the prediction time"
    sentence += ", its start included" if declared.includes_start else ", its start left out"
    advice = "Open the window after the prediction time, or leave its start out"
    return [judge("4f", "declared label window", int(opens_early), sentence, advice)]


def other_stays(events: Events, declared: Declaration, outcome: Outcome | None) -> list[Finding]:
    """Check 4: true labels whose event falls outside the stay of the prediction time, where the task says it must not."""
    if not declared.within_stay or outcome is None or not outcome.explains:
        return []
    rows = outcome.rows
    inside, start_us, end_us = events.stays.current(rows.subject, rows.t_us)
    happens = (rows.y == 1) & (outcome.event_us != NEVER)
    late = outcome.event_us > np.where(
        end_us > NEVER - DAY_US, NEVER, end_us + DAY_US
    )  # deaths are charted up to a day later
    count = int((happens & (~inside | late | (outcome.event_us < start_us))).sum())
    sentence = f"for {count} true labels {outcome.code} lies outside the stay of the prediction time"
    return [judge("4g", "label window reads other stays", count, sentence, "Look for the outcome within the stay")]


def declared_flow(declared: Declaration) -> list[Finding]:
    """Check 11: inclusion criteria that read the future, and steps after which the positives' share is another."""
    if not declared.flow:
        return []
    later = [step.step for step in declared.flow if step.reads_until_days > 0]
    shares = ", ".join(f"{s.step}: {s.positives} of {s.subjects}" for s in declared.flow)
    moved = [b.step for a, b in pairwise(declared.flow) if _share_moves(a, b)]
    return [
        judge(
            "11b",
            "inclusion criteria that read the future",
            len(later),
            f"positives by step: {shares}; {len(later)} criteria look past the prediction time" + _listed(later),
            "Use what is known at the prediction time; treat a short follow-up as censoring",
        ),
        judge(
            "11c",
            "inclusion steps that move the positives' share",
            len(moved),
            f"after {len(moved)} of {len(declared.flow)} steps the positives' share is another" + _listed(moved),
            "Say why: a criterion may stand in for the outcome",
            fires="warn",
        ),
    ]


def flow_is_of_these_labels(declared: Declaration, task: Task, task_folder: Path) -> list[Finding]:
    """Check 11: the last step's subjects and positives are those of the labels; nothing where no flow is declared.

    The steps of ``flow.json`` tell the rows too. Raises FILE_BROKEN.
    """
    if not declared.flow:
        return []
    last, path = declared.flow[-1], task_folder / STEPS_FILE
    here, here_positives = (len(np.unique(task.subject_id[which])) for which in (slice(None), task.y == 1))
    told = {"subjects": (last.subjects, here), "subjects with a true label": (last.positives, here_positives)}
    if path.is_file():
        try:
            rows, subjects, positives = (int(read_json(path)[-1][name]) for name in ("rows", "subjects", "positives"))
        except (LookupError, TypeError, ValueError):
            raise Refusal("FILE_BROKEN", f"{path} holds no steps", "Make the labels again") from None
        told = {"rows": (rows, len(task.y)), "subjects": (subjects, here)}
        told["subjects with a true label"] = (positives, here_positives)
    if np.isnan(task.y).any():
        del told["subjects with a true label"]
    sentence = "the flow ends with, and the labels hold: " + ", ".join(
        f"{a} and {b} {what}" for what, (a, b) in told.items()
    )
    advice = "The labels are not those of the flow: make both again"
    return [judge("11d", "flow of other labels", sum(a != b for a, b in told.values()), sentence, advice)]


def outcome_codes_known(events: Events, declared: Declaration) -> list[Finding]:
    """Check 4: declared outcome codes that the record does not know: fails where it knows none; nothing where none are declared."""
    if not declared.outcome_codes or declared.outcome_given:
        return []
    unknown = sorted(set(declared.outcome_codes) - set(events.vocabulary))
    sentence = (
        f"{len(unknown)} of {len(set(declared.outcome_codes))} declared outcome codes are not in the record"
        + _listed(unknown)
    )
    advice = "Spell them as the record does; an outcome from a table beside it is declared by outcome_given: true"
    none_known = len(unknown) == len(set(declared.outcome_codes))
    return [
        judge("4h", "unknown outcome codes", len(unknown), sentence, advice, fires="fail" if none_known else "warn")
    ]


def _share_moves(before: Step, after: Step) -> bool:
    gone, gone_positive = before.subjects - after.subjects, before.positives - after.positives
    if gone < gone_positive:
        return True
    table = [[gone_positive, gone - gone_positive], [after.positives, after.subjects - after.positives]]
    return bool(fisher_exact(table).pvalue < SIGNIFICANT)


def _listed(names: list[str]) -> str:
    return f": {', '.join(names)}" if names else ""
