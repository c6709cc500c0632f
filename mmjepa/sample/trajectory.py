"""Batches of the trajectory system: windows of hours, each hour a state text and an action text, one static text.

Slots of a window (arXiv 2605.10840): [d, s1, a1, ..., sT, aT] at positions 0, 1, 2, ..., with hour(d) = 0 and
hour(s_k) = hour(a_k) = k. The output at s_k is compared with the latent of s_{k+1}. Equal texts are encoded once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from mmjepa.batch import Batch, Layout, SequenceView, View
from mmjepa.cohort import Cohort
from mmjepa.ehr.hourly import HourlyForm
from mmjepa.ehr.stays import HOUR_US, Stay, StaysConfig, derive_stays, iterate
from mmjepa.ehr.text import NO_ACTION, HourlyTextConfig
from mmjepa.ehr.tokenizer import SentenceTokenizer
from mmjepa.ehr.windows import windows
from mmjepa.keyed import generator
from mmjepa.masking import draw_rollout_start
from mmjepa.progress import track
from mmjepa.refusal import Refusal

KINDS = ("state", "action", "static")
STATE, ACTION, STATIC = range(3)
CHUNK = 256
ActionPolicy = Literal["recorded", "hold", "none"]


@dataclass(frozen=True, kw_only=True)
class TrajectoryViews:
    """window, stride: hours. min_hours: shortest window used. max_tokens: longest text; what is cut is counted. names:
    a csv (code, name, unit) that says in words what a code means, read when the text form is fitted. vocabulary: size of a
    tokenizer trained here."""

    kind: Literal["trajectory"] = "trajectory"
    window: int = 72
    stride: int = 12
    min_hours: int = 8
    max_tokens: int = 4096
    vocabulary: int = 2000
    names: Path | None = None
    stays: StaysConfig = field(default_factory=StaysConfig)
    text: HourlyTextConfig = field(default_factory=HourlyTextConfig)

    def __post_init__(self) -> None:
        if self.window < 2 or self.min_hours < 2 or self.stride < 1 or self.max_tokens < 8:
            raise ValueError("window and min_hours are at least 2 hours, stride 1, max_tokens 8")


@dataclass(frozen=True)
class Written:
    """A stay as ids into the corpus. states, actions: int64 [hours]."""

    stay: Stay
    states: np.ndarray
    actions: np.ndarray
    static: int


class Corpus:
    """Distinct texts, tokenised once (their sentences too). ids count from 0 in the order of first use."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = SentenceTokenizer(tokenizer), max_tokens
        self.ids: dict[str, int] = {}
        self.texts: list[str] = []
        self.tokens = np.empty(0, dtype=np.int32)
        self.offsets = np.zeros(1, dtype=np.int64)
        self.cut = 0

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, texts: Sequence[str]) -> np.ndarray:
        """The id of each text; new texts are listed, and tokenised by the next ``tokenise``."""
        for text in texts:
            if text not in self.ids:
                self.ids[text] = len(self.texts)
                self.texts.append(text)
        return np.array([self.ids[text] for text in texts], dtype=np.int64)

    def tokenise(self) -> None:
        """Tokenise what is new. A text longer than ``max_tokens`` loses its end and is counted."""
        whole = self.tokenizer(self.texts[len(self.offsets) - 1 :])
        self.cut += sum(len(ids) > self.max_tokens for ids in whole)
        kept = [ids[: self.max_tokens] for ids in whole]
        self.tokens = np.concatenate([self.tokens, *kept])
        lengths = [len(ids) for ids in kept]
        self.offsets = np.concatenate([self.offsets, self.offsets[-1] + np.cumsum(lengths, dtype=np.int64)])

    def view(self, ids: np.ndarray) -> SequenceView:
        """The sequences of some ids, one row each."""
        lengths = self.offsets[ids + 1] - self.offsets[ids]
        ends = np.cumsum(lengths)
        places = np.arange(ends[-1]) - np.repeat(ends - lengths - self.offsets[ids], lengths)
        return SequenceView(
            "ehr",
            tokens=torch.from_numpy(self.tokens[places].astype(np.int64)),
            offsets=torch.from_numpy(np.concatenate([[0], ends])),
            ids=torch.from_numpy(ids),
        )


class TrajectorySampler:
    """Items are the windows of the ICU stays of some splits."""

    def __init__(
        self,
        cohort: Cohort,
        config: TrajectoryViews,
        form: HourlyForm,
        tokenizer: Any,
        *,
        seed: int,
        splits: Sequence[str] | None = ("train",),
    ) -> None:
        self.config, self.seed, self.tokenizer = config, seed, tokenizer
        self.fingerprint = cohort.fingerprint
        self.vocabulary = len(tokenizer)
        self.corpus_of = Corpus(tokenizer, config.max_tokens)
        stays, texts, counts = write_texts(cohort, config, form, splits)
        self.written = [
            Written(
                stay,
                self.corpus_of.add(text.state),
                self.corpus_of.add(text.action),
                int(self.corpus_of.add([text.static])[0]),
            )
            for stay, text in zip(stays, texts, strict=True)
        ]
        self.corpus_of.tokenise()
        self.items = [
            (index, start, stop)
            for index, written in enumerate(self.written)
            for start, stop in windows(written.stay.hours, config.window, config.stride)
            if stop - start >= config.min_hours
        ]
        if not self.items:
            raise Refusal(
                "COHORT_NO_STAYS",
                f"no ICU stay of {cohort.path} gives a window of {config.min_hours} h",
                "views.stays says which codes mark a stay and which are observations; mmjepa audit lists what a cohort holds",
            )
        self.report = {
            **counts,
            "windows": len(self.items),
            "texts": len(self.corpus_of),
            "texts_cut": self.corpus_of.cut,
        }

    def __len__(self) -> int:
        return len(self.items)

    def corpus(self, encoder: str) -> Iterator[SequenceView] | None:
        """All texts in chunks, by id."""
        return (
            self.corpus_of.view(ids)
            for ids in np.array_split(np.arange(len(self.corpus_of)), max(1, len(self.corpus_of) // CHUNK))
        )

    def batch(self, items: Sequence[tuple[int, int]]) -> Batch:
        """The batch of (epoch, window index) pairs."""
        chosen, starts = [], []
        for epoch, index in items:
            stay, start, stop = self.items[index]
            written = self.written[stay]
            chosen.append((written.static, written.states[start:stop], written.actions[start:stop]))
            rng = generator(self.seed, "rollout", epoch, written.stay.subject_id, written.stay.stay, start)
            starts.append(draw_rollout_start(stop - start, rng))
        views, layout = self.lay_out(chosen)
        layout.start = torch.tensor([2 * k + 1 if k >= 0 else -1 for k in starts], dtype=torch.int64)
        subjects = [self.written[self.items[index][0]].stay.subject_id for _, index in items]
        return Batch(views, None, layout, torch.tensor(subjects, dtype=torch.int64))

    def lay_out(self, windows_of: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> tuple[list[View], Layout]:
        """Views and layout of windows given as (static id, state ids [T], action ids [T])."""
        flat = np.concatenate([np.concatenate([[static], states, actions]) for static, states, actions in windows_of])
        ids, inverse = np.unique(flat, return_inverse=True)
        longest = max(len(states) for _, states, _ in windows_of)
        layout = Layout.empty(len(windows_of), 2 * longest + 1)
        done = 0
        for row, (_, states, _) in enumerate(windows_of):
            t = len(states)
            rows = torch.from_numpy(inverse[done : done + 2 * t + 1])
            done += 2 * t + 1
            state, action, hours = torch.arange(1, 2 * t, 2), torch.arange(2, 2 * t + 1, 2), torch.arange(1, t + 1)
            layout.kind[row, 0], layout.source[row, 0] = STATIC, rows[0]
            layout.kind[row, state], layout.kind[row, action] = STATE, ACTION
            layout.source[row, state], layout.source[row, action] = rows[1 : t + 1], rows[t + 1 :]
            layout.hour[row, state], layout.hour[row, action] = hours, hours
            layout.target[row, state[:-1]] = rows[2 : t + 1]
            layout.feeds[row, state[:-1]] = state[1:]
        layout.position = torch.arange(2 * longest + 1).expand(len(windows_of), -1).clone()
        layout.time = layout.hour / 24.0
        return [self.corpus_of.view(ids)], layout

    @property
    def embedding_chunks(self) -> int:
        """How many chunks ``embedding_batches`` yields."""
        return -(-sum(w.stay.hours for w in self.written) // CHUNK)

    def embedding_batches(self, size: int = CHUNK) -> Iterator[tuple[pd.DataFrame, list[View], np.ndarray]]:
        """Every hour of every stay, known at the end of the hour: keys (subject_id, prediction_time), the state text's
        view, and which rows exist (all)."""
        keys = [
            (w.stay.subject_id, w.stay.icu_in_us + (h + 1) * HOUR_US, w.states[h])
            for w in self.written
            for h in range(w.stay.hours)
        ]
        for first in range(0, len(keys), size):
            chunk = keys[first : first + size]
            frame = pd.DataFrame(
                {
                    "subject_id": [subject for subject, _, _ in chunk],
                    "prediction_time": pd.to_datetime([time for _, time, _ in chunk], unit="us").as_unit("us"),
                }
            )
            view = self.corpus_of.view(np.array([state for _, _, state in chunk], dtype=np.int64))
            yield frame, [view], np.ones(len(chunk), dtype=bool)

    def rollout_stays(self, start: int, hours: int, policy: ActionPolicy) -> list[tuple[Written, np.ndarray]]:
        """Stays that last beyond hour ``start`` (0-based, the last known hour), cut to ``hours``, with their action ids
        under a policy for the hours after ``start``: recorded, the last known one held, or none."""
        chosen = []
        for w in self.written:
            if w.stay.hours <= start + 1:
                continue
            length = min(hours, w.stay.hours)
            actions = w.actions[:length].copy()
            if policy != "recorded":
                body = NO_ACTION if policy == "none" else self.corpus_of.texts[actions[start]].split(" | ", 1)[1]
                actions[start + 1 :] = self.corpus_of.add([f"t={h}h | {body}" for h in range(start + 1, length)])
            chosen.append((w, actions))
        self.corpus_of.tokenise()
        return chosen


def write_texts(
    cohort: Cohort, config: TrajectoryViews, form: HourlyForm, splits: Sequence[str] | None
) -> tuple[list[Stay], list[Any], dict[str, int]]:
    """Stays of some splits, their hourly texts, and the counts of what was left out."""
    store = cohort.events()
    frame, counts = derive_stays(store, config.stays)
    if splits is not None and store.splits:
        wanted = np.concatenate([store.splits.get(split, np.empty(0, dtype=np.int64)) for split in splits])
        frame = frame[frame["subject_id"].isin(wanted)]
    writer, stays = form.writer(store), list(iterate(frame))
    return stays, [writer(stay) for stay in track(stays, "write hourly texts")], {**counts, "stays": len(stays)}
