"""The forms of some hours side by side: the rows of these hours, no id, no date, nothing from later."""

import json

import pandas as pd
import pytest

from mmjepa import cli
from mmjepa.ehr import show
from mmjepa.ehr.show import print_forms, show_forms
from mmjepa.refusal import Refusal


def test_raw_rows_and_all_forms_of_the_hours_are_shown(icu_cohort, capsys):
    found = show_forms(icu_cohort, 3, hours=(2, 5))
    rows = [(2.2, "INFUSION_START//NOREPI"), (2.5, "LAB//HR//bpm"), (3.5, "LAB//HR//bpm"), (3.7, "LAB//MAP//mmHg")]
    assert [(row[0], row[2]) for row in found["rows"]] == [*rows, (4.5, "LAB//HR//bpm"), (4.5, "INFUSION_END//NOREPI")]
    assert [text.split(" |")[0] for text in found["hourly"]["state"]] == ["t=2h", "t=3h", "t=4h"]
    assert len(found["hourly"]["action"]) == 3
    assert "LAB//HR (bpm): " in found["daily"]
    assert [row[1] for row in found["tokens"]][-6:] == [row[2] for row in found["rows"]]
    assert found["encounters"] == []
    json.dumps(found, allow_nan=False)
    print_forms(found)
    said = capsys.readouterr().out
    assert said.count("== ") == 7
    assert "1970" not in said


def test_the_verb_prints_them_and_gives_one_json_object_when_asked(icu_cohort, capsys):
    assert cli.main(["forms", str(icu_cohort), "--subject", "3", "--hours", "1:4"]) == 0
    said = capsys.readouterr()
    assert (said.out.count("== "), said.err.count("== ")) == (7, 0)
    assert cli.main(["forms", str(icu_cohort), "--subject", "3", "--hours", "1:4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hours"] == [1, 4]
    assert cli.main(["forms", str(icu_cohort), "--subject", "3", "--hours", "1-4"]) == 2


def test_a_stay_or_hours_that_are_not_there_are_refused(icu_cohort):
    with pytest.raises(Refusal, match=r"STAY_UNKNOWN.*kept: 0; left out: none"):
        show_forms(icu_cohort, 3, stay=1)
    with pytest.raises(Refusal, match="STAY_UNKNOWN"):
        show_forms(icu_cohort, stay=1)
    with pytest.raises(Refusal, match="HOURS_OUTSIDE"):
        show_forms(icu_cohort, 3, hours=(2, 500))
    with pytest.raises(Refusal, match="SUBJECT_UNKNOWN"):
        show_forms(icu_cohort, 99)


def test_without_a_subject_the_first_who_has_such_a_stay_is_shown(icu_cohort):
    assert show_forms(icu_cohort) == show_forms(icu_cohort, 2)  # the stay of subject 1 is too short


def test_the_stay_of_a_subject_is_that_of_the_whole_cohort_and_only_that_subject_is_looked_at(icu_cohort, monkeypatch):
    whole = {one.subject_id: one for one in show.iterate(show.derive_stays(show.Cohort.open(icu_cohort).events())[0])}
    looked_at = []
    derive = show.derive_stays
    monkeypatch.setattr(show, "derive_stays", lambda store: looked_at.append(len(store.subjects)) or derive(store))
    store = show.Cohort.open(icu_cohort).events()
    assert {subject: show._stay(store, subject, 0) for subject in whole} == whole
    assert set(looked_at) == {1}


def test_a_cohort_without_hospital_stays_shows_the_other_forms(icu_cohort, tmp_path):
    for path in icu_cohort.rglob("*.parquet"):
        table = pd.read_parquet(path)
        if "data" in path.parts:
            table = table[~table["code"].str.startswith("HOSPITAL_")]
        (tmp_path / path.relative_to(icu_cohort)).parent.mkdir(exist_ok=True)
        table.to_parquet(tmp_path / path.relative_to(icu_cohort), index=False)
    found = show_forms(tmp_path, 3, hours=(2, 5))
    assert found["encounters"] == []
    assert found["hourly"]["state"]
