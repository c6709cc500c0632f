"""Joint code + value tokens with continuous time: one token an event (arXiv 2603.15644: this form wins on most tasks).

A value is either a number beside its code's token (``zscore``) or part of the token itself (``bins``). Everything that is fitted
(vocabulary, winsor limits, means and deviations, edges of bins) is fitted on training subjects only, and kept
in one JSON with the hash of its content and the fingerprint of the store that it was fitted on.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmjepa.config import build, to_plain
from mmjepa.ehr.choices import check_choices
from mmjepa.ehr.saved import Form, load_form
from mmjepa.ehr.store import EventStore
from mmjepa.refusal import Refusal

PAD, UNKNOWN, FIRST = 0, 1, 2
DAY_US = 86_400_000_000
KIND, VERSION = "tokens", 3


@dataclass(frozen=True)
class TokensConfig:
    """min_count: rows that a code needs among training subjects, else it becomes UNKNOWN. winsor: quantiles at which a
    code's values are cut. values: "bins": a token of its own for each code and quantile bin of its values, of which there are
    ``bins`` at most; "zscore": a token a code, the winsorised z-score beside it. exclude: code prefixes that give no token:
    images (which their own encoder sees), codes that spell an outcome, procedures coded at discharge but dated to a midnight
    before them. DIAGNOSIS stays: rows are read by when they became available, so a diagnosis stamped at its discharge
    (MIMIC-IV) is seen only after it. A task predicted at that discharge itself must exclude it.
    """

    min_count: int = 5
    winsor: tuple[float, float] = (0.01, 0.99)
    values: Literal["zscore", "bins"] = "zscore"
    bins: int = 10
    exclude: tuple[str, ...] = (
        "CT",
        "MEDS_DEATH",
        "HOSPITAL_DISCHARGE",
        "ICU_DISCHARGE",
        "TRANSFER_TO//discharge",
        "DRG",
        "PROCEDURE//ICD",
    )

    def __post_init__(self) -> None:
        check_choices(self)
        low, high = self.winsor
        if self.min_count < 1 or self.bins < 2 or not 0 <= low < high <= 1:
            raise ValueError("min_count must be at least 1, bins 2 and winsor two rising quantiles in 0..1")


@dataclass(frozen=True, eq=False)
class JointTokens(Form):
    """The fitted form. ``codes[i]`` has token ``first[i]`` where it has no value; low, high (winsor limits), mean, std: float64
    [codes], NaN for a code without values among training subjects. edges: float64 [codes, bins - 1], rising, the training
    quantiles behind which the next bin begins, NaN behind the last distinct one; None without bins. Bin b of ``codes[i]`` has
    token ``first[i] + 1 + b``."""

    config: TokensConfig
    codes: tuple[str, ...] = field(repr=False)
    low: np.ndarray = field(repr=False)
    high: np.ndarray = field(repr=False)
    mean: np.ndarray = field(repr=False)
    std: np.ndarray = field(repr=False)
    fitted_on: str
    edges: np.ndarray | None = field(default=None, repr=False)
    _tables: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def size(self) -> int:
        """Number of tokens, PAD and UNKNOWN included."""
        return FIRST + int(self._widths.sum())

    @cached_property
    def _widths(self) -> np.ndarray:
        """int64 [codes]: how many tokens each code has."""
        if self.edges is None:
            return np.ones(len(self.codes), np.int64)
        return 1 + np.where(np.isnan(self.mean), 0, 1 + (~np.isnan(self.edges)).sum(1))

    @cached_property
    def first(self) -> np.ndarray:
        """int64 [codes]: the token of each code without a value."""
        return FIRST + np.cumsum(self._widths) - self._widths

    @classmethod
    def fit(cls, store: EventStore, subjects: Iterable[int], config: TokensConfig | None = None) -> "JointTokens":
        """Fit on the rows, static ones included, of ``subjects``: pass training subjects only. Raises TOKENS_EMPTY."""
        config = config or TokensConfig()
        rows = store.rows(np.unique(np.fromiter(subjects, np.int64)))
        parts = [_gather(store.offsets, rows, store.codes, store.values)]
        parts.append(_gather(store.static_offsets, rows, store.static_codes, store.static_values))
        codes, values = (np.concatenate(column) for column in zip(*parts, strict=True))
        counts = np.bincount(codes, minlength=len(store.vocabulary))
        kept = np.flatnonzero((counts >= config.min_count) & ~store.match(config.exclude))
        if not len(kept):
            raise Refusal(
                "TOKENS_EMPTY",
                f"no code occurs {config.min_count} times among the {len(rows)} training subjects",
                "Lower min_count or check the splits",
            )
        stats, edges = _statistics(codes, values, kept, config)
        names = tuple(store.vocabulary[code] for code in kept)
        edges = edges if config.values == "bins" else None
        return cls(config, names, *stats, fitted_on=store.fingerprint, edges=edges)

    def encode(
        self, store: EventStore, subject_id: int, start: int, stop: int, t_us: int, max_events: int
    ) -> dict[str, np.ndarray]:
        """Tokens of a subject's events in the row range start:stop (from ``store.as_of``).

        Static rows come first; of the timed ones those known last are kept, so that L <= max_events in all. Returns
        codes int64 [L]; values float32 [L], winsorised z-scores, 0 without a value and with bins; has_value bool [L]; days float32
        [L], the time of the event minus t, 0 for static rows.
        The cost does not grow with the length of the record.
        """
        row = store.row(subject_id)
        if not store.offsets[row] <= start <= stop <= store.offsets[row + 1]:
            raise ValueError("the rows asked for are not the subject's own")
        table = self._table(store)
        static = slice(int(store.static_offsets[row]), int(store.static_offsets[row + 1]))
        static_tokens = table[store.static_codes[static]]
        shown = np.flatnonzero(static_tokens >= 0)[:max_events]
        rows = _latest(store, table, start, stop, max_events - len(shown))
        tokens = np.concatenate([static_tokens[shown], table[store.codes[rows]]])
        numbers = np.append(store.static_values[static][shown], store.values[rows])
        values, has_value = self._scale(tokens, numbers)
        days = np.zeros(len(tokens), np.float32)
        days[len(shown) :] = (store.times_us[rows] - t_us) / DAY_US
        return {"codes": self.binned(tokens, numbers), "values": values, "has_value": has_value, "days": days}

    @classmethod
    def load(cls, path: Path | str, *, expected: str | None = None) -> "JointTokens":
        """Read the JSON; ``expected``: the hash that it must have. Raises the Refusals of ``saved.load_form``."""
        content = load_form(path, KIND, VERSION, expected)
        try:
            columns = (np.array(content[name], np.float64) for name in ("low", "high", "mean", "std"))
            edges = None if content["edges"] is None else np.array(content["edges"], np.float64)
            config = build(TokensConfig, content["config"])
            return cls(config, tuple(content["codes"]), *columns, fitted_on=content["fitted_on"], edges=edges)
        except (KeyError, TypeError, ValueError):
            raise Refusal("FORM_BROKEN", f"{path} holds no joint tokens", "Fit the form again") from None

    def _content(self) -> dict[str, Any]:
        columns = {name: _or_null(getattr(self, name)) for name in ("low", "high", "mean", "std")}
        known = {"kind": KIND, "version": VERSION, "fitted_on": self.fitted_on, "config": to_plain(self.config)}
        edges = None if self.edges is None else [_or_null(row) for row in self.edges]
        return known | {"codes": list(self.codes), "edges": edges} | columns

    def _table(self, store: EventStore) -> np.ndarray:
        """int64 [store vocabulary]: token of each code without a value; -1 = excluded."""
        if store.fingerprint not in self._tables:
            token = dict(zip(self.codes, self.first.tolist(), strict=True))
            table = np.array([token.get(code, UNKNOWN) for code in store.vocabulary], np.int64)
            table[store.match(self.config.exclude)] = -1
            self._tables[store.fingerprint] = table
        return self._tables[store.fingerprint]

    def binned(self, tokens: np.ndarray, values: np.ndarray) -> np.ndarray:
        """int64 [L]: tokens of codes without a value, made those of their bins where there is a value; as they are without
        bins."""
        if self.edges is None:
            return tokens
        which = np.minimum(np.searchsorted(self.first, tokens), len(self.codes) - 1)
        with_bin = ~np.isnan(values) & (tokens >= FIRST) & (self._widths[which] > 1)
        which = which[with_bin]
        tokens = tokens.copy()
        tokens[with_bin] += 1 + (values[with_bin, None] >= self.edges[which]).sum(1)
        return tokens

    def _scale(self, tokens: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.edges is not None:  # the token says it
            return np.zeros(len(tokens), np.float32), np.zeros(len(tokens), bool)
        which = np.maximum(tokens - FIRST, 0)
        has_value = ~np.isnan(values) & (tokens >= FIRST) & ~np.isnan(self.mean[which])
        scaled = (np.clip(values, self.low[which], self.high[which]) - self.mean[which]) / self.std[which]
        return np.where(has_value, scaled, 0).astype(np.float32), has_value


def _latest(store: EventStore, table: np.ndarray, start: int, stop: int, most: int) -> np.ndarray:
    """The last ``most`` rows of the range that give a token, ascending; looks back only as far as needed."""
    if most <= 0:
        return np.empty(0, np.int64)
    reach = 2 * most
    while True:
        low = max(start, stop - reach)
        shown = table[store.codes[low:stop]] >= 0
        images = store.image_rows[slice(*np.searchsorted(store.image_rows, [low, stop]))]
        shown[images - low] = False
        if low == start or shown.sum() >= most:
            return low + np.flatnonzero(shown)[-most:]
        reach *= 2


def _gather(
    offsets: np.ndarray, rows: np.ndarray, codes: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values of some subjects."""
    spans = [slice(int(offsets[row]), int(offsets[row + 1])) for row in rows]
    empty = (np.empty(0, codes.dtype), np.empty(0, values.dtype))
    return (
        np.concatenate([empty[0], *(codes[span] for span in spans)]),
        np.concatenate([empty[1], *(values[span] for span in spans)]),
    )


def _statistics(
    codes: np.ndarray, values: np.ndarray, kept: np.ndarray, config: TokensConfig
) -> tuple[np.ndarray, np.ndarray]:
    """[4, codes]: low, high, mean, std of each kept code's finite values, after winsorising; std 1 where all are equal.
    [codes, bins - 1]: their distinct quantiles between bins."""
    finite = np.isfinite(values)
    codes, values = codes[finite], values[finite].astype(np.float64)
    order = np.lexsort((values, codes))
    codes, values = codes[order], values[order]
    spans = np.searchsorted(codes, kept), np.searchsorted(codes, kept, side="right")
    stats, edges = np.full((4, len(kept)), np.nan), np.full((len(kept), config.bins - 1), np.nan)
    inner = np.arange(1, config.bins) / config.bins
    for i, (start, stop) in enumerate(zip(*spans, strict=True)):
        if stop > start:
            last = stop - start - 1
            low = values[start + int(config.winsor[0] * last)]
            high = values[start + int(np.ceil(config.winsor[1] * last))]
            cut = np.clip(values[start:stop], low, high)
            stats[:, i] = low, high, cut.mean(), cut.std() or 1.0
            between = np.unique(values[start + np.ceil(inner * last).astype(int)])
            edges[i, : len(between)] = between
    return stats, edges


def _or_null(column: np.ndarray) -> list[float | None]:
    return [None if value != value else value for value in column.tolist()]
