"""Which CT goes with which record, as of when. What cannot be paired is counted with its reason, never guessed."""

from collections import Counter
from typing import Any, Literal

import numpy as np
import pandas as pd

from mmjepa.ehr.store import EventStore, to_us
from mmjepa.refusal import Refusal

Rule = Literal["as_of_scan", "nearest"]
DAY_US = 86_400_000_000
COLUMNS = ("image_id", "subject_id", "time")
REASONS = ("subject_not_in_records", "other_subject_in_records", "no_time", "no_event_in_window")


def pair(
    index: pd.DataFrame, store: EventStore, *, rule: Rule = "as_of_scan", window_days: float | None = None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Pair images with the records of their subjects.

    index: image_id, subject_id, time (null where unknown: then the time of the store's row with that image_id counts).
    ``as_of_scan``: prediction_time is the scan's time; some event other than an image must have been available by then,
    at most ``window_days`` before (None: ever). ``nearest``: the event nearest in time, before or after the scan and at
    most ``window_days`` away; prediction_time is when both the scan and that event are known.

    Returns a frame of image_id, subject_id, prediction_time (datetime64[us]) in the order of the index, and a report:
    rule, window_days, images, paired, unmatched (reason -> count). An image that the records give to another subject
    (``other_subject_in_records``) is left out. Raises Refusal PAIRING_INDEX, PAIRING_RULE.
    """
    missing = [name for name in COLUMNS if name not in index]
    if missing:
        raise Refusal("PAIRING_INDEX", f"the image index lacks {', '.join(missing)}", f"It needs {', '.join(COLUMNS)}")
    if rule not in ("as_of_scan", "nearest"):
        raise Refusal("PAIRING_RULE", f"unknown rule '{rule}'", "Take as_of_scan or nearest")
    window_us = None if window_days is None else round(window_days * DAY_US)
    find = _as_of_scan if rule == "as_of_scan" else _nearest
    recorded = {image: row for row, image in store.image_ids.items()}
    known = np.isin(np.asarray(index["subject_id"], np.int64), store.subjects)
    timed = index["time"].notna().to_numpy()
    pairs: list[tuple[str, int, int]] = []
    unmatched: Counter[str] = Counter()
    columns = (index["image_id"], index["subject_id"], to_us(index["time"]), known, timed)
    for image, subject, time_us, in_records, has_time in zip(*columns, strict=True):
        if not in_records:
            unmatched["subject_not_in_records"] += 1
            continue
        span = _span(store, int(subject))
        event = recorded.get(image)
        if event is not None and not span[0] <= event < span[1]:
            unmatched["other_subject_in_records"] += 1
        elif not has_time and event is None:
            unmatched["no_time"] += 1
        else:
            t_us = int(time_us) if has_time or event is None else int(store.times_us[event])
            found = find(store, span, t_us, window_us)
            if found is None:
                unmatched["no_event_in_window"] += 1
            else:
                pairs.append((image, int(subject), found))
    frame = pd.DataFrame(pairs, columns=["image_id", "subject_id", "prediction_time"])
    frame["prediction_time"] = frame["prediction_time"].to_numpy(np.int64).view("datetime64[us]")
    report = {"rule": rule, "window_days": window_days, "images": len(index), "paired": len(frame)}
    return frame.astype({"subject_id": np.int64}), report | {"unmatched": {name: unmatched[name] for name in REASONS}}


def _span(store: EventStore, subject: int) -> tuple[int, int]:
    row = store.row(subject)
    return int(store.offsets[row]), int(store.offsets[row + 1])


def _as_of_scan(store: EventStore, span: tuple[int, int], t_us: int, window_us: int | None) -> int | None:
    start, stop = span[0], span[0] + int(np.searchsorted(store.available_us[slice(*span)], t_us, side="right"))
    inside = ~_images(store, start, stop)
    if window_us is not None:
        inside &= store.times_us[start:stop] >= t_us - window_us
    return t_us if inside.any() else None


def _nearest(store: EventStore, span: tuple[int, int], t_us: int, window_us: int | None) -> int | None:
    times = np.asarray(store.times_us[slice(*span)])
    distance = np.where(_images(store, *span), np.iinfo(np.int64).max, np.abs(times - t_us))
    if not len(distance):
        return None
    best = int(np.argmin(distance))
    if distance[best] > (np.iinfo(np.int64).max - 1 if window_us is None else window_us):
        return None
    return max(t_us, int(times[best]), int(store.available_us[span[0] + best]))


def _images(store: EventStore, start: int, stop: int) -> np.ndarray:
    """bool [stop - start]: rows that stand for an image."""
    mask = np.zeros(stop - start, bool)
    rows = store.image_rows[slice(*np.searchsorted(store.image_rows, [start, stop]))]
    mask[rows - start] = True
    return mask
