"""Deliberate leaks, off unless asked for by name: each plants one fault that an audit is due to find."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa

from mmjepa.refusal import Refusal
from synthetic.events import Rows, Vocabulary
from synthetic.world import Subjects


@dataclass(frozen=True)
class Switch:
    """says: what is wrong with data made under it. check: number of the audit check due."""

    says: str
    check: str


SWITCHES: dict[str, Switch] = {}


def check(names: Sequence[str], scans: int) -> None:
    """Refusal ``SYNTHETIC_RANGE`` where a leak needs what is not made."""
    if "later_crop" in names and scans < 2:
        raise Refusal("SYNTHETIC_RANGE", "the leak later_crop needs --scans of at least 2")


def described(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """For the truth: what was planted."""
    return {name: {"says": SWITCHES[name].says, "check": SWITCHES[name].check} for name in names}


def of_people(names: Sequence[str], persons: pd.DataFrame, subjects: Subjects) -> pd.DataFrame:
    """People with the leaks that concern who they are."""
    return persons


def of_pictures(names: Sequence[str], frames: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """Image parameters, one frame a scan, with the leaks that concern images."""
    return frames


def of_record(
    names: Sequence[str], rows: Rows, vocabulary: Vocabulary, prediction_s: int, label: bool, seed: int, subject: int
) -> Rows:
    """One subject's rows with the leaks that concern records. prediction_s: second of the prediction time."""
    return rows


def of_shard(names: Sequence[str], splits: pd.DataFrame, records: pa.Table) -> tuple[pd.DataFrame, pa.Table]:
    """Splits (subject_id, split) and records of a shard with the leaks that concern who stands where."""
    return splits, records


def of_labels(names: Sequence[str], labels: pd.DataFrame, records: pa.Table) -> pd.DataFrame:
    """Labels (subject_id, second, boolean_value) of a shard with the leaks that concern them."""
    return labels


def of_metadata(names: Sequence[str], root: Path) -> None:
    """The MEDS root's metadata with the leaks that concern it."""
