"""A byte-level BPE tokenizer trained on a cohort's own texts, in the form that Hugging Face loads.

Byte level: every text has tokens and none is unknown. Digits are split one by one, as Qwen's tokenizer does, so that
91 and 92 share a piece.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mmjepa.files import atomic_path, fresh_folder
from mmjepa.refusal import Refusal

PAD, EOS = "<|pad|>", "<|endoftext|>"
# Qwen2's split: contractions, words with their leading space, single digits, punctuation, line breaks, other blanks.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMALLEST = 2 + 256  # the two special tokens and the bytes


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
