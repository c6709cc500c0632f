"""Does a MEDS root look like the source it is said to be? Rows and share of numbers for each family of codes.

A slip of a column name in a conversion empties values without an error; it shows here as a share of 0.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from meds_out import pc

from mmjepa import console
from mmjepa.ehr.meds_io import open_root
from mmjepa.refusal import Refusal


@dataclass(frozen=True)
class Family:
    """Codes that match a pattern, and what is expected of their rows.

    numbers: least and most share of rows with a number. range: an interval that holds at least 90 % of the numbers.
    """

    name: str
    pattern: str
    numbers: tuple[float, float]
    range: tuple[float, float] | None = None
    required: bool = True


def check(root: Path | str, families: tuple[Family, ...]) -> dict:
    """Rows, numeric share and share in range of each family, with ``ok`` for each and for all; a code may be in several.

    Raises Refusal: the MEDS_* codes.
    """
    folder = open_root(root)
    rows = np.zeros((len(families), 3), np.int64)  # rows, with a number, in range
    unmatched = 0
    for path in folder.shards:
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=["code", "numeric_value"]):
                    members = _count(batch, families, rows)
                    unmatched += int((~members).sum())
        except (pa.ArrowException, OSError, KeyError):
            raise Refusal("MEDS_UNREADABLE", f"{path} cannot be read as code and numeric_value") from None
    found = {family.name: _judged(family, *counts) for family, counts in zip(families, rows.tolist(), strict=True)}
    return {"ok": all(one["ok"] for one in found.values()), "rows_of_no_family": unmatched, "families": found}


def _count(batch: pa.RecordBatch, families: tuple[Family, ...], rows: np.ndarray) -> np.ndarray:
    """Add a batch to ``rows``; returns which of its rows belong to some family."""
    codes = batch.column("code").cast(pa.string()).dictionary_encode()
    places = codes.indices.to_numpy()
    values = pc.fill_null(batch.column("numeric_value").cast(pa.float64()), np.nan).to_numpy(zero_copy_only=False)
    numeric, some = ~np.isnan(values), np.zeros(len(places), bool)
    for k, family in enumerate(families):
        member = pc.match_substring_regex(codes.dictionary, family.pattern).to_numpy(zero_copy_only=False)[places]
        low, high = family.range or (-np.inf, np.inf)
        inside = member & numeric & (values >= low) & (values <= high)
        rows[k] += [member.sum(), (member & numeric).sum(), inside.sum()]
        some |= member
    return some


def _judged(family: Family, rows: int, numeric: int, inside: int) -> dict:
    share = numeric / rows if rows else None
    in_range = inside / numeric if numeric and family.range else None
    low, high = family.numbers
    ok = not family.required if share is None else low <= share <= high and (in_range is None or in_range >= 0.9)
    one = {"ok": ok, "rows": rows, "numbers": _short(share), "expected": list(family.numbers)}
    return one | ({"in_range": _short(in_range), "range": list(family.range)} if family.range else {})


def _short(share: float | None) -> float | None:
    return None if share is None else round(share, 4)


def run(check: Callable[[Path], dict], description: str | None) -> int:
    """The command line of a source's check; returns the exit code, 1 where the root is not as expected."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the MEDS root: a folder with data/ and metadata/")
    parser.add_argument("--json", action="store_true", help="one JSON object as the only line of standard output")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args()

    def call() -> tuple[dict, int]:
        result = check(options.root)
        if not options.json:
            console.show_mapping(result)
        return result, 0 if result["ok"] else 1

    return console.run(call, as_json=options.json, debug=options.debug)
