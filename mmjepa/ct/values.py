"""Values of DICOM tags, whichever parser read them: text, numbers, moments. What cannot be parsed counts as absent."""

import math
import re
from datetime import datetime
from functools import lru_cache
from typing import Any

import pydicom
from pydicom.errors import BytesLengthException
from pydicom.tag import BaseTag, Tag

Values = pydicom.Dataset | dict[str, Any]  # a dict: by keyword
_UNPARSABLE = (
    ValueError,
    TypeError,
    NotImplementedError,
    LookupError,
    AttributeError,
    OverflowError,
    BytesLengthException,
)


@lru_cache
def _tag(name: str) -> BaseTag:
    """The tag of a keyword: pydicom would look it up each time."""
    return Tag(name)


def value_of(data: Values, name: str) -> Any:
    """A tag's value; a tag that cannot be parsed counts as absent, and what is absent has its own code."""
    if isinstance(data, dict):
        return data.get(name)
    try:
        tag = _tag(name)
        return data[tag].value if tag in data else None
    except _UNPARSABLE:
        return None


def text_of(data: Values, name: str) -> str:
    """A tag's value as stripped text, empty where absent."""
    value = value_of(data, name)
    return "" if value is None else str(value).strip().strip("\0").strip()


def many_of(data: Values, name: str) -> list[Any]:
    """A tag's values (items of a sequence too), empty where absent."""
    value = value_of(data, name)
    if value is None or value == "":
        return []
    return [value] if isinstance(value, (str, int, float)) else list(value)


def floats_of(data: Values, name: str, count: int) -> tuple[float, ...] | None:
    """A tag's ``count`` finite numbers, None where there is anything else."""
    try:
        values = tuple(float(part) for part in many_of(data, name))
    except (ValueError, TypeError):
        return None
    return values if len(values) == count and all(map(math.isfinite, values)) else None


def moment_of(text: str) -> datetime | None:
    """DICOM date and time, at least to the minute, in the clock of the site; a date alone is no moment."""
    found = re.fullmatch(r"(\d{8})(\d{4})(\d{2})?(?:\.(\d{1,6}))?(?:[+-]\d{4})?", text)
    if not found:
        return None
    day, minute, second, fraction = found.groups()
    clock = (int(minute[:2]), int(minute[2:]), int(second or 0), int((fraction or "0").ljust(6, "0")))
    try:
        return datetime(int(day[:4]), int(day[4:6]), int(day[6:]), *clock)
    except ValueError:
        return None
