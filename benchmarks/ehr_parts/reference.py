"""What a batch must hold, written the slow way: pandas and plain Python, a row at a time, from the MEDS files alone."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mmjepa.ehr.batches import BatchesConfig, EventBatch, EventBatches
from mmjepa.ehr.tokens import FIRST, PAD, UNKNOWN, JointTokens
from mmjepa.keyed import key_words

DAY_US = 86_400_000_000
EVER = np.iinfo(np.int64).max
MASK = 2**64 - 1


def every_config(length: int, seed: int = 7) -> list[BatchesConfig]:
    """Each combination of flags."""
    names = ("window", "static", "time", "values", "pad", "hide")
    choices: tuple[tuple[Any, ...], ...] = (
        ("end", "start", "random"),
        ("prepend", "separate", "omit"),
        ("before", "since", "omit"),
        (True, False),
        ("right", "left"),
        (0.0, 0.3),
    )
    base = BatchesConfig(length=length, seed=seed)
    return [replace(base, **dict(zip(names, chosen, strict=True))) for chosen in product(*choices)]


def read_frame(root: Path) -> pd.DataFrame:
    """All rows of a MEDS root in file order, with the columns that it may lack."""
    frame = pd.concat([pd.read_parquet(file) for file in sorted((root / "data").rglob("*.parquet"))])
    for name in ("available_time", "image_id"):
        if name not in frame:
            frame[name] = None
    return frame.assign(available_time=pd.to_datetime(frame["available_time"]).fillna(frame["time"]))


class Event(NamedTuple):
    """One event that gives a token. number: of its row in the order in which the subject's rows became available."""

    token: int
    scaled: float
    has: bool
    time_us: int
    number: int


class Reference:
    """The rows that ``EventBatches`` should give for the records of a frame."""

    def __init__(self, frame: pd.DataFrame, tokens: JointTokens) -> None:
        self.tokens = tokens
        self._of = dict(iter(frame.groupby("subject_id", sort=False)))
        self._number = {code: i for i, code in enumerate(tokens.codes)}
        self._seen: dict[tuple[int, int], tuple[list[Event], list[Event], int]] = {}

    def row(self, subject: int, t_us: int | None, config: BatchesConfig, epoch: int) -> dict[str, list[Any]]:
        """The fields of one row without padding; ``static_*`` where they are separate."""
        known, static, now_us = self._known(subject, t_us)
        front = static[: config.length] if config.static == "prepend" else []
        taken = min(len(known), config.length - len(front))
        seed = key_words(config.seed, "ehr/window", epoch)
        key = mix(mix(seed[0] | seed[1] << 32, subject), EVER if t_us is None else t_us)
        first = {"start": 0, "end": len(known) - taken}.get(config.window)
        if first is None:
            first = int((mix(key, -1) >> 11) * 2.0**-53 * (len(known) - taken + 1))
        window = known[first : first + taken]
        events = [*front, *window]
        fields: dict[str, list[Any]] = {
            "first": [first],
            "codes": [event.token for event in events],
            "present": [True] * len(events),
        }
        if config.values:
            fields["values"] = [event.scaled for event in events]
            fields["has_value"] = [event.has for event in events]
        if config.time != "omit":
            times = [event.time_us for event in window]
            origin = [now_us] * taken if config.time == "before" else [*times[:1], *times[:-1]]
            days = [(time - other) / DAY_US for time, other in zip(times, origin, strict=True)]
            fields["days"] = [0.0] * len(front) + days
        if config.hide:
            drawn = [mix32(key, event.number) < int(config.hide * 2**32) for event in window]
            fields["hidden"] = [False] * len(front) + drawn
        if config.static == "prepend":
            fields["is_static"] = [True] * len(front) + [False] * taken
        if config.static == "separate":
            fields["static_codes"] = [event.token for event in static]
            if config.values:
                fields["static_values"] = [event.scaled for event in static]
                fields["static_has_value"] = [event.has for event in static]
        return fields

    def _known(self, subject: int, t_us: int | None) -> tuple[list[Event], list[Event], int]:
        """The events known at t that give a token; the static ones; the time from which days are counted."""
        key = subject, EVER if t_us is None else t_us
        if key not in self._seen:
            own = self._of[subject]
            timed = own[own["time"].notna()].sort_values("available_time", kind="stable")
            timed = timed.assign(
                number=range(len(timed)), time_us=timed["time"].astype("datetime64[us]").astype("int64")
            )
            available = timed["available_time"].astype("datetime64[us]").astype("int64")
            known, available = timed[available <= key[1]], available[available <= key[1]]
            now = t_us if t_us is not None else int(available.iloc[-1]) if len(known) else 0
            static = own[own["time"].isna()].assign(number=-1, time_us=0)
            self._seen[key] = self._events(known[known["image_id"].isna()]), self._events(static), now
        return self._seen[key]

    def _events(self, rows: pd.DataFrame) -> list[Event]:
        """The rows that give a token."""
        found = []
        columns = (rows[name].tolist() for name in ("code", "numeric_value", "time_us", "number"))
        for code, value, time_us, number in zip(*columns, strict=True):
            if any(code == name or code.startswith(f"{name}//") for name in self.tokens.config.exclude):
                continue
            i = self._number.get(code)
            has = i is not None and value == value and not np.isnan(self.tokens.mean[i])
            scaled = 0.0
            if i is not None and has:
                cut = min(max(value, self.tokens.low[i]), self.tokens.high[i])
                scaled = float((cut - self.tokens.mean[i]) / self.tokens.std[i])
            token = UNKNOWN if i is None else FIRST + i
            found.append(Event(token, scaled, has, time_us, number))
        return found


def mismatches(batches: EventBatches, reference: Reference, items: np.ndarray, epoch: int) -> int:
    """How many fields of how many rows differ from the reference, in any bit that float32 keeps."""
    batch, config = batches.batch(items, epoch), batches.config
    times = batches.prediction_times
    wrong = 0
    for place, item in enumerate(items.tolist()):
        t_us = None if times is None else int(times[item])
        expected = reference.row(int(batches.subjects[item]), t_us, config, epoch)
        wrong += int(batch.subjects[place]) != batches.subjects[item]
        if batches.labels is not None:
            assert batch.labels is not None
            wrong += batch.labels[place].item() != batches.labels[item]
        for name in EventBatch.__dataclass_fields__:
            if name not in ("subjects", "labels"):
                wrong += _differs(getattr(batch, name), expected.get(name), place, name, config)
    return int(wrong)


def _differs(found: Any, expected: list[Any] | None, place: int, name: str, config: BatchesConfig) -> bool:
    if found is None or expected is None:
        return (found is None) != (expected is None)
    row = np.atleast_1d(found[place].numpy())
    full = np.full(len(row), PAD if "codes" in name else 0).astype(row.dtype)
    where = (
        slice(len(row) - len(expected), None)
        if config.pad == "left" and "static_" not in name
        else slice(len(expected))
    )
    full[where] = np.array(expected, np.float64).astype(row.dtype)
    return row.tobytes() != full.tobytes()


def mix(key: int, value: int) -> int:
    """SplitMix64's finaliser over Python's whole numbers."""
    x = (key + (value + 1) * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


def mix32(key: int, number: int) -> int:
    """MurmurHash3's 32-bit finaliser."""
    x = (key + number * 0x9E3779B9) & 0xFFFFFFFF
    x = ((x ^ x >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ x >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ x >> 16
