"""Hourly texts of the MIMIC-IV demo to token ids: events a second of CPU time, and how often a text is repeated.

From an open store: the stays found, every stay's texts written, equal texts made one, all tokenised with nothing remembered
from before. An event is a row of the source that lies in a stay of the cohort and that its texts show, counted once however
many hours repeat it; exact duplicates, ends of infusions and what began before the stay are not counted. The tokenizer is a
byte-level BPE with Qwen2's split, trained before on the same texts. ``same_ids``: as each whole text alone gives.
``texts``: of windows of 72 hours every 12, how many a model would encode (one static, a state and an action an hour) and how
many there are once equal ones are one.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ehr_parts.common import Options, cpu_s, in_turns, line
from mmjepa.ehr.stays import Stay, derive_stays, iterate
from mmjepa.ehr.store import EventStore
from mmjepa.ehr.text import HourlyTextConfig, TextWriter
from mmjepa.ehr.tokenizer import train_tokenizer
from mmjepa.ehr.windows import windows
from mmjepa.sample.trajectory import Corpus

GOAL, SIZE, MOST = 100_000, 2_000, 4_096
BATCH = 32  # windows, as published


def run(options: Options) -> Iterator[dict[str, Any]]:
    if options.mimic is None:
        yield line("text", None, GOAL, why="the MIMIC-IV demo is not there; name it with --mimic")
        return
    from transformers import AutoTokenizer

    store = EventStore.build(options.mimic, options.scratch / "text_store")
    texts = _texts(store, options)
    train_tokenizer(
        {text for one in texts for text in (*one.state, *one.action, one.static)}, options.scratch / "qwen", SIZE
    )
    tokenizer = AutoTokenizer.from_pretrained(options.scratch / "qwen")
    corpora: list[Corpus] = []
    written: list[list[tuple[int, np.ndarray, np.ndarray]]] = []

    def once() -> None:
        corpus = Corpus(tokenizer, MOST)
        ids = [
            (int(corpus.add([one.static])[0]), corpus.add(one.state), corpus.add(one.action))
            for one in _texts(store, options)
        ]
        corpus.tokenise()
        corpora.append(corpus)
        written.append(ids)

    (spent,) = in_turns(1 if options.small else 5, lambda: cpu_s(once))
    corpus, stays = corpora[-1], _stays(store, options)
    events = sum(_events(store, stay) for stay in stays)
    yield line(
        "text",
        events / spent,
        GOAL,
        unit="events a CPU second",
        events=events,
        cpu_s=spent,
        stays=len(stays),
        tokens=len(corpus.tokens),
        cut=corpus.cut,
        same_ids=_same(corpus, tokenizer),
    )
    yield line("texts", **_repeats(corpus, written[-1]))


def _stays(store: EventStore, options: Options) -> list[Stay]:
    return list(iterate(derive_stays(store)[0]))[: 5 if options.small else None]


def _texts(store: EventStore, options: Options) -> list[Any]:
    writer = TextWriter(store)
    return [writer(stay) for stay in _stays(store, options)]


def _events(store: EventStore, stay: Stay) -> int:
    """Distinct (time, code, value) of a stay among the codes that texts show."""
    config, row = HourlyTextConfig(), store.row(stay.subject_id)
    ends = [end for _, end in config.continuous]
    shown = store.match(config.state + config.action) & ~store.match((*config.exclude, *ends))
    span = slice(int(store.offsets[row]), int(store.offsets[row + 1]))
    code, value = np.asarray(store.codes[span]), np.asarray(store.values[span]).view(np.int32)
    clock = np.maximum(store.times_us[span], store.available_us[span])
    inside = (clock >= stay.icu_in_us) & (clock < stay.end_us) & shown[code]
    return len(np.unique(np.stack([clock, code, value])[:, inside], axis=1).T)


def _same(corpus: Corpus, tokenizer: Any) -> bool:
    alone = tokenizer(corpus.texts, add_special_tokens=False)["input_ids"]
    ids = np.split(corpus.tokens, corpus.offsets[1:-1])
    return all(np.array_equal(one[:MOST], mine) for one, mine in zip(alone, ids, strict=True))


def _repeats(corpus: Corpus, written: list[tuple[int, np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Slots of all windows against distinct texts: of all, and of the mean random batch of windows."""
    items = [
        np.concatenate([[static], states[start:stop], actions[start:stop]])
        for static, states, actions in written
        for start, stop in windows(len(states))
    ]
    lengths = np.diff(corpus.offsets)
    order = np.random.default_rng(0).permutation(len(items))
    batches = [np.concatenate([items[i] for i in some]) for some in np.array_split(order, max(1, len(items) // BATCH))]
    every = np.concatenate(items)
    return {
        "windows": len(items),
        "slots": len(every),
        "distinct": len(np.unique(every)),
        "texts_saved": 1 - len(np.unique(every)) / len(every),
        "tokens_saved": 1 - float(lengths[np.unique(every)].sum() / lengths[every].sum()),
        "texts_saved_in_a_batch_of_32": 1 - float(np.mean([len(np.unique(some)) / len(some) for some in batches])),
        "tokens_saved_in_a_batch_of_32": 1
        - float(np.mean([lengths[np.unique(some)].sum() / lengths[some].sum() for some in batches])),
    }
