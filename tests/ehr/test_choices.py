"""A setting with a fixed list of choices takes no other, however the config is made."""

from dataclasses import replace

import pytest

from mmjepa.config import build
from mmjepa.ehr.batches import BatchesConfig
from mmjepa.ehr.encounters import EncountersConfig
from mmjepa.ehr.tokens import TokensConfig
from mmjepa.refusal import Refusal


@pytest.mark.parametrize(
    ("config", "name"),
    [
        *((BatchesConfig(), name) for name in ("window", "static", "time", "pad")),
        (TokensConfig(), "values"),
        (EncountersConfig(), "drugs_when"),
    ],
)
def test_a_word_that_is_no_choice_is_refused_and_the_choices_are_named(config, name):
    with pytest.raises(ValueError, match=f"{name} is 'middle', want one of '.*'"):
        replace(config, **{name: "middle"})
    with pytest.raises(Refusal, match="CONFIG_VALUE"):
        build(type(config), {name: "middle"})
