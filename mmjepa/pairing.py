"""Which CT goes with which record, as of when. What cannot be paired is a row with its reason, never guessed and never absent."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from mmjepa.ehr.store import EventStore, to_us
from mmjepa.refusal import Refusal

Rule = Literal["as_of_scan", "as_of_order", "nearest"]
Scans = Literal["all", "first", "last", "nearest"]
DAY_US = 86_400_000_000
NEVER = np.int64(2**62)
COLUMNS = ("image_id", "subject_id", "time")
REASONS = (
    "subject_not_in_records",
    "other_subject_in_records",
    "no_time",
    "no_event_in_window",
    "no_order_in_window",
    "no_label_after",
    "other_scan_taken",
)
NO_IMAGE = "no_image"
BLOCK_ROWS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class PairingConfig:
    """How a run pairs, as ``pair`` takes it. ``nearest`` scans need labels, which a run has none of."""

    rule: Rule = "as_of_scan"
    window_days: float | None = None
    orders: tuple[str, ...] = ()
    scans: Literal["all", "first", "last"] = "all"

    def __post_init__(self) -> None:
        try:
            _check_rule(self.rule, self.window_days, self.orders, self.scans)
        except Refusal as refusal:
            raise ValueError(f"{refusal.message}; {refusal.hint}") from None


def pair(
    index: pd.DataFrame,
    store: EventStore,
    *,
    rule: Rule = "as_of_scan",
    window_days: float | None = None,
    orders: Sequence[str] = (),
    scans: Scans = "all",
    labels: pd.DataFrame | None = None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Pair images with the records of their subjects: the paired rows of ``pairing_table``, and a report.

    Returns a frame of image_id, subject_id, prediction_time (datetime64[us]) in the order of the index, and a report: rule,
    window_days, scans, images, paired, unmatched (reason -> images), subjects (with both, with records or images alone) and
    days_apart (quantiles over the pairs). Arguments and refusals: see ``pairing_table``.
    """
    arguments = {"rule": rule, "window_days": window_days, "scans": scans}
    table = pairing_table(index, store, **arguments, orders=orders, labels=labels)
    images = table[table["reason"] != NO_IMAGE]
    paired = images[images["reason"] == ""]
    counts = images["reason"].value_counts()
    both, seen = paired["subject_id"].nunique(), images.loc[images["reason"] != "subject_not_in_records", "subject_id"]
    report: dict[str, Any] = {**arguments, "images": len(images), "paired": len(paired)}
    report["unmatched"] = {name: int(counts.get(name, 0)) for name in REASONS}
    report["subjects"] = {
        "paired": int(both),
        "records_alone": int((table["reason"] == NO_IMAGE).sum()),
        "images_alone": int(images.loc[images["reason"] == "subject_not_in_records", "subject_id"].nunique()),
        "both_but_unpaired": int(seen.nunique() - both),
    }
    quantiles = paired["days_apart"].quantile([0, 0.25, 0.5, 0.75, 1]) if len(paired) else pd.Series(dtype=float)
    report["days_apart"] = {f"{share:.0%}": round(float(days), 3) for share, days in quantiles.items()}
    return paired[["image_id", "subject_id", "prediction_time"]].reset_index(drop=True), report


def pairing_table(
    index: pd.DataFrame,
    store: EventStore,
    *,
    rule: Rule = "as_of_scan",
    window_days: float | None = None,
    orders: Sequence[str] = (),
    scans: Scans = "all",
    labels: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """One row an image, and one a subject of the records without any image.

    index: image_id, subject_id, time (null where unknown: then the time of the store's row with that image_id counts).
    ``as_of_scan``: prediction_time is the scan's time; some event other than an image must have been available by then, at most
    ``window_days`` before (None: ever). ``as_of_order``: prediction_time is when the CT was ordered, the latest event of a code
    that equals or continues one of ``orders`` at or before the scan and at most ``window_days`` before it; the image counts as
    the ordered test's result. ``nearest``: the event nearest in time, before or after the scan and at most ``window_days`` away;
    prediction_time is when both the scan and that event are known.
    scans: of a subject's pairs keep ``all``, those of the ``first`` or ``last`` moment, or those ``nearest`` before its ``labels``
    (subject_id, prediction_time): for each label the last moment at or before it, since a later scan would not be known.

    Returns image_id (None: no image), subject_id, scan_time, prediction_time (NaT where unpaired), days_apart (from the scan back to
    the last event or order, or to the nearest event) and reason ("" where paired; see ``REASONS``). Images come in the order of
    the index. Raises Refusal PAIRING_INDEX, PAIRING_RULE.
    """
    _check(index, rule, window_days, orders, scans, labels)
    window_us = NEVER if window_days is None else np.int64(round(window_days * DAY_US))
    subjects = index["subject_id"].to_numpy(np.int64)
    known = np.isin(subjects, store.subjects)
    rows = np.where(known, np.searchsorted(store.subjects, subjects), 0)
    timed, event = index["time"].notna().to_numpy(), _recorded(index["image_id"], store)
    others = (event >= 0) & ((event < store.offsets[rows]) | (event >= store.offsets[rows + 1]))
    t_us = np.where(
        timed,
        to_us(index["time"]),
        np.where(event >= 0, store.times_us[event.clip(0)] if len(store.times_us) else 0, 0),
    )
    reason = np.full(len(index), "", object)
    for name, mask in zip(REASONS, (~known, others, ~timed & (event < 0)), strict=False):
        reason[mask & (reason == "")] = name
    open_ = np.flatnonzero(reason == "")
    at, apart = np.full(len(index), NEVER), np.full(len(index), NEVER)
    find = {"as_of_scan": _last_known, "nearest": _nearest, "as_of_order": _ordered}[rule]
    at[open_], apart[open_] = find(store, rows[open_], t_us[open_], orders)
    reason[open_[apart[open_] > window_us]] = "no_order_in_window" if rule == "as_of_order" else "no_event_in_window"
    reason[open_[apart[open_] == NEVER]] = "no_order_in_window" if rule == "as_of_order" else "no_event_in_window"
    _take(reason, subjects, t_us, at, scans, labels)
    paired = reason == ""
    table = pd.DataFrame({"image_id": index["image_id"].to_numpy(object), "subject_id": subjects})
    table["scan_time"] = _times(t_us, timed | (event >= 0))
    table["prediction_time"] = _times(at, paired)
    table["days_apart"] = np.where(paired, apart / DAY_US, np.nan)
    table["reason"] = reason
    alone = np.setdiff1d(store.subjects, subjects)
    nothing = _times(np.zeros(len(alone), np.int64), np.zeros(len(alone), bool))
    without = pd.DataFrame({"image_id": np.full(len(alone), None, object), "subject_id": alone, "scan_time": nothing})
    without = without.assign(prediction_time=nothing, days_apart=np.nan, reason=NO_IMAGE)
    return pd.concat([table, without.astype(table.dtypes.to_dict())], ignore_index=True) if len(alone) else table


def _check(
    index: pd.DataFrame,
    rule: str,
    window_days: float | None,
    orders: Sequence[str],
    scans: str,
    labels: pd.DataFrame | None,
) -> None:
    missing = [name for name in COLUMNS if name not in index]
    if missing:
        raise Refusal("PAIRING_INDEX", f"the image index lacks {', '.join(missing)}", f"It needs {', '.join(COLUMNS)}")
    _check_rule(rule, window_days, orders, scans)
    if (scans == "nearest") != (labels is not None):
        raise Refusal("PAIRING_RULE", "labels go with the scans nearest to them, and that needs them", "Give labels")


def _check_rule(rule: str, window_days: float | None, orders: Sequence[str], scans: str) -> None:
    for value, kind in ((rule, Rule), (scans, Scans)):
        if value not in get_args(kind):
            raise Refusal("PAIRING_RULE", f"unknown rule '{value}'", f"Take one of {', '.join(get_args(kind))}")
    if window_days is not None and not window_days >= 0:
        raise Refusal("PAIRING_RULE", "the window is no number of days from 0 up", "Give days, or none for ever")
    if (rule == "as_of_order") != bool(orders):
        raise Refusal("PAIRING_RULE", "the codes of CT orders go with as_of_order, and it needs them", "Give orders")


def _recorded(images: pd.Series, store: EventStore) -> np.ndarray:
    """[n] int64: the store's row of each image, -1 where it has none."""
    rows = {image: row for row, image in store.image_ids.items()}
    return np.fromiter((rows.get(image, -1) for image in images), np.int64, len(images))


def _times(us: np.ndarray, there: np.ndarray) -> np.ndarray:
    times = us.astype(np.int64).view("datetime64[us]").copy()
    times[~there] = np.datetime64("NaT")
    return times


def _last_known(
    store: EventStore, rows: np.ndarray, t_us: np.ndarray, _: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """(t, us from the latest event known then) [n]; an event of the future that was known already is no distance."""
    apart = np.full(len(rows), NEVER)
    start, stop = store.as_of(np.asarray(store.subjects)[rows], t_us) if len(rows) else (rows, rows)
    for mine, low, high in _blocks(store, rows):
        times = np.append(store.times_us[low:high], -NEVER)
        times[store.image_rows[slice(*np.searchsorted(store.image_rows, [low, high]))] - low] = -NEVER
        mine = mine[stop[mine] > start[mine]]
        mine = mine[np.argsort(start[mine], kind="stable")]  # reduceat also reads what lies between two ranges
        if len(mine):
            ends = np.stack([start[mine] - low, stop[mine] - low], axis=1).ravel()
            latest = np.maximum.reduceat(times, ends)[::2]
            apart[mine] = np.where(latest == -NEVER, NEVER, (t_us[mine] - latest).clip(0))
    return t_us, apart


def _nearest(store: EventStore, rows: np.ndarray, t_us: np.ndarray, _: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(when scan and event are both known, us from the scan to the nearest event) [n]; of equally near, the sooner known."""
    at, apart = t_us.copy(), np.full(len(rows), NEVER)
    for mine, low, high in _blocks(store, rows):
        keep = np.ones(high - low, bool)
        keep[store.image_rows[slice(*np.searchsorted(store.image_rows, [low, high]))] - low] = False
        found = np.flatnonzero(keep) + low
        subject = np.searchsorted(store.offsets, found, side="right") - 1
        times, known = store.times_us[found], store.available_us[found]
        order = np.lexsort((known, times, subject))
        keys = _Keys(subject[order], times[order])
        times, known = times[order], known[order]
        best = np.full(len(mine), NEVER)
        for place, there in (keys.last(rows[mine], t_us[mine]), keys.first(rows[mine], t_us[mine])):
            distance = np.where(there, np.abs(times[place] - t_us[mine]) if len(times) else NEVER, NEVER)
            when = np.maximum(known[place], times[place]) if len(times) else best
            better = (distance < apart[mine]) | ((distance == apart[mine]) & there & (when < best))
            best = np.where(better, when, best)
            apart[mine] = np.where(better, distance, apart[mine])
        at[mine] = np.where(apart[mine] < NEVER, np.maximum(t_us[mine], best), t_us[mine])
    return at, apart


def _ordered(
    store: EventStore, rows: np.ndarray, t_us: np.ndarray, orders: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """(time of the latest order at or before the scan, us between them) [n]."""
    wanted = store.match(orders)
    if not wanted.any():
        raise Refusal("PAIRING_RULE", "no code of the records is one of the orders", "Check the codes of CT orders")
    found = np.flatnonzero(wanted[np.asarray(store.codes)])
    subject, times = np.searchsorted(store.offsets, found, side="right") - 1, np.asarray(store.times_us)[found]
    order = np.lexsort((times, subject))
    place, there = _Keys(subject[order], times[order]).last(rows, t_us)
    at = np.where(there, times[order][place] if len(times) else 0, t_us)
    return at, np.where(there, t_us - at, NEVER)


class _Keys:
    """Events sorted by (subject, time), found by both at once."""

    def __init__(self, subject: np.ndarray, times: np.ndarray) -> None:
        self._times = np.unique(times)
        self._step = np.int64(len(self._times) + 1)
        self._keys = subject * self._step + np.searchsorted(self._times, times)

    def last(self, subject: np.ndarray, t_us: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(place, there is one) of the last event at or before t; of those of one time the first."""
        found = np.searchsorted(self._keys, subject * self._step + np.searchsorted(self._times, t_us, side="right")) - 1
        there = (found >= 0) & (self._keys[found.clip(0)] // self._step == subject) if len(self._keys) else found >= 0
        key = self._keys[found.clip(0)] if len(self._keys) else found
        return np.where(there, np.searchsorted(self._keys, key), 0), there

    def first(self, subject: np.ndarray, t_us: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(place, there is one) of the first event at or after t."""
        found = np.searchsorted(self._keys, subject * self._step + np.searchsorted(self._times, t_us))
        inside = found < len(self._keys)
        there = inside & (self._keys[found * inside] // self._step == subject) if len(self._keys) else inside
        return np.where(there, found, 0), there


def _blocks(store: EventStore, rows: np.ndarray) -> Iterator[tuple[np.ndarray, int, int]]:
    """(positions in ``rows``, first store row, end) of the images of neighbouring subjects, a few million events at a time."""
    offsets = np.asarray(store.offsets)
    block = offsets[rows] // BLOCK_ROWS
    order = np.argsort(block, kind="stable")
    for mine in np.split(order, np.flatnonzero(np.diff(block[order])) + 1):
        if len(mine):
            yield mine, int(offsets[rows[mine].min()]), int(offsets[rows[mine].max() + 1])


def _take(
    reason: np.ndarray,
    subjects: np.ndarray,
    scan_us: np.ndarray,
    at: np.ndarray,
    scans: Scans,
    labels: pd.DataFrame | None,
) -> None:
    """Say of the pairs that are not kept why, by the times of the scans: an order's or an event's would tell two scans not apart.
    All images of a kept moment stay: reconstructions of one scan."""
    if scans == "all":
        return
    paired = np.flatnonzero(reason == "")
    frame = pd.DataFrame({"subject_id": subjects[paired], "scan": scan_us[paired]})
    if labels is None:
        kept = frame["scan"] == frame.groupby("subject_id")["scan"].transform("min" if scans == "first" else "max")
        reason[paired[~kept.to_numpy()]] = "other_scan_taken"
        return
    known = np.maximum(scan_us, at)[paired]
    wanted = pd.DataFrame(
        {"subject_id": labels["subject_id"].to_numpy(np.int64), "label": to_us(labels["prediction_time"])}
    )
    moments = frame.assign(known=known).drop_duplicates().sort_values(["known", "scan"])
    nearest = pd.merge_asof(
        wanted.sort_values("label"), moments, left_on="label", right_on="known", by="subject_id", direction="backward"
    ).dropna(subset="scan")
    taken = pd.MultiIndex.from_frame(nearest[["subject_id", "scan"]].astype(np.int64))
    last = wanted.groupby("subject_id")["label"].max().reindex(frame["subject_id"]).to_numpy(float, na_value=-np.inf)
    reason[paired[~pd.MultiIndex.from_frame(frame).isin(taken)]] = "other_scan_taken"
    reason[paired[known > last]] = "no_label_after"
