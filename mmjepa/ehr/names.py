"""Readable names of codes: a person's own map first, then the description in the records, then the code made readable."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from mmjepa.refusal import Refusal

UNKNOWN = "UNK"


def read_names(path: Path | str) -> dict[str, tuple[str, str]]:
    """Read a name map: a csv with the columns code, name and (may be empty) unit. Returns code -> (name, unit).

    Raises Refusal NAMES_MISSING, NAMES_SCHEMA.
    """
    path = Path(path)
    if not path.is_file():
        raise Refusal("NAMES_MISSING", f"{path} is not a file", "Name a csv with the columns code,name,unit")
    with open(path, newline="", encoding="utf-8-sig") as handle:
        reader = csv.DictReader(handle)
        if not {"code", "name", "unit"} <= set(reader.fieldnames or ()):
            raise Refusal("NAMES_SCHEMA", f"{path} lacks a column", "Its first line must be code,name,unit")
        rows = [(row["code"] or "", row["name"] or "", row["unit"] or "") for row in reader]
    for number, (code, name, _) in enumerate(rows):
        if not code.strip() or not _clean(name):
            raise Refusal("NAMES_SCHEMA", f"row {number} of {path} lacks its code or name", "Fill it or delete the row")
    return {code.strip(): (_clean(name), _clean(unit)) for code, name, unit in rows}


def name_and_unit(
    code: str, descriptions: Mapping[str, str], names: Mapping[str, tuple[str, str]], unit_families: Iterable[str]
) -> tuple[str, str]:
    """Name and unit ('' when there is none) of a code. ``LAB//220045//bpm`` without a description gives ('220045', 'bpm').

    unit_families: first parts of the codes whose last of three or more parts is a unit. A code whose parts say nothing is
    its own name: ``LAB//`` is not ``LAB``. Never an empty name.
    """
    if code in names:
        return names[code]
    family, *parts = code.split("//")
    unit = parts.pop() if family in unit_families and len(parts) >= 2 else ""
    said = " ".join(parts) if any(part.strip() not in ("", UNKNOWN) for part in parts) else code
    name = _clean(descriptions.get(code) or "") or _clean(said) or repr(code)
    return name, "" if unit == UNKNOWN else _clean(unit)


def format_value(value: float) -> str:
    """A reading as text: whole numbers whole, others with four significant digits, never an exponent between 1e-4 and 1e7."""
    if value == round(value, 0) and abs(value) < 1e7:
        return str(int(value))
    rounded = f"{value:.4g}"
    return f"{value:.0f}" if abs(value) < 1e7 and abs(float(rounded)) >= 1e4 else rounded


def _clean(text: str) -> str:
    return " ".join(text.split()).rstrip(".")
