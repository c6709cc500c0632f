"""All checks of a cohort, one after the other."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from mmjepa.audit import canary, declared, fitted, images, jumps, labels, outcome, record, scores
from mmjepa.audit.events import Events
from mmjepa.audit.finding import Finding, not_applicable, worst
from mmjepa.audit.scan import scan
from mmjepa.cohort import SURVIVAL_FILE, Cohort
from mmjepa.ct.store import VolumeStore


@dataclass(frozen=True)
class Given:
    """What a user may add to a cohort: a model's scores and the scores of an oracle, see ``mmjepa.audit.scores``."""

    scores: pd.DataFrame | None = None
    oracle: pd.DataFrame | None = None


def audit(
    cohort: Path | str,
    tasks: Sequence[str] | None = None,
    *,
    scores_file: Path | str | None = None,
    oracle_file: Path | str | None = None,
    run: Path | str | None = None,
) -> dict[str, Any]:
    """Look for what would leak the answer into a cohort and its labels.

    cohort: a cohort folder or a bare MEDS root. tasks: names under its ``labels/``; all of them when None. scores_file: a tuned
    model's score table of one task. oracle_file: the best scores possible, where the world is synthetic. run: a trained run
    folder, whose embeddings and fitted vocabulary are looked at too.
    Returns verdict (``pass``, ``warn``, ``fail``), counts of the findings by verdict, the tasks, and the findings, each with
    check, name, verdict, count, sentence, advice, task. Raises the Refusals of opening the cohort and of its labels, and
    SCORES_TABLE.
    """
    opened = Cohort.open(cohort)
    given = Given(
        None if scores_file is None else scores.read_scores(scores_file),
        None if oracle_file is None else scores.read_oracle(oracle_file),
    )
    findings = record.subject_in_two_places(opened.meds_root)
    names = opened.tasks if tasks is None else list(tasks)
    if worst(findings) == "fail":
        findings.append(not_applicable("2-16", "all other checks", "the records cannot be read until this is mended"))
    else:
        visible = Events.visible(opened.events())
        findings += _of_record(opened, events := Events.of(opened.events()), visible)
        findings += _of_run(opened, names, run)
        findings.append(_against_oracle(given))
        for name in names:
            findings += [replace(finding, task=name) for finding in _of_task(opened, name, events, visible, given)]
        if not names:
            findings.append(not_applicable("4-12", "checks of labels", "the cohort has no labels"))
    return summary(findings, names)


def summary(findings: Sequence[Finding], tasks: Sequence[str]) -> dict[str, Any]:
    """The findings as plain values under their verdict and counts, as ``audit`` returns them."""
    verdicts = [finding.verdict for finding in findings]
    counts = {verdict: verdicts.count(verdict) for verdict in ("pass", "warn", "fail", "not-applicable")}
    plain = [asdict(finding) for finding in findings]
    return {"verdict": worst(findings), **counts, "tasks": list(tasks), "findings": plain}


def _of_record(cohort: Cohort, events: Events, visible: Events) -> list[Finding]:
    store = cohort.events()
    findings = [record.near_duplicates(events, store.splits)]
    findings += record.coded_afterwards(events)
    findings += record.death_in_discharge_codes(events)
    findings.append(record.ends_without_a_time(visible))
    findings += record.after_death(events)
    findings.append(record.known_before_it_happened(events))
    if cohort.has_images:
        volumes = VolumeStore(cohort.path)
        findings += [record.same_image_twice(volumes.index), images.known_before_taken(store, volumes.index)]
        findings.append(images.placed_by_a_later_image(volumes))
    findings.append(fitted.fitted_statistics(store, cohort.meds_root / "metadata" / "codes.parquet"))
    return findings + jumps.jumps(events, store)


def _of_run(cohort: Cohort, tasks: Sequence[str], run: Path | str | None) -> list[Finding]:
    if run is None:
        return [not_applicable("2-3", "prefix invariance and future swap", "no run was given")]
    tokens = Path(run) / "model" / "tokens.json"
    findings = canary.canaries(canary.table_of_run(run), cohort, cohort.labels(tasks[0]) if tasks else None)
    return findings + ([fitted.fitted_vocabulary(cohort.events(), tokens)] if tokens.is_file() else [])


def _of_task(cohort: Cohort, name: str, events: Events, visible: Events, given: Given) -> list[Finding]:
    task = labels.Task.of(name, _with_place(cohort, name), events)
    says = declared.read_declaration(cohort.labels_folder / name)
    index = VolumeStore(cohort.path).index if cohort.has_images else None
    findings = labels.time_is_knowable(events, task)
    findings += [labels.outcome_in_input(visible, task), labels.stay_coding_in_input(events, task)]
    findings += declared.declared_window(says) + declared.declared_flow(says)
    findings += declared.flow_is_of_these_labels(says, task, cohort.labels_folder / name)
    findings += declared.outcome_codes_known(visible, says)
    if index is not None:
        findings.append(images.only_later_images(task, index))
    rows = task.rows().thinned()
    if not len(rows.y):
        return [*findings, not_applicable("5-12", "checks of yes-or-no labels", "the task has no yes-or-no labels")]
    made_of = outcome.outcome_of(visible, rows, says.outcome_codes)
    findings += outcome.window_reads_the_past(
        made_of, says.outcome_codes, says.window_days is not None
    ) + declared.other_stays(events, says, made_of)
    findings.append(outcome.left_out_by_outcome(events, task, made_of, bool(says.flow)))
    found = scan(visible, rows)
    findings += [labels.one_to_one_codes(found, rows), labels.single_features(found, rows)]
    findings.append(labels.codes_of_one_class(found, rows))
    return [*findings, labels.record_size_tells(events, rows, given.scores), labels.order_tells(task, index)]


def _against_oracle(given: Given) -> Finding:
    if given.scores is None or given.oracle is None:
        return not_applicable("16", "better than possible", "no scores, or no oracle to compare them with")
    return scores.above_the_oracle(given.scores, given.oracle)


def _with_place(cohort: Cohort, name: str) -> pd.DataFrame:
    """The labels with ``place``, the row's position in the files, which reading them sorts away."""
    known, key = cohort.labels(name), ["subject_id", "prediction_time"]
    files = [path for path in sorted((cohort.labels_folder / name).rglob("*.parquet")) if path.name != SURVIVAL_FILE]
    raw = pd.concat([pd.read_parquet(path, columns=key) for path in files], ignore_index=True)
    raw = raw.astype({"subject_id": "int64", "prediction_time": known["prediction_time"].dtype})
    return known.merge(raw.assign(place=range(len(raw))), on=key, validate="one_to_one")
