"""How a command ends: exit codes, refusals in one line, one JSON object on standard output. The verbs and the recipes share it."""

import argparse
import contextlib
import errno
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmjepa.refusal import Refusal

REFUSED, FAULT, INTERRUPTED = 2, 70, 130
GO_ON = "Run the same command again to go on from there"
Result = Mapping[str, Any] | tuple[Mapping[str, Any], int] | None


def run(function: Callable[[], Result], *, as_json: bool = False, debug: bool = False) -> int:
    """Call ``function`` and turn how it ends into an exit code: ``sys.exit(run(main))``.

    function: returns a mapping (the result), the mapping and an exit code, or None. A KeyboardInterrupt raised with a message
        says how to go on after Ctrl-C.
    as_json: the result, a refusal or an interruption becomes one JSON object, the only line on standard output; whatever else
        is printed meanwhile, by child processes too, goes to standard error.
    debug: show tracebacks.

    Exit codes: 0 done, 2 refused, 130 interrupted, 70 a fault of ours; a function may return another with its result.
    """
    with _stdout_to_stderr() if as_json else contextlib.nullcontext():
        result, code = _outcome(function, debug)
    if as_json:
        print(json.dumps(_plain(result), allow_nan=False), flush=True)
    return code


def recipe_parser(description: str | None) -> argparse.ArgumentParser:
    """What every recipe understands: --config, key=value overrides, --json and --debug; a recipe may add its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, for instance one of recipes/configs/")
    parser.add_argument("--json", action="store_true", help="one JSON object as the only line of standard output")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="laid over the config, for instance seed=1")
    return parser


def run_recipe(main: Callable[[argparse.Namespace], Result], parser: argparse.ArgumentParser) -> int:
    """Parse the command line and call ``main``; returns the exit code: ``sys.exit(run_recipe(main, parser))``."""
    options = parser.parse_args()

    def call() -> Result:
        try:
            return main(options)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(str(interrupt) or "Run the same command with resume=true to go on") from None

    return run(call, as_json=options.json, debug=options.debug)


def _outcome(function: Callable[[], Result], debug: bool) -> tuple[Mapping[str, Any], int]:
    try:
        value = function()
    except KeyboardInterrupt as interrupt:
        go_on = str(interrupt) or GO_ON
        _tell(f"interrupted. {go_on}")
        return {"interrupted": go_on}, INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, OSError):
            error = _from_system(error)
        if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("mmjepa"):
            error = Refusal(
                "PACKAGE_MISSING", f"the package {error.name} is not installed", "`mmjepa doctor` says which"
            )
        return _refused(error) if isinstance(error, Refusal) else _fault(error)
    result, code = value if isinstance(value, tuple) else (value, 0)
    return result or {}, code


def _fault(error: Exception) -> tuple[Mapping[str, Any], int]:
    """Name the place and not the message, which may quote data."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}"
    _tell(f"error: {place}. This is a fault in the program, not in the input; --debug shows the traceback")
    return {"error": place}, FAULT


def _refused(refusal: Refusal) -> tuple[Mapping[str, Any], int]:
    _tell(f"refused: {refusal}")
    return {"refused": {"code": refusal.code, "message": refusal.message, "hint": refusal.hint}}, REFUSED


def _from_system(error: OSError) -> Refusal:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Refusal("DISK_FULL", f"{where}no space left", "Free some space and run the same command again")
    return Refusal("FILE_ACCESS", f"{where}{error.strerror or type(error).__name__}")


def _tell(line: str) -> None:
    print(" ".join(line.split()), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send everything meant for standard output to standard error: Python's, C libraries' and child processes'."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _plain(value: Any) -> Any:
    """Values that JSON knows: numpy scalars as Python's, paths as text, not-a-number as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if hasattr(value, "item"):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def show_mapping(result: Mapping[str, Any], indent: int = 0) -> None:
    """Print a result for people on standard error, one line a value."""
    for key, value in result.items():
        if isinstance(value, Mapping) and value:
            print(f"{' ' * indent}{key}:", file=sys.stderr)
            show_mapping(value, indent + 2)
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            for n, item in enumerate(value, start=1):
                show_mapping({f"{key} {n}": item}, indent)
        else:
            print(f"{' ' * indent}{key}: {_shown(value)}", file=sys.stderr)


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_shown, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and value >= 10_000:
        return f"{value:,}"
    return "none" if value in (None, "", {}) else str(value)
