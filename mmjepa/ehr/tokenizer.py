"""A byte-level BPE tokenizer trained on a cohort's own texts, in the form that Hugging Face loads.

Byte level: every text has tokens and none is unknown. Digits are split one by one, as Qwen's tokenizer does, so that
91 and 92 share a piece.

Hourly texts repeat a few hundred thousand sentences, so ``SentenceTokenizer`` keeps the ids of each sentence that it has seen.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mmjepa.files import atomic_path, fresh_folder
from mmjepa.refusal import Refusal

PAD, EOS = "<|pad|>", "<|endoftext|>"
# Qwen2's split: contractions, words with their leading space, single digits, punctuation, line breaks, other blanks.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMALLEST = 2 + 256  # the two special tokens and the bytes
_MOST_SENTENCES = 1_000_000  # about 300 MB
_FEW = 1024


def train_tokenizer(texts: Iterable[str], folder: Path | str, vocab_size: int) -> int:
    """Train on ``texts`` and save in ``folder``; ``transformers.AutoTokenizer.from_pretrained(folder)`` loads it.

    The pad token has id 0, the end-of-text token id 1. The same texts in any order give the same files. Returns the
    vocabulary's true size, which short texts can keep below ``vocab_size``.
    Raises Refusal: TOKENIZER_EMPTY, TOKENIZER_SIZE, OUTPUT_EXISTS.
    """
    if vocab_size < SMALLEST:
        raise Refusal(
            "TOKENIZER_SIZE", f"a vocabulary of {vocab_size} cannot hold all bytes", f"Take at least {SMALLEST}"
        )
    target = fresh_folder(folder, "tokenizer")
    ordered = sorted(texts)
    if not any(ordered):
        raise Refusal("TOKENIZER_EMPTY", f"there is no text to train {folder} on", "Check the cohort and its splits")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(ordered, trainer)
    if target.is_dir():  # empty, as fresh_folder has checked
        target.rmdir()
    with atomic_path(target) as temporary:
        temporary.mkdir()
        tokenizer.save(str(temporary / "tokenizer.json"))
        facts = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 32768,
        }
        (temporary / "tokenizer_config.json").write_text(json.dumps(facts, indent=2) + "\n")
    return tokenizer.get_vocab_size()


class SentenceTokenizer:
    """Token ids of texts, the same as the tokenizer's own, with each distinct sentence tokenised once.

    A sentence ends in ". " (the first one also in "| ") and the next begins at the blank. In the split that Qwen2 and Qwen3
    use no piece reaches over a full stop or bar with a blank behind it, and no piece looks at what is before it or, past a
    full stop, behind it; NFC joins nothing to a blank; merges act inside pieces. So the ids of a text are those of its
    sentences, one behind the other. With any other tokenizer whole texts are tokenised.
    """

    def __init__(self, tokenizer: Any) -> None:
        """tokenizer: one of transformers'."""
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = None if backend is None or not _splits_at_sentences(backend) else _plain(backend)
        self._ids: dict[str, bytes] = {}

    @property
    def by_sentence(self) -> bool:
        """Whether sentences are tokenised, and not whole texts."""
        return self._backend is not None

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text, without special tokens."""
        if self._backend is None:
            parts = [texts[first : first + _FEW] for first in range(0, len(texts), _FEW)]
            found = (self._tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
            return [np.array(ids, np.int32) for part in found for ids in part]
        cut = [_sentences(text) for text in texts]
        distinct = {sentence for sentences in cut for sentence in sentences}
        if len(self._ids) + len(distinct) > _MOST_SENTENCES:
            self._ids = {}
        new = [sentence for sentence in distinct if sentence not in self._ids]
        found = self._backend.encode_batch_fast(new, add_special_tokens=False)
        self._ids.update(
            (sentence, np.array(one.ids, np.int32).tobytes()) for sentence, one in zip(new, found, strict=True)
        )
        ids = self._ids
        return [np.frombuffer(b"".join([ids[sentence] for sentence in sentences]), np.int32) for sentences in cut]


def _plain(backend: Tokenizer) -> Tokenizer:
    """A copy that neither cuts nor pads, whatever the tokenizer was last asked for."""
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _sentences(text: str) -> list[str]:
    """``t=7h | A: 1. B.`` -> ``t=7h |``, `` A: 1.``, `` B.``; joined again they are the text."""
    head, bar, rest = text.partition("| ")
    first, *others = (bar[1:] + rest if bar else text).split(". ")
    if others:
        others = [f" {one}." for one in others[:-1]] + [f" {others[-1]}"]
        first += "."
    return [head + "|", first, *others] if bar else [first, *others]


def _splits_at_sentences(backend: Tokenizer) -> bool:
    """Whether this is a byte-level BPE with Qwen2's split, nothing but NFC before it and no added token that takes blanks."""
    parts = json.loads(backend.to_str())
    steps = (parts["pre_tokenizer"] or {}).get("pretokenizers", [])
    if len(steps) != 2 or parts["normalizer"] not in (None, {"type": "NFC"}):
        return False
    takes_blanks = [
        token["lstrip"]
        or token["rstrip"]
        or token["single_word"]
        or ". " in token["content"]
        or "| " in token["content"]
        for token in parts["added_tokens"]
    ]
    return (
        steps[0] == {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False}
        and (steps[1]["type"], steps[1]["add_prefix_space"], steps[1]["use_regex"]) == ("ByteLevel", False, False)
        and parts["model"]["type"] == "BPE"
        and not parts["model"]["dropout"]
        and not any(takes_blanks)
    )
