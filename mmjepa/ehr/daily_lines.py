"""Lines of the daily text: written from rows, cut to a budget, read back."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

TAGS = ("conditions", "observations", "measurements", "procedures", "drugs", "notes")
_VALUED = re.compile(r"(.*): (-?\d+\.\d\d(?:, -?\d+\.\d\d)*)")
_TITLE = re.compile(r"\[(.*)\]|<timespan>(.*)</timespan>")
_EDGE = re.compile(r"//?| ")


class DailyLine(NamedTuple):
    """A line that was read back. section: what stands in the brackets or the timespan, '' in the header; head: name and
    unit as written."""

    section: str
    tag: str
    head: str
    values: tuple[float, ...]


class Line(NamedTuple):
    """A line to write. tag: place in TAGS; newest: place of its last row in the section."""

    tag: int
    text: str
    newest: int


@dataclass(frozen=True)
class Section:
    """The rows of a day or a timespan in the order of time. tag: place in TAGS of each row; heads: what stands in a line of
    each vocabulary code, without and with a value."""

    title: str
    tag: np.ndarray
    code: np.ndarray
    value: np.ndarray
    heads: Sequence[tuple[str, str]]
    last_values: int

    @cached_property
    def lines(self) -> list[Line]:
        """One line a code, by tag and then in the order in which codes are first seen; a repeated line stays once."""
        values: dict[int, list[float]] = {}
        newest: dict[int, int] = {}
        tags: dict[int, int] = {}
        rows = zip(self.code.tolist(), self.value.tolist(), self.tag.tolist(), strict=True)
        for place, (code, value, tag) in enumerate(rows):
            known = values.setdefault(code, [])
            if np.isfinite(value):
                known.append(value)
            newest[code], tags[code] = place, tag
        made: dict[tuple[int, str], int] = {}
        for code, known in values.items():
            numbers = ", ".join(f"{value:.2f}" for value in known[-self.last_values :])
            bare, valued = self.heads[code]
            key = tags[code], f"{valued}: {numbers}" if numbers else bare
            made[key] = max(newest[code], made.get(key, -1))
        return [Line(tag, text, place) for (tag, text), place in sorted(made.items(), key=lambda item: item[0][0])]

    @cached_property
    def text(self) -> str:
        """All lines with their title."""
        return self.title + _blocks(self.lines)

    def cut(self, fits: Callable[[str], bool]) -> str:
        """The text of as many of the newest lines as ``fits`` allows, at least one."""
        by_age = sorted(line.newest for line in self.lines)

        def newest(kept: int) -> str:
            return self.title + _blocks([line for line in self.lines if line.newest >= by_age[-kept]])

        return newest(max(1, largest(len(by_age), lambda kept: fits(newest(kept)))))


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number in 0..most that fits, 0 unasked, where all smaller ones fit too; asks for small ones first."""
    reach = 1
    while reach <= most and fits(reach):
        reach *= 2
    low, high = reach // 2, min(reach - 1, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def family(code: str, families: Mapping[str, int]) -> int | None:
    """What ``families`` (keys in lower case) says of the longest start of a code that ends at ``//``, ``/``, a blank or its end."""
    code = code.lower()
    ends = [len(code), *(edge.start() for edge in reversed(list(_EDGE.finditer(code))))]
    return next((families[code[:end]] for end in ends if code[:end] in families), None)


def split_unit(code: str, unit_families: Iterable[str]) -> tuple[str, str]:
    """A code without its unit, and the unit: ``LAB//220045//bpm`` gives (``LAB//220045``, ``bpm``); ``UNK`` is none."""
    first, *parts = code.split("//")
    if first not in unit_families or len(parts) < 2:
        return code, ""
    return "//".join([first, *parts[:-1]]), "" if parts[-1] == "UNK" else parts[-1]


def make_heads(name: str, unit: str) -> tuple[str, str]:
    """What a line says without a value, and before its values; changed where it would read as something else."""
    name = " ".join(name.split()).replace(": ", " - ").lstrip("<[ ") or "code"
    return name, f"{name} ({' '.join(unit.split())})" if unit.strip() else name


def parse_daily(text: str) -> list[DailyLine]:
    """Read a daily text back, the header's lines first."""
    section, tag, found = "", "", []
    for line in text.splitlines():
        if not line or line.startswith("</"):
            continue
        if title := _TITLE.fullmatch(line):
            section = title[1] or title[2]
        elif line.startswith("<"):
            tag = line.strip("<>")
        else:
            valued = _VALUED.fullmatch(line)
            head, numbers = valued.groups() if valued else (line, "")
            found.append(DailyLine(section, tag, head, tuple(float(n) for n in numbers.split(", ") if n)))
    return found


def _blocks(lines: Sequence[Line]) -> str:
    text = ""
    for place, tag in enumerate(TAGS):
        if mine := [line.text for line in lines if line.tag == place]:
            text += "\n".join([f"<{tag}>", *mine, f"</{tag}>\n"])
    return text
