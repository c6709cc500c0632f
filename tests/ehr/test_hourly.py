"""The hourly form is fitted on training subjects, says what it said when it was fitted, and is refused when changed."""

import json

import pytest

from mmjepa.config import build, to_plain
from mmjepa.ehr.hourly import HourlyForm
from mmjepa.ehr.stays import HOUR_US, NEVER, Stay
from mmjepa.ehr.store import EventStore
from mmjepa.ehr.text import HourlyTextConfig, TextWriter
from mmjepa.refusal import Refusal

CODES = {
    "LAB//1//mg": "Sodium",
    "LAB//2//mg": "",
    "INFUSION_START//9": "",
    "INFUSION_END//9": "",
    "LAB//3//mg": "Other",
}


def store_of(tmp_path, descriptions):
    import pandas as pd

    rows = [(1, 0.5, "LAB//1//mg", 1.0), (1, 0.6, "LAB//2//mg", 2.0), (1, 0.7, "INFUSION_START//9", 3.0)]
    rows += [(1, 1.7, "INFUSION_END//9", 4.0), (2, 0.5, "LAB//3//mg", 5.0)]
    frame = pd.DataFrame(rows, columns=["subject_id", "time", "code", "numeric_value"])
    frame["time"] = pd.to_datetime(frame["time"] * 3600, unit="s").astype("datetime64[us]")
    for part in ("data", "metadata"):
        (tmp_path / part).mkdir(parents=True)
    frame.astype({"numeric_value": "float32"}).to_parquet(tmp_path / "data" / "0.parquet", index=False)
    codes = pd.DataFrame({"code": list(CODES), "description": [descriptions.get(code) or None for code in CODES]})
    codes.astype("string").to_parquet(tmp_path / "metadata" / "codes.parquet")
    return EventStore.in_memory(tmp_path)


def stay(subject):
    return Stay(subject, 0, 0, 2 * HOUR_US, NEVER, NEVER, NEVER, 2 * HOUR_US, 60.0, 2.0, 2)


def test_a_form_writes_what_the_writer_of_its_own_store_writes(tmp_path):
    store = store_of(tmp_path, CODES)
    form = HourlyForm.fit(store, [1])
    assert form.writer(store)(stay(1)) == TextWriter(store)(stay(1))
    assert form.writer(store)(stay(1)).state[0] == "t=0h | Sodium: 1 mg. 2: 2 mg."
    assert form.writer(store)(stay(1)).action == ["t=0h | 9: 3.", "t=1h | 9: 3."]


def test_another_stores_descriptions_change_no_training_code(tmp_path):
    form = HourlyForm.fit(store_of(tmp_path / "a", CODES), [1])
    other = store_of(tmp_path / "b", dict.fromkeys(CODES, "Changed"))
    assert form.writer(other)(stay(1)).state[0] == "t=0h | Sodium: 1 mg. 2: 2 mg."
    assert form.writer(other)(stay(2)).state[0] == "t=0h | Changed: 5 mg."


def test_only_training_subjects_codes_and_a_persons_names_are_kept(tmp_path):
    form = HourlyForm.fit(store_of(tmp_path, CODES), [1], names={"LAB//2//mg": ("Potassium", "mmol/l")})
    assert "LAB//3//mg" not in form.names
    assert form.names["LAB//2//mg"] == ("Potassium", "mmol/l")


def test_saved_forms_load_unchanged_and_changed_ones_are_refused(tmp_path):
    store = store_of(tmp_path / "a", CODES)
    form = HourlyForm.fit(store, [1], HourlyTextConfig(max_readings=3, charlson="admission"))
    form.save(tmp_path / "form.json")
    loaded = HourlyForm.load(tmp_path / "form.json", expected=form.hash)
    assert (loaded.config, loaded.names, loaded.fitted_on) == (form.config, form.names, form.fitted_on)
    with pytest.raises(Refusal, match="FORM_HASH"):
        HourlyForm.load(tmp_path / "form.json", expected=HourlyForm.fit(store, [1]).hash)
    content = json.loads((tmp_path / "form.json").read_text())
    (tmp_path / "form.json").write_text(json.dumps(content | {"names": {}}))
    with pytest.raises(Refusal, match="FORM_HASH"):
        HourlyForm.load(tmp_path / "form.json")


def test_the_settings_survive_being_plain():
    config = HourlyTextConfig(state=("LAB",), max_readings=2)
    assert build(HourlyTextConfig, to_plain(config)) == config
