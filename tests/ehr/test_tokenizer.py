"""The trained tokenizer loads as any Hugging Face tokenizer, loses nothing, and does not depend on the order of texts."""

import json
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mmjepa.ehr import tokenizer as module
from mmjepa.ehr.tokenizer import SMALLEST, SentenceTokenizer, train_tokenizer
from mmjepa.refusal import Refusal

TEXTS = [
    f"t={hour}h | Heart rate: {hour + 60} bpm. MAP: {90 - hour} mmHg. Température: 37.{hour} °C." for hour in range(20)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "trained"
    assert SMALLEST < train_tokenizer(TEXTS, folder, 400) <= 400
    return folder


def test_it_loads_with_pad_and_eos(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    ids = tokenizer(TEXTS[:2], padding=True)["input_ids"]
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == TEXTS[0]
    assert ids == [tokenizer.backend_tokenizer.encode(text).ids for text in TEXTS[:2]]


def test_known_words_are_one_token_and_digits_are_split(folder):
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(" Heart rate: 91 bpm").tokens
    assert tokens == ["ĠHeart", "Ġrate", ":", "Ġ", "9", "1", "Ġbpm"]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_survives(folder, text):
    import unicodedata

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == unicodedata.normalize("NFC", text)


def test_the_order_of_texts_does_not_matter(folder, tmp_path):
    train_tokenizer(reversed(TEXTS), tmp_path / "again", 400)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_bad_requests_are_refused(folder, tmp_path):
    for code, arguments in {
        "TOKENIZER_SIZE": (TEXTS, tmp_path / "a", 100),
        "TOKENIZER_EMPTY": (["", ""], tmp_path / "a", 400),
        "OUTPUT_EXISTS": (TEXTS, folder, 400),
    }.items():
        with pytest.raises(Refusal, match=code):
            train_tokenizer(*arguments)
    assert not (tmp_path / "a").exists()


def loaded(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


PIECES = [". ", "| ", ".", " ", "|", ": ", "\n", "\r\n", "\t", "\u00a0", "\u0301", "'s", "91", "<|pad|>", "(", "ab"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tokenizer that has merged all that its split lets it merge, so that a wrong cut shows in the ids."""
    folder = tmp_path_factory.mktemp("merged") / "trained"
    train_tokenizer(map("".join, product(PIECES, repeat=3)), folder, 1500)
    tokenizer = loaded(folder)
    return tokenizer, SentenceTokenizer(tokenizer)


pieces = st.one_of(st.sampled_from(PIECES), st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=3))


@settings(max_examples=200, deadline=None)
@example(["A.  B", "A. \u0301b", "A. \n B", "A.. ", "| ", "", ". . | . ", "A.b. c.(d", "x 's. 's"])
@given(st.lists(st.lists(pieces, max_size=12).map("".join), max_size=6))
def test_any_text_tokenised_by_sentences_is_what_it_is_as_a_whole(pair, texts):
    whole, by_sentence = pair
    assert by_sentence.by_sentence
    for text, ids in zip(texts, by_sentence(texts), strict=True):
        assert ids.tolist() == whole(text, add_special_tokens=False)["input_ids"]


def test_each_distinct_sentence_is_tokenised_once(pair):
    tokenizer = SentenceTokenizer(pair[0])
    tokenizer([f"t={hour}h | Heart rate: 91 bpm. MAP: {hour % 2} mmHg." for hour in range(10)])
    assert len(tokenizer._ids) == 10 + 1 + 2


def test_what_is_kept_has_a_limit_and_stays_exact(pair, monkeypatch):
    monkeypatch.setattr(module, "_MOST_SENTENCES", 5)
    tokenizer = SentenceTokenizer(pair[0])
    for first in range(0, 20, 4):
        found = tokenizer(TEXTS[first : first + 4])
        assert [ids.tolist() for ids in found] == pair[0](TEXTS[first : first + 4])["input_ids"]


def test_padding_and_cutting_asked_of_the_tokenizer_before_change_nothing(folder):
    tokenizer = loaded(folder)
    tokenizer(TEXTS[:3], padding=True, truncation=True, max_length=4)
    found = SentenceTokenizer(tokenizer)(TEXTS)
    assert [ids.tolist() for ids in found] == loaded(folder)(TEXTS)["input_ids"]


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\S+\.? \S+|\s+"}),
        lambda parts: parts["pre_tokenizer"]["pretokenizers"].pop(0),
        lambda parts: parts.update(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}),
        lambda parts: parts["added_tokens"][1].update(rstrip=True, content="mmHg."),
    ],
)
def test_any_other_tokenizer_reads_whole_texts(folder, tmp_path, change):
    parts = json.loads((folder / "tokenizer.json").read_text())
    change(parts)
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    (tmp_path / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
    tokenizer = loaded(tmp_path)
    found = SentenceTokenizer(tokenizer)
    assert not found.by_sentence
    ids = found(TEXTS)
    assert [one.tolist() for one in ids] == tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    assert {one.dtype for one in ids} == {np.dtype(np.int32)}
