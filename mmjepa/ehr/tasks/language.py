"""Task and predicates files: the part of the ACES language that is understood here. Anything else is refused, never ignored.

Understood: plain predicates (``code`` as a string, ``{any: [...]}`` or ``{regex: ...}``; ``value_min``, ``value_max`` and their
``_inclusive``), ``expr: or(...)`` and ``and(...)``, ``_ANY_EVENT``; ``trigger``; windows with ``start``, ``end`` (null, a reference, a
reference plus or minus a duration, ``reference -> predicate``, ``reference <- predicate``), ``start_inclusive``, ``end_inclusive``,
``has``, ``label``, ``index_timestamp``. Refused: static predicates, demographics, other columns, bounds on the record's start or end by name.

ACES skips ``metadata``; what its language lacks stands there under ``mmjepa``, see ``Extras`` (task file) and ``FollowUp`` (predicates).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from mmjepa.config import build
from mmjepa.refusal import Refusal

ANY_EVENT = "_ANY_EVENT"
SECONDS = {"w": 604_800, "d": 86_400, "h": 3_600, "m": 60, "s": 1}
_DURATION = re.compile(
    r"(\d+\.?\d*|\.\d+)\s*(weeks?|w|days?|d|hours?|hrs?|h|minutes?|mins?|m|seconds?|secs?|s)\s*,?\s*"
)
_BOUND = re.compile(r"(?P<ref>\w+(?:\.(?:start|end))?)\s*(?:(?P<op>\+|-(?!>)|->|<-)\s*(?P<what>.+))?")


@dataclass(frozen=True)
class Predicate:
    """Which rows count. Plain: codes (exact) or a regex found in the code, and a range of values; derived: how, of which others."""

    codes: tuple[str, ...] = ()
    regex: str | None = None
    value_min: float | None = None
    value_max: float | None = None
    value_min_inclusive: bool = False
    value_max_inclusive: bool = False
    how: Literal["or", "and"] | None = None
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bound:
    """One end of a window: of ``reference`` ("trigger", "start", "end", "<window>.start"; None: the record's end), moved by
    ``offset_us``, or at the next ("->") or last ("<-") event of ``predicate``."""

    reference: str | None = None
    offset_us: int = 0
    arrow: str = ""
    predicate: str = ""


@dataclass(frozen=True)
class Window:
    """One window; ``has``: predicate -> fewest and most events in it (None: no limit)."""

    name: str
    start: Bound
    end: Bound
    start_inclusive: bool
    end_inclusive: bool
    has: Mapping[str, tuple[int | None, int | None]]
    label: str | None
    index_timestamp: str | None


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What the ACES language lacks; the defaults are its behaviour.

    true_when: the label is true where its events are ``present`` in the window, or where they are ``absent`` (a stay that has not ended).
    follow_up: whether rows of the dead, and rows without the event whose subject is lost before the window's end, are left out
        and counted.
    midnight_deaths: a death stamped 00:00 is a date; it counts at its ``as_stamped`` or at its ``end_of_day``, 23:59:59.
    within_stay: declared to the audit: the outcome falls into the stay that holds the prediction time.
    """

    true_when: Literal["present", "absent"] = "present"
    follow_up: bool = False
    midnight_deaths: Literal["as_stamped", "end_of_day"] = "as_stamped"
    within_stay: bool = False


@dataclass(frozen=True, kw_only=True)
class FollowUp:
    """Of a data set: events of ``known_after_last_event`` are known for so many ``days`` after a subject's last other event.

    A code stands for those below it as well: MEDS_DEATH for MEDS_DEATH//X.
    """

    known_after_last_event: tuple[str, ...] = ()
    days: float = 0.0


@dataclass(frozen=True)
class Task:
    """A task and its predicates. windows: in the order in which each one's references are known."""

    name: str
    trigger: str
    windows: tuple[Window, ...]
    predicates: Mapping[str, Predicate]
    extras: Extras
    follow_up: FollowUp

    @property
    def label_window(self) -> Window:
        """The window whose events are the label."""
        return next(window for window in self.windows if window.label)

    @property
    def index_window(self) -> Window:
        """The window one of whose ends is the prediction time."""
        return next(window for window in self.windows if window.index_timestamp)

    @property
    def used(self) -> list[str]:
        """Names of the predicates that are needed, parts before those made of them."""
        names = [self.trigger]
        for window in self.windows:
            names += [*window.has, *(b.predicate for b in (window.start, window.end) if b.arrow)]
            names += [window.label] if window.label else []
        found: list[str] = []
        for name in names:
            self._collect(name, found, ())
        return found

    def _collect(self, name: str, found: list[str], above: tuple[str, ...]) -> None:
        if name in above:
            raise Refusal("TASK_PREDICATE", f"predicate {name} is made of itself")
        if name in found or name == ANY_EVENT:
            return
        if name not in self.predicates:
            raise Refusal(
                "TASK_PREDICATE",
                f"predicate {name} of task {self.name} is not defined",
                "Add it to the predicates file",
            )
        for part in self.predicates[name].parts:
            self._collect(part, found, (*above, name))
        found.append(name)


def read_task(task: Path | str, predicates: Path | str | None = None) -> Task:
    """Read a task file and the predicates of its data set, which replace the task's own of the same name, as in ACES.

    Raises Refusal TASK_MISSING, TASK_UNREADABLE, TASK_UNSUPPORTED (outside the language of this module), TASK_PREDICATE, TASK_WINDOW, CONFIG_*.
    """
    says = _load(task, {"predicates", "trigger", "windows", "description", "metadata"})
    given = _load(predicates, {"predicates", "description", "metadata"}) if predicates is not None else {}
    rules = {**(says.get("predicates") or {}), **(given.get("predicates") or {})}
    trigger = says.get("trigger")
    if not isinstance(trigger, str) or not isinstance(says.get("windows"), dict):
        raise Refusal("TASK_WINDOW", f"{task} wants a trigger (the name of a predicate) and windows")
    windows = _in_order([_window(name, body) for name, body in says["windows"].items()])
    for what in ("label", "index_timestamp"):
        if sum(getattr(window, what) is not None for window in windows) != 1:
            raise Refusal("TASK_WINDOW", f"{task} wants exactly one window with {what}")
    parsed = {name: _predicate(name, body) for name, body in rules.items() if body != "???"}
    found = Task(
        Path(task).stem,
        trigger,
        windows,
        parsed,
        build(Extras, _own(says)),
        build(FollowUp, _own(given)),
    )
    index = found.index_window
    if getattr(index, str(index.index_timestamp)).reference is None:
        raise Refusal("TASK_WINDOW", f"the prediction time of {task} is the open end of the record")
    _ = found.used  # refuses undefined and circular predicates
    return found


def _own(says: Mapping[str, Any]) -> dict[str, Any]:
    return dict((says.get("metadata") or {}).get("mmjepa") or {})


def _load(path: Path | str, known: set[str]) -> dict[str, Any]:
    try:
        value = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise Refusal("TASK_MISSING", f"{path} does not exist", "Built-in tasks lie in datasets/*/tasks") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Refusal("TASK_UNREADABLE", f"{path} is no readable YAML file ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise Refusal("TASK_UNREADABLE", f"{path} is no mapping of keys")
    _refuse_unknown(str(path), value, known)
    return value


def _refuse_unknown(where: str, value: Mapping[str, Any], known: set[str]) -> None:
    unknown = [str(key) for key in value if key not in known]
    if unknown:
        raise Refusal(
            "TASK_UNSUPPORTED",
            f"{where} has {', '.join(unknown)}, which is not understood here",
            f"Understood: {', '.join(sorted(known))}; for all of the language use es-aces and ingest its labels",
        )


def _predicate(name: str, body: Any) -> Predicate:
    if not isinstance(body, dict):
        raise Refusal("TASK_PREDICATE", f"predicate {name} is no mapping", "Write {code: ...} or {expr: or(a, b)}")
    if "expr" in body:
        _refuse_unknown(f"predicate {name}", body, {"expr"})
        found = re.fullmatch(r"\s*(or|and)\(([\w\s,]+)\)\s*", str(body["expr"]))
        if not found:
            raise Refusal("TASK_UNSUPPORTED", f"the expr of predicate {name} is not or(a, b) or and(a, b)")
        how = "or" if found[1] == "or" else "and"
        return Predicate(how=how, parts=tuple(part.strip() for part in found[2].split(",")))
    limits = {"value_min", "value_max", "value_min_inclusive", "value_max_inclusive"}
    _refuse_unknown(f"predicate {name}", body, {"code", *limits})
    code, rest = body.get("code"), {key: value for key, value in body.items() if key != "code" and value is not None}
    if isinstance(code, str):
        return Predicate(codes=(code,), **rest)
    if isinstance(code, dict) and list(code) == ["any"] and code["any"]:
        return Predicate(codes=tuple(map(str, code["any"])), **rest)
    if isinstance(code, dict) and list(code) == ["regex"] and code["regex"]:
        try:
            re.compile(code["regex"])
        except re.error:
            raise Refusal("TASK_PREDICATE", f"the regex of predicate {name} does not compile") from None
        return Predicate(regex=code["regex"], **rest)
    raise Refusal("TASK_PREDICATE", f"the code of predicate {name} is no string, {{any: [...]}} or {{regex: ...}}")


def _window(name: str, body: Any) -> Window:
    known = {"start", "end", "start_inclusive", "end_inclusive", "has", "label", "index_timestamp"}
    if not isinstance(body, dict):
        raise Refusal("TASK_WINDOW", f"window {name} is no mapping")
    _refuse_unknown(f"window {name}", body, known)
    start, end = _bound(name, body.get("start")), _bound(name, body.get("end"))
    first, last = body.get("start_inclusive"), body.get("end_inclusive")
    if not (isinstance(first, bool) and isinstance(last, bool)):
        raise Refusal("TASK_WINDOW", f"window {name} must say start_inclusive and end_inclusive, true or false")
    if start.reference == "end" and end.reference == "start":
        raise Refusal("TASK_WINDOW", f"the ends of window {name} refer to each other")
    if body.get("index_timestamp") not in (None, "start", "end"):
        raise Refusal("TASK_WINDOW", f"index_timestamp of window {name} is neither start nor end")
    has = {predicate: _limits(name, limits) for predicate, limits in (body.get("has") or {}).items()}
    return Window(name, start, end, first, last, has, body.get("label"), body.get("index_timestamp"))


def _bound(window: str, text: Any) -> Bound:
    if text is None:
        return Bound()
    found = _BOUND.fullmatch(str(text).strip())
    if not found:
        raise Refusal("TASK_UNSUPPORTED", f"a bound of window {window} is not understood here")
    reference, arrow, what = found["ref"], found["op"], found["what"]
    if arrow in ("->", "<-"):
        if not re.fullmatch(r"\w+", what) or what.startswith("_RECORD"):
            raise Refusal("TASK_UNSUPPORTED", f"a bound of window {window} points at no predicate")
        return Bound(reference, arrow=arrow, predicate=what)
    return Bound(reference, 0 if arrow is None else (1 if arrow == "+" else -1) * _duration_us(window, what))


def _duration_us(window: str, text: str) -> int:
    pieces = _DURATION.findall(text)
    if not pieces or _DURATION.sub("", text).strip():
        raise Refusal("TASK_UNSUPPORTED", f"a duration of window {window} is not understood", "Write 24h or 30 days")
    return round(sum(float(number) * SECONDS[unit[0]] for number, unit in pieces) * 1_000_000)


def _limits(window: str, limits: Any) -> tuple[int | None, int | None]:
    text = str(limits).replace("[", "(").replace("]", ")")
    found = re.fullmatch(r"\(\s*(None|null|\d+)\s*,\s*(None|null|\d+)\s*\)", text)
    if not found:
        raise Refusal("TASK_WINDOW", f"a limit in has of window {window} is not (fewest, most)", "Write (1, None)")
    low, high = (None if number in ("None", "null") else int(number) for number in found.groups())
    if low is not None and high is not None and low > high:
        raise Refusal("TASK_WINDOW", f"a limit in has of window {window} is above its most", "Write (fewest, most)")
    return low, high


def _in_order(windows: list[Window]) -> tuple[Window, ...]:
    """Windows after those they refer to."""
    names = {window.name for window in windows}
    known: set[str] = set()
    ordered: list[Window] = []
    while len(ordered) < len(windows):
        ready = [w for w in windows if w.name not in known and _others(w) <= known]
        if not ready:
            raise Refusal("TASK_WINDOW", "windows refer to each other in a circle, or to one that is not there")
        ordered.append(ready[0])
        known.add(ready[0].name)
    assert known == names
    return tuple(ordered)


def _others(window: Window) -> set[str]:
    references = {bound.reference for bound in (window.start, window.end)} - {None, "trigger", "start", "end"}
    if any("." not in str(reference) for reference in references):
        raise Refusal("TASK_WINDOW", f"window {window.name} refers to a window without .start or .end")
    return {str(reference).split(".")[0] for reference in references}
