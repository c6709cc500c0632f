"""What the verbs' parsers share, and what the texts of arguments stand for: one that says nothing of the kind is told what would."""

import argparse
import math
import textwrap
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmjepa.console import Result, show_mapping

EXIT_CODES = (
    "exit codes: 0 done, 1 the audit failed, 2 refused (bad input, said in one line; ingest: no image was accepted), "
    "130 interrupted"
)


def verb(
    verbs: Any,
    name: str,
    call: Callable[[argparse.Namespace], Result],
    summary: str,
    text: str,
    example: str,
    makes: str,
    show: Callable[[Mapping[str, Any]], None] = show_mapping,
) -> argparse.ArgumentParser:
    """The parser of a verb, with what every one understands; ``makes``: what comes out."""
    parser = verbs.add_parser(
        name,
        help=summary,
        description=f"{textwrap.fill(text, 100)}\n\nexample:   {example}\ncomes out: {makes}",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on standard output")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(call=call, show=show)
    return parser


def config_arguments(parser: argparse.ArgumentParser) -> None:
    """A config and what is laid over it."""
    parser.add_argument("config", type=Path, help="a YAML config")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="laid on the config, for instance optim.lr=1e-4"
    )


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """A run and a cohort."""
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("cohort", type=Path, help="a cohort folder")


def two_numbers(text: str) -> tuple[float, float]:
    """``1,-1024`` as a slope above 0 and an intercept."""
    try:
        slope, intercept = map(float, text.split(","))
    except ValueError:
        slope, intercept = math.nan, math.nan
    if not (slope > 0 and math.isfinite(slope) and math.isfinite(intercept)):
        raise ArgumentTypeError(f"{text!r} is no slope above 0 and intercept: want them as 1,-1024")
    return slope, intercept


def hours(text: str) -> tuple[int, int]:
    """``0:6`` as the first hour and the one behind the last."""
    try:
        first, last = map(int, text.split(":"))
    except ValueError:
        raise ArgumentTypeError(f"{text!r} are no hours: want A:B, as 0:6") from None
    return first, last


def names(text: str) -> list[str]:
    """``a,b`` as two names."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise ArgumentTypeError(f"{text!r} lacks a name: want one, or several as a,b")
    return found
