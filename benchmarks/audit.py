"""How good the audit is: deliberate leaks it catches, clean cohorts it leaves alone.

Every leak of the synthetic world is planted on its own under several seeds. It is caught when a finding of the check that is due
fails (or warns, where a check never fails of itself) and does not do so on the clean cohort of the same seed. Clean cohorts are
records alone, records with two images each, and ICU stays; one that fails anything is a false alarm, warnings are counted apart.
The audit sees the cohorts as they are ingested, never what was planted.

One JSON line a leak, one for each clean cohort with anything to say, and the last line with the counts.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import synthetic
from mmjepa.audit import audit
from mmjepa.ingest import ingest
from synthetic import icu_source, source
from synthetic.icu import Icu
from synthetic.leaks import SWITCHES
from synthetic.presets import find_site

SITE = find_site("li2025", "internal")
RECORDS, IMAGES, STAYS = "records", "images", "stays"
PATIENTS = {RECORDS: 200, IMAGES: 100, STAYS: 300}
CLEAN = {RECORDS: 12, IMAGES: 5, STAYS: 3}
WARNS = {"10", "15"}  # checks whose worst word is a warning until a model is given
LOUDNESS = ["not-applicable", "pass", "warn", "fail"]
Findings = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One cohort: its kind, its seed, and the leak that is planted, or None."""

    kind: str
    seed: int
    leak: str | None = None


def cases(first_seed: int, seeds: int) -> list[Case]:
    """Every leak under every seed, and the clean cohorts; the seeds of the leaks are the first of the clean ones (at most 5)."""
    chosen = range(first_seed, first_seed + seeds)
    planted = [Case(IMAGES if leak == "later_crop" else RECORDS, seed, leak) for leak in SWITCHES for seed in chosen]
    clean = [Case(kind, first_seed + k) for kind, count in CLEAN.items() for k in range(count)]
    return clean + planted


def findings(case: Case, scratch: Path) -> Findings:
    """What the audit says of a cohort, by part of the check."""
    with tempfile.TemporaryDirectory(dir=scratch) as made:
        folder = Path(made)
        found = sorted(audit(cohort(case, folder))["findings"], key=lambda finding: LOUDNESS.index(finding["verdict"]))
        return {finding["check"]: finding for finding in found}  # of several tasks, the loudest


def cohort(case: Case, folder: Path) -> Path:
    """Make and ingest it; a source folder that ingest refuses is audited as it is."""
    world, patients = folder / "source", PATIENTS[case.kind]
    if case.kind == STAYS:
        icu_source.generate(world, patients=patients, site=SITE, law=Icu(), seed=case.seed, workers=1)
    elif case.kind == IMAGES:
        leak = [case.leak] if case.leak else []
        synthetic.generate(world, patients=patients, seed=case.seed, scans=2, leak=leak)
    else:
        with patch.object(source, "_write_image", lambda *_: None):  # no check of these leaks looks at pixels
            synthetic.generate(world, patients=patients, seed=case.seed, leak=[case.leak] if case.leak else [])
    if case.leak == "subject_in_two_splits":
        return world
    if case.kind == IMAGES:
        ingest(world, folder / "cohort")
    else:
        ingest(None, folder / "cohort", ehr=world)
    return folder / "cohort"


def caught_by(leak: str, found: Findings, clean: Findings) -> list[str]:
    """The parts of the check that is due which fire on the leak and not on the clean cohort."""
    due = SWITCHES[leak].check
    loud = {"fail", "warn"} if due in WARNS else {"fail"}
    parts = [part for part in found if part.rstrip("abcdefgh") == due and found[part]["verdict"] in loud]
    return [part for part in parts if clean.get(part, {}).get("verdict") not in loud]


def rows_of(results: dict[Case, Findings]) -> list[dict[str, Any]]:
    """A row a leak."""
    rows: list[dict[str, Any]] = []
    for leak, switch in SWITCHES.items():
        mine = {case: found for case, found in results.items() if case.leak == leak}
        by: Counter[str] = Counter()
        missed = []
        for case, found in mine.items():
            parts = caught_by(leak, found, results[Case(case.kind, case.seed)])
            by.update(f"{part} {found[part]['name']}: {found[part]['verdict']}" for part in parts)
            missed += [] if parts else [case.seed]
        rows.append({"leak": leak, "due": switch.check, "seeds": len(mine), "caught": len(mine) - len(missed)})
        rows[-1] |= {"by": dict(by), "missed_seeds": missed}
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first-seed", type=int, default=2000, help="the checks were set on seeds below 2000")
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 6), help="of each leak")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--scratch", type=Path, help="where the temporary folder is made")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=chosen.scratch) as scratch, ProcessPoolExecutor(chosen.workers) as pool:
        wanted = cases(chosen.first_seed, chosen.seeds)
        results = dict(zip(wanted, pool.map(partial(findings, scratch=Path(scratch)), wanted), strict=True))
    rows = rows_of(results)
    for row in rows:
        print(json.dumps(row))
    clean = {case: found for case, found in results.items() if case.leak is None}
    fails, warnings = ({case: _loud(found, verdict) for case, found in clean.items()} for verdict in ("fail", "warn"))
    for case in clean:
        if fails[case] or warnings[case]:
            print(json.dumps({"clean": case.kind, "seed": case.seed, "fails": fails[case], "warns": warnings[case]}))
    counts = {"leak_kinds": len(rows), "caught": sum(row["caught"] == row["seeds"] > 0 for row in rows)}
    counts |= {"clean": len(clean), "false_alarms": sum(map(bool, fails.values()))}
    print(json.dumps(counts), flush=True)
    return int(counts["caught"] < counts["leak_kinds"] or counts["false_alarms"] > 0)


def _loud(found: Findings, verdict: str) -> list[str]:
    return [f"{part} {finding['name']}" for part, finding in found.items() if finding["verdict"] == verdict]


if __name__ == "__main__":
    sys.exit(main())
