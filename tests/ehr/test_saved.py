"""What the fitted forms share."""

import numpy as np
import pytest

from mmjepa.ehr.daily import DailyConfig, DailyForm
from mmjepa.ehr.encounters import EncounterForm, EncountersConfig
from mmjepa.ehr.hourly import HourlyForm
from mmjepa.ehr.text import HourlyTextConfig
from mmjepa.ehr.tokens import JointTokens, TokensConfig

MANY = tuple(f"LAB//{i}" for i in range(5000))
NAMES = {code: (code.lower(), "mg") for code in MANY}
NUMBERS = np.arange(5000.0)
FORMS = [
    HourlyForm(HourlyTextConfig(), NAMES, "abc"),
    DailyForm(DailyConfig(), NAMES, "abc"),
    EncounterForm(EncountersConfig(), MANY, {"encounters": 7}, dict.fromkeys(MANY, "x"), "abc"),
    JointTokens(TokensConfig(), MANY, *[NUMBERS] * 4, fitted_on="abc", edges=np.zeros((5000, 9))),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
def test_a_form_prints_its_settings_and_not_what_was_fitted(form):
    said = repr(form)
    assert f"{type(form).__name__}(config=" in said
    assert "fitted_on='abc'" in said
    assert len(said) < 2000
    assert "LAB//7" not in said
