"""Batches of event windows for any model: joint tokens with values, times, static rows, labels and events to hide.

A batch is one gather over the store: no subject is touched in Python, and the cost of a window does not grow with the
record it lies in. What a row holds depends on (seed, epoch, subject, prediction time) alone, never on its neighbours.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmjepa.ehr.choices import check_choices
from mmjepa.ehr.ragged import Grid, hash32, hash64, ranges
from mmjepa.ehr.store import EventStore, given_us
from mmjepa.ehr.tokens import PAD, JointTokens
from mmjepa.keyed import generator, key_words
from mmjepa.refusal import Refusal

DAY_US = 86_400_000_000
EVER = np.iinfo(np.int64).max
_CHUNK = 1 << 20  # rows of the store looked at at once


@dataclass(frozen=True, kw_only=True)
class BatchesConfig:
    """length: most events a row, static ones included where they are prepended.

    window: where it lies in what is known: the ``end``, the ``start``, or ``random`` (each possible start equally likely).
    static: ``prepend`` puts a subject's static rows first, ``separate`` into fields of their own, ``omit`` leaves them out.
    time: ``before`` the prediction time (0 or negative days), ``since`` the event before in the window (0 at the first,
        negative behind a late result), or ``omit``; 0 at static rows.
    values: whether to read them. pad: the side of short rows.
    hide: probability that an event is hidden for masked prediction, each by itself; static rows never are.
    """

    length: int = 512
    window: Literal["end", "start", "random"] = "end"
    static: Literal["prepend", "separate", "omit"] = "prepend"
    time: Literal["before", "since", "omit"] = "before"
    values: bool = True
    pad: Literal["right", "left"] = "right"
    hide: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        if self.length < 1 or not 0 <= self.hide < 1:
            raise ValueError(f"length={self.length} must be at least 1 and hide={self.hide} lie in 0..1, 1 left out")


@dataclass
class EventBatch:
    """B rows of at most L events, L the longest of the batch. None: the config omits it.

    subjects: int64 [B]. first: int64 [B], number of the window's first event among those known that give a token.
    codes: int64 [B, L], PAD where ``present`` (bool) is False. values: float32, winsorised z-scores, 0 where ``has_value``
    (bool) is False. days: float32, see ``BatchesConfig.time``. is_static, hidden: bool. All [B, L].
    static_codes, static_values, static_has_value: [B, S], padded on the right.
    labels: [B], as given.
    """

    subjects: Tensor
    first: Tensor
    codes: Tensor
    present: Tensor
    values: Tensor | None = None
    has_value: Tensor | None = None
    days: Tensor | None = None
    is_static: Tensor | None = None
    hidden: Tensor | None = None
    static_codes: Tensor | None = None
    static_values: Tensor | None = None
    static_has_value: Tensor | None = None
    labels: Tensor | None = None


class EventBatches:
    """Items are (subject, prediction time) pairs, or whole records."""

    def __init__(
        self,
        store: EventStore,
        subjects: np.ndarray,
        prediction_times: Any = None,
        *,
        tokens: JointTokens,
        labels: np.ndarray | None = None,
        config: BatchesConfig | None = None,
    ) -> None:
        """subjects: int64 [n], repeats allowed. prediction_times: [n], date-times or int64 us (``store.given_us``); None sees
        whole records, and ``before`` then counts from the moment when the last row became known. labels: [n], of any type
        that torch knows.

        Rows that give no token (``tokens.config.exclude``, images) are looked for once, here. Raises Refusal SUBJECT_UNKNOWN,
        TIME_TYPE, TIME_ZONE.
        """
        self._arguments = (store, subjects, prediction_times, tokens, labels, config)
        self.config, self.tokens = config or BatchesConfig(), tokens
        self.subjects = np.asarray(subjects, np.int64)
        self.labels = None if labels is None else np.asarray(labels)
        for name, column in (("prediction_times", prediction_times), ("labels", labels)):
            if column is not None and len(column) != len(self.subjects):
                raise ValueError(f"{len(column)} {name} for {len(self.subjects)} subjects")
        self._codes, self._values, self._times = (np.asarray(x) for x in (store.codes, store.values, store.times_us))
        self._table = tokens._table(store)
        self._gone = _without_token(store, self._table)
        self._gone_rank = self._gone - np.arange(len(self._gone))
        self._static = _Static(store, tokens, self._table)
        self._row = store.rows(self.subjects)
        self._begin = np.asarray(store.offsets)[self._row]
        t_us = np.full(len(self.subjects), EVER) if prediction_times is None else given_us(prediction_times)
        start, stop = store.as_of(self.subjects, t_us)
        self.prediction_times = None if prediction_times is None else t_us
        self._key_us = t_us
        if prediction_times is None and len(store.available_us):
            t_us = np.where(stop > start, store.available_us[np.maximum(stop - 1, 0)], 0)
        self._t_us = t_us
        self._known = start - np.searchsorted(self._gone, start), stop - np.searchsorted(self._gone, stop)

    def __len__(self) -> int:
        return len(self.subjects)

    def __reduce__(self) -> tuple[Callable[..., "EventBatches"], tuple[Any, ...]]:
        """Another process looks the rows up anew; the store travels by path."""
        return _again, self._arguments

    def epoch(self, number: int, size: int, *, shuffle: bool = True) -> "Epoch":
        """All items once, ``size`` a batch, made when they are asked for; the last batch may be smaller. The order depends on
        (seed, number) alone. Raises Refusal BATCH_EMPTY."""
        return Epoch(self, number, size, shuffle=shuffle)

    def batch(self, items: np.ndarray, epoch: int = 0) -> EventBatch:
        """The batch of some items (indices int64 [B])."""
        config, items = self.config, np.asarray(items, np.int64)
        static = self._static.of(self._row[items], config.length if config.static == "prepend" else None)
        front = static if config.static == "prepend" else _no_static(len(items))
        key = self._keys(items, epoch)
        first, taken = self._windows(items, config.length - front.lengths, key)
        rows = self._rows(first, taken)
        grid = Grid(front.lengths, taken, config.pad)
        codes = self._table[self._codes[rows]]
        found = EventBatch(
            subjects=torch.from_numpy(self.subjects[items]),
            first=torch.from_numpy(first - self._known[0][items]),
            codes=grid.lay(self.tokens.binned(codes, self._values[rows]), front.codes, PAD),
            present=torch.from_numpy(grid.present),
            labels=None if self.labels is None else torch.from_numpy(self.labels[items]),
        )
        if config.values:
            values, has_value = _scaled(self.tokens, codes, self._values[rows])
            found.values = grid.lay(values, front.values, 0)
            found.has_value = grid.lay(has_value, front.has_value, False)
        if config.time != "omit":
            found.days = grid.lay(self._days(rows, items, taken), 0, 0)
        if config.hide:
            drawn = hash32(key, rows, self._begin[items], taken)
            found.hidden = grid.lay(drawn < np.uint32(config.hide * 2.0**32), False, False)
        if config.static == "prepend":
            found.is_static = torch.from_numpy(grid.in_front)
        elif config.static == "separate":
            own = Grid(_no_static(len(items)).lengths, static.lengths, "right")
            found.static_codes = own.lay(static.codes, PAD, PAD)
            if config.values:
                found.static_values = own.lay(static.values, 0, 0)
                found.static_has_value = own.lay(static.has_value, False, False)
        return found

    def _keys(self, items: np.ndarray, epoch: int) -> np.ndarray:
        """uint64 [B]: one key of (seed, epoch, subject, prediction time) each."""
        words = key_words(self.config.seed, "ehr/window", epoch)
        seed = np.full(len(items), words[0] | words[1] << 32, np.uint64)
        return hash64(hash64(seed, self.subjects[items]), self._key_us[items])

    def _windows(self, items: np.ndarray, room: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the first event of each window, counted over all rows that give a token, and how many it takes."""
        begin, end = self._known[0][items], self._known[1][items]
        taken = np.minimum(end - begin, room)
        if self.config.window == "start":
            return begin, taken
        if self.config.window == "end":
            return end - taken, taken
        share = (hash64(key, np.full(len(items), -1)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return begin + (share * (end - begin - taken + 1)).astype(np.int64), taken

    def _rows(self, first: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """The store rows of windows, behind one another: the rows between their ends, without those that give no token."""
        low, high = self._place(first), self._place(first + taken - 1) + 1
        high = np.where(taken > 0, high, low)
        rows = ranges(low, high)
        gone = ranges(np.searchsorted(self._gone, low), np.searchsorted(self._gone, high))
        return rows[~np.isin(rows, self._gone[gone], kind="sort")] if len(gone) else rows

    def _place(self, number: np.ndarray) -> np.ndarray:
        """The store row of the n-th row that gives a token."""
        return number + np.searchsorted(self._gone_rank, number, side="right")

    def _days(self, rows: np.ndarray, items: np.ndarray, taken: np.ndarray) -> np.ndarray:
        times = self._times[rows]
        if self.config.time == "before":
            return ((times - np.repeat(self._t_us[items], taken)) / DAY_US).astype(np.float32)
        since = np.diff(times, prepend=0)
        since[(np.cumsum(taken) - taken)[taken > 0]] = 0
        return (since / DAY_US).astype(np.float32)


class Epoch(Dataset[EventBatch]):
    """The batches of one epoch, by number or one after the other; the same bits with worker processes as without::

        for batch in torch.utils.data.DataLoader(batches.epoch(0, 64), batch_size=None, num_workers=2):
            batch.codes

    ``batch_size=None`` because an item is a batch already.
    """

    def __init__(self, batches: EventBatches, number: int, size: int, *, shuffle: bool) -> None:
        if size < 1:
            raise Refusal("BATCH_EMPTY", f"batches of {size} items", "Want 1 or more")
        self._batches, self.number, self._size = batches, number, size
        rng = generator(batches.config.seed, "ehr/order", number)
        self._order = rng.permutation(len(batches)) if shuffle else np.arange(len(batches))

    def __len__(self) -> int:
        return -(-len(self._order) // self._size)

    def __getitem__(self, index: int) -> EventBatch:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        return self._batches.batch(self._order[index * self._size : (index + 1) * self._size], self.number)

    def __iter__(self) -> Iterator[EventBatch]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class _StaticRows:
    """Static rows of some subjects behind one another, and how many each has."""

    lengths: np.ndarray
    codes: np.ndarray
    values: np.ndarray
    has_value: np.ndarray


class _Static:
    """The static rows of a store as tokens."""

    def __init__(self, store: EventStore, tokens: JointTokens, table: np.ndarray) -> None:
        codes = table[np.asarray(store.static_codes)]
        kept = np.flatnonzero(codes >= 0)
        values = np.asarray(store.static_values)[kept]
        self._codes = tokens.binned(codes[kept], values)
        self._values, self._has_value = _scaled(tokens, codes[kept], values)
        self._offsets = np.searchsorted(kept, np.asarray(store.static_offsets))

    def of(self, rows: np.ndarray, most: int | None) -> _StaticRows:
        """The first ``most`` of each subject row."""
        low, high = self._offsets[rows], self._offsets[rows + 1]
        if most is not None:
            high = np.minimum(high, low + most)
        at = ranges(low, high)
        return _StaticRows(high - low, self._codes[at], self._values[at], self._has_value[at])


def _no_static(count: int) -> _StaticRows:
    return _StaticRows(np.zeros(count, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, bool))


def _again(
    store: EventStore,
    subjects: np.ndarray,
    prediction_times: Any,
    tokens: JointTokens,
    labels: np.ndarray | None,
    config: BatchesConfig | None,
) -> EventBatches:
    return EventBatches(store, subjects, prediction_times, tokens=tokens, labels=labels, config=config)


def _without_token(store: EventStore, table: np.ndarray) -> np.ndarray:
    """int64, ascending: the rows of the store that give no token."""
    found = [np.asarray(store.image_rows, np.int64)]
    if (table < 0).any():
        for start in range(0, len(store.codes), _CHUNK):
            found.append(start + np.flatnonzero(table[store.codes[start : start + _CHUNK]] < 0))
    return np.unique(np.concatenate(found))


def _scaled(tokens: JointTokens, codes: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values as ``JointTokens`` scales them, looked at only where there is one."""
    given = np.flatnonzero(~np.isnan(values))
    scaled, has_value = np.zeros(len(values), np.float32), np.zeros(len(values), bool)
    scaled[given], has_value[given] = tokens._scale(codes[given], values[given])
    return scaled, has_value
