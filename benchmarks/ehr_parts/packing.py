"""Packed batches against padded ones in the same training step: useful tokens a CPU second on the texts of the MIMIC-IV demo.

A small Qwen3 on the CPU, one thread: forward to the state of each text's last token, backward, AdamW. All three see the same
texts: runs of 32 from the demo's texts in order of length, evenly spread, as length-bucketed batches; the same ones shuffled
into random batches, padded, and packed as the encoder packs. Padded batches need no mask: what is behind a text's end is not
seen by it. They take turns. ``tokens_a_text`` beside ``tokens_a_text_of_all``: how like all texts those taken are.
``largest_difference``: of packed latents from one-by-one ones, over the first random batch.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ehr_parts.common import Options, cpu_s, in_turns, line
from mmjepa.batch import SequenceView
from mmjepa.ehr.stays import derive_stays, iterate
from mmjepa.ehr.store import EventStore
from mmjepa.ehr.text import TextWriter
from mmjepa.ehr.tokenizer import train_tokenizer
from mmjepa.encoders.qwen3 import Qwen3Config, Qwen3Encoder, make_base
from mmjepa.sample.trajectory import Corpus

PADDED_GOAL, BUCKETED_GOAL, BATCH, BATCHES = 2.0, 0.95, 32, 8
VOCABULARY, MOST = 2_000, 4_096


def run(options: Options) -> Iterator[dict[str, Any]]:
    if options.mimic is None:
        yield line("packing", None, PADDED_GOAL, why="the MIMIC-IV demo is not there; name it with --mimic")
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    corpus = _corpus(options)
    lengths = np.diff(corpus.offsets)
    order = np.argsort(lengths, kind="stable")
    batches, size = (2, 4) if options.small else (BATCHES, BATCH)
    first = ((np.arange(batches) + 0.5) / batches * (len(order) - size)).astype(int)
    bucketed = [order[start : start + size] for start in first]
    mixed = np.array_split(np.random.default_rng(0).permutation(np.concatenate(bucketed)), batches)
    encoder = Qwen3Encoder(Qwen3Config(), make_base({}, VOCABULARY))
    optimiser = torch.optim.AdamW(encoder.parameters(), 1e-5)

    def epoch(some: list[np.ndarray], encode: Any) -> float:
        def steps() -> None:
            for ids in some:
                encode(encoder, corpus.view(ids)).square().mean().backward()
                optimiser.step()
                optimiser.zero_grad()

        return cpu_s(steps)

    works = ((mixed, Qwen3Encoder.__call__), (mixed, _padded), (bucketed, _padded))
    packed, padded, sorted_ = in_turns(
        1 if options.small else 2, *(lambda some=some, encode=encode: epoch(some, encode) for some, encode in works)
    )
    tokens = int(lengths[np.concatenate(mixed)].sum())
    yield line(
        "packing",
        padded / packed,
        PADDED_GOAL,
        against_bucketed=sorted_ / packed,
        at_least_against_bucketed=BUCKETED_GOAL,
        met_against_bucketed=bool(sorted_ / packed >= BUCKETED_GOAL),
        packed_tokens_per_s=tokens / packed,
        padded_tokens_per_s=tokens / padded,
        bucketed_tokens_per_s=tokens / sorted_,
        texts=batches * size,
        tokens=tokens,
        tokens_a_text=tokens / (batches * size),
        tokens_a_text_of_all=float(lengths.mean()),
        longest=int(max(lengths[ids].max() for ids in mixed)),
        largest_difference=_difference(encoder, corpus, mixed[0]),
    )


def _corpus(options: Options) -> Corpus:
    """Every distinct text of the demo's stays, tokenised."""
    from transformers import AutoTokenizer

    assert options.mimic is not None
    store = EventStore.build(options.mimic, options.scratch / "packing_store")
    writer, stays = TextWriter(store), list(iterate(derive_stays(store)[0]))[: 3 if options.small else None]
    texts = [text for one in map(writer, stays) for text in (*one.state, *one.action, one.static)]
    train_tokenizer(set(texts), options.scratch / "packing_tokenizer", VOCABULARY)
    corpus = Corpus(AutoTokenizer.from_pretrained(options.scratch / "packing_tokenizer"), MOST)
    corpus.add(texts)
    corpus.tokenise()
    return corpus


def _padded(encoder: Qwen3Encoder, view: SequenceView) -> torch.Tensor:
    lengths = view.offsets.diff()
    inside = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.zeros(inside.shape, dtype=torch.int64)
    tokens[inside] = view.tokens
    states = encoder.causal_lm.model(input_ids=tokens, use_cache=False).last_hidden_state
    return states[torch.arange(len(lengths)), lengths - 1]


@torch.no_grad()
def _difference(encoder: Qwen3Encoder, corpus: Corpus, ids: np.ndarray) -> float:
    alone = torch.cat([encoder(corpus.view(ids[i : i + 1])) for i in range(len(ids))])
    return float((encoder(corpus.view(ids)) - alone).abs().max())
