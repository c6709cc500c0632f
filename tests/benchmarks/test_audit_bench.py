"""The audit's benchmark counts a leak as caught only where the check that is due fires on it and not on the clean cohort."""

import importlib.util
import sys
from pathlib import Path

import pytest

from synthetic.leaks import SWITCHES

PATH = Path(__file__).parents[2] / "benchmarks" / "audit.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmark_audit", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_audit"] = module
    spec.loader.exec_module(module)
    return module


def found(**verdicts: str) -> dict[str, dict[str, str]]:
    return {part.lstrip("_"): {"verdict": verdict, "name": "n"} for part, verdict in verdicts.items()}


@pytest.mark.parametrize(
    ("leak", "verdicts", "clean", "caught"),
    [
        ("lab_at_order_time", found(_13="fail"), found(_13="pass"), ["13"]),
        ("lab_at_order_time", found(_13="warn"), found(_13="pass"), []),
        ("lab_at_order_time", found(_13="fail"), found(_13="fail"), []),
        ("lab_at_order_time", found(_1="fail", _4d="fail", _13="pass"), found(), []),
        ("window_opens_early", found(_4="pass", _4d="fail"), found(_4d="pass"), ["4d"]),
        ("record_length", found(_10="warn"), found(_10="pass"), ["10"]),
        ("record_length", found(_10="warn"), found(_10="warn"), []),
    ],
)
def test_only_the_check_that_is_due_catches_and_only_what_the_clean_cohort_lacks(bench, leak, verdicts, clean, caught):
    assert bench.caught_by(leak, verdicts, clean) == caught


def test_every_switch_is_planted_under_every_seed_beside_the_clean_cohort_of_its_seed(bench):
    cases = bench.cases(2000, 5)
    planted = [case for case in cases if case.leak]
    clean = {(case.kind, case.seed) for case in cases if not case.leak}
    assert len(planted) == 5 * len(SWITCHES) == len(set(planted))
    assert {case.leak for case in planted} == set(SWITCHES)
    assert len(clean) == 20
    assert {(case.kind, case.seed) for case in planted} <= clean


def test_a_leak_missed_under_one_seed_is_said_with_the_seed(bench):
    cases = bench.cases(2000, 2)
    loud = {leak: found(**{f"_{switch.check}": "fail"}) for leak, switch in SWITCHES.items()}
    results = {case: loud[case.leak] if case.leak else found() for case in cases}
    results[bench.Case("records", 2001, "order_tells")] = found(_12="pass")
    rows = {row["leak"]: row for row in bench.rows_of(results)}
    assert (rows["order_tells"]["caught"], rows["order_tells"]["missed_seeds"]) == (1, [2001])
    assert all(row["caught"] == 2 for leak, row in rows.items() if leak != "order_tells")
