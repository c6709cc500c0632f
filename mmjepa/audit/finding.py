"""What a check says."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pass", "warn", "fail", "not-applicable"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check's result.

    check: its number (a letter marks a part of it). count: how many items fired.
    sentence: what was found. advice: what to do, empty where there is nothing to do. task: the label task, or None.
    """

    check: str
    name: str
    verdict: Verdict
    count: int
    sentence: str
    advice: str = ""
    task: str | None = None


def judge(check: str, name: str, count: int, sentence: str, advice: str, *, fires: Verdict = "fail") -> Finding:
    """A finding that passes when ``count`` is 0 and has the verdict ``fires`` otherwise."""
    return Finding(
        check=check,
        name=name,
        verdict=fires if count else "pass",
        count=int(count),
        sentence=sentence,
        advice=advice if count else "",
    )


def not_applicable(check: str, name: str, why: str) -> Finding:
    """A finding of a check that had nothing to look at."""
    return Finding(check=check, name=name, verdict="not-applicable", count=0, sentence=why)


def worst(findings: Iterable[Finding]) -> Verdict:
    """``fail`` if anything failed, else ``warn`` if anything warned, else ``pass``."""
    verdicts = {finding.verdict for finding in findings}
    return "fail" if "fail" in verdicts else "warn" if "warn" in verdicts else "pass"
