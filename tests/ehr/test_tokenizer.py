"""The trained tokenizer loads as any Hugging Face tokenizer, loses nothing, and does not depend on the order of texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mmjepa.ehr.tokenizer import SMALLEST, train_tokenizer
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
