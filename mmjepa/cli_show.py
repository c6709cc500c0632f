"""What people read when a verb is done; programs read ``--json``. Standard error, except of a verb whose product is its text
(audit, forms), which can be piped into a file."""

import sys
from collections.abc import Mapping
from typing import Any

from mmjepa.console import show_mapping


def ingest(result: Mapping[str, Any]) -> None:
    """Counts, a line for each reason of refusals and, where images were read alone, for each volume; or the files of an id."""
    if "files" in result and "id" in result:
        print("\n".join(result["files"]), file=sys.stderr)
        return
    images = result.get("ct") or result
    plain = {name: value for name, value in result.items() if name not in ("volumes", "reasons")}
    if plain.get("ct"):
        plain["ct"] = {name: value for name, value in plain["ct"].items() if name != "reasons"}
    show_mapping(plain)
    for why in images.get("reasons", ()):
        hint = f". {why['what_to_do']}" if why["what_to_do"] else ""
        print(f"refused {why['volumes']} x {why['code']}: for instance {why['example']}{hint}", file=sys.stderr)
    if images.get("reasons"):
        print("docs/codes.md says what each code means", file=sys.stderr)
    if images.get("accepted") == 0:
        print("no image was accepted", file=sys.stderr)
    for volume in result.get("volumes", ()):
        if volume["status"] == "refused":
            text = f"refused {volume['code']}: {volume['message']}"
        else:
            size, spacing = (" x ".join(f"{n:.4g}" for n in volume[name]) for name in ("shape", "spacing_mm"))
            low, high = volume["hu_range"]
            text = " ".join([f"{size} voxels of {spacing} mm, {low}..{high} HU", *volume["flags"]])
        print(f"{volume['image_id']}  {text}", file=sys.stderr)


def audit(result: Mapping[str, Any]) -> None:
    """A line for each check, with advice where it matters."""
    task = None
    for finding in result["findings"]:
        if finding["task"] != task:
            task = finding["task"]
            print(f"labels {task}:")
        print(f"{finding['verdict']:<15}{finding['check']:<5}{finding['name']}: {finding['sentence']}")
        if finding["verdict"] in ("warn", "fail"):
            print(f"{'':<20}-> {finding['advice']}")
    print(f"verdict: {result['verdict']}")


def labels(result: Mapping[str, Any]) -> None:
    """The flow of a labelled cohort, a line a step."""
    for step in result["flow"]:
        lost = " (lost)" if step["kind"] == "censored" else ""
        counts = f"{step['rows']} rows, {step['positive_rows']} true, {step['subjects']} subjects"
        print(f"{step['step']}{lost}: {counts}", file=sys.stderr)
    print(f"{result['rows']} labels, {result['positives']} true, in {result['out']}", file=sys.stderr)
    if "note" in result:
        print(f"warning: {result['note']}", file=sys.stderr)


def phases(result: Mapping[str, Any]) -> None:
    """What each phase trained, and the next step."""
    for phase in result["phases"]:
        trained = ", ".join(f"{p} ({t['parameters']:,} parameters)" for p, t in phase["trained"].items()) or "nothing"
        print(f"{phase['phase']}: {phase['steps']} updates of {trained}", file=sys.stderr)
    print(
        f"the run: {result['run']}; next: mmjepa embed {result['run']} COHORT --out embeddings.parquet", file=sys.stderr
    )


def evaluation(result: Mapping[str, Any]) -> None:
    """AUROC of each arm by site."""
    for site, found in result["sites"].items():
        print(
            f"{site}: {found['rows']} rows, {found['subjects']} subjects, {found['positives']} positive",
            file=sys.stderr,
        )
        for arm, measures in found["arms"].items():
            auroc = measures["auroc"]
            low, high = auroc["interval"] or (float("nan"), float("nan"))
            print(f"  {arm}: AUROC {auroc['value']:.3f} ({low:.3f} to {high:.3f})", file=sys.stderr)
    print(f"intervals: {result['interval']}; trivial AUROC 0.5. --json prints every measure", file=sys.stderr)


def rollout(result: Mapping[str, Any]) -> None:
    """Everything but the table."""
    show_mapping({name: value for name, value in result.items() if name != "table"})


def doctor(result: Mapping[str, Any]) -> None:
    """A line for each part of the installation."""
    for part in result["parts"]:
        advice = f" -> {part['advice']}" if part["advice"] else ""
        print(f"{part['state']:<9}{part['part']}: {part['found']}{advice}", file=sys.stderr)
    names = f" (broken: {', '.join(result['broken'])})" if result["broken"] else ""
    print(f"verdict: {result['verdict']}{names}", file=sys.stderr)


def forms(result: Mapping[str, Any]) -> None:
    """The forms of some hours of a stay beside its raw rows."""
    from mmjepa.ehr.show import print_forms

    print_forms(result)
