"""All checks of a cohort, one after the other."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd

from mmjepa.audit import labels, record
from mmjepa.audit.events import Events
from mmjepa.audit.finding import Finding, not_applicable, worst
from mmjepa.audit.scan import scan
from mmjepa.cohort import SURVIVAL_FILE, Cohort
from mmjepa.ct.store import VolumeStore


def audit(cohort: Path | str, tasks: Sequence[str] | None = None) -> dict[str, Any]:
    """Look for what would leak the answer into a cohort and its labels.

    cohort: a cohort folder or a bare MEDS root. tasks: names under its ``labels/``; all of them when None.
    Returns verdict (``pass``, ``warn``, ``fail``), counts of the findings by verdict, the tasks, and the findings, each with
    check, name, verdict, count, sentence, advice, task. Raises the Refusals of opening the cohort and of its labels.
    """
    opened = Cohort.open(cohort)
    findings = record.subject_in_two_places(opened.meds_root)
    names = opened.tasks if tasks is None else list(tasks)
    if worst(findings) == "fail":
        findings.append(not_applicable("2-16", "all other checks", "the records cannot be read until this is mended"))
    else:
        findings += _of_record(opened, events := Events.of(opened.events()))
        for name in names:
            findings += [replace(finding, task=name) for finding in _of_task(opened, name, events)]
        if not names:
            findings.append(not_applicable("4-12", "checks of labels", "the cohort has no labels"))
    verdicts = [finding.verdict for finding in findings]
    counts = {verdict: verdicts.count(verdict) for verdict in ("pass", "warn", "fail", "not-applicable")}
    return {"verdict": worst(findings), **counts, "tasks": names, "findings": [asdict(finding) for finding in findings]}


def _of_record(cohort: Cohort, events: Events) -> list[Finding]:
    findings = [record.near_duplicates(events, cohort.events().splits)]
    if cohort.has_images:
        findings.append(record.same_image_twice(VolumeStore(cohort.path).index))
    findings += record.coded_afterwards(events)
    findings += record.death_in_discharge_codes(events)
    findings += record.after_death(events)
    return [*findings, record.known_before_it_happened(events)]


def _of_task(cohort: Cohort, name: str, events: Events) -> list[Finding]:
    task = labels.Task.of(name, _with_place(cohort, name), events)
    findings = labels.time_is_knowable(events, task)
    findings += [labels.outcome_in_input(events, task), labels.stay_coding_in_input(events, task)]
    rows = task.rows().thinned()
    if not len(rows.y):
        return [*findings, not_applicable("5-12", "checks of yes-or-no labels", "the task has no yes-or-no labels")]
    found = scan(events, rows)
    findings += [labels.one_to_one_codes(found, rows), labels.single_features(found, rows)]
    return [*findings, labels.record_size_tells(events, rows), labels.order_tells(task)]


def _with_place(cohort: Cohort, name: str) -> pd.DataFrame:
    """The labels with ``place``, the row's position in the files, which reading them sorts away."""
    known, key = cohort.labels(name), ["subject_id", "prediction_time"]
    files = [path for path in sorted((cohort.labels_folder / name).rglob("*.parquet")) if path.name != SURVIVAL_FILE]
    raw = pd.concat([pd.read_parquet(path, columns=key) for path in files], ignore_index=True)
    raw = raw.astype({"subject_id": "int64", "prediction_time": known["prediction_time"].dtype})
    return known.merge(raw.assign(place=range(len(raw))), on=key, validate="one_to_one")
