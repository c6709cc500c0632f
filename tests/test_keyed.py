import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmjepa.keyed import generator, key_words, torch_seed

text = st.text(st.characters(codec="utf-8"), max_size=5)
parts = st.one_of(st.integers(), st.text(st.characters(codec="utf-8", exclude_characters="\x1f"), max_size=5))


@given(st.integers(0, 2**31), text, st.lists(parts, max_size=4))
def test_the_same_key_gives_the_same_draws_whatever_was_drawn_before(seed, stream, key):
    first = generator(seed, stream, *key).random(4)
    generator(seed, "another", *key).random(9)
    assert np.array_equal(first, generator(seed, stream, *key).random(4))


def test_every_part_of_the_key_counts():
    keys = [(0, "a", 1, 2), (1, "a", 1, 2), (0, "b", 1, 2), (0, "a", 2, 1), (0, "a", 12), (0, "a", 1, 2, 0)]
    assert len({generator(*key).random() for key in keys}) == len(keys)
    assert len({torch_seed(*key) for key in keys}) == len(keys)


def test_the_draws_do_not_change_between_releases():
    assert key_words("run", 7) == [3660237449, 1475391586, 750606544, 1283666801]


@given(st.integers(), text)
def test_a_torch_seed_fits_its_63_bits(seed, stream):
    assert 0 <= torch_seed(seed, stream) < 2**63
