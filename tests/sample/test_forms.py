"""What texts and tokens are made of is fitted on training subjects once, stays with the model, and no other is taken for it."""

import json
import shutil

import pandas as pd
import pytest

from mmjepa.cohort import Cohort
from mmjepa.ehr.hourly import HourlyForm
from mmjepa.refusal import Refusal
from mmjepa.sample import CtEhrViews, TrajectoryViews, check_fitted, open_sampler

HOURS = TrajectoryViews(window=6, stride=3, min_hours=4, vocabulary=300)
CELLS = CtEhrViews(crop=(16, 16, 16))


def opened(views, cohort, folder, splits=("train",)):
    return open_sampler(views, Cohort.open(cohort), folder, patch=8, language_model=None, seed=0, splits=splits)


def changed(cohort, target, *, of=(1, 2, 3, 4, 5, 6), description="Heart rate"):
    """The cohort with another heart rate code in some subjects, and a description of the others'."""
    shutil.copytree(cohort, target)
    data, codes = target / "data" / "0.parquet", target / "metadata" / "codes.parquet"
    frame = pd.read_parquet(data)
    frame.loc[frame["subject_id"].isin(of) & (frame["code"] == "LAB//HR//bpm"), "code"] = "LAB//PULSE//bpm"
    frame.to_parquet(data, index=False)
    known = pd.DataFrame({"code": frame["code"].unique()})
    known["description"] = known["code"].map({"LAB//HR//bpm": description, "LAB//PULSE//bpm": description})
    known.astype("string").to_parquet(codes)
    return target


@pytest.fixture(scope="module")
def folder(icu_cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    opened(HOURS, icu_cohort, folder)
    return folder


def test_codes_of_the_training_split_alone_are_fitted(icu_cohort, tmp_path):
    opened(HOURS, changed(icu_cohort, tmp_path / "cohort", of=(7, 8)), tmp_path / "fitted")
    form = HourlyForm.load(tmp_path / "fitted" / "text.json")
    assert form.names["LAB//HR//bpm"] == ("Heart rate", "bpm")
    assert "LAB//PULSE//bpm" not in form.names


def test_another_cohort_is_written_in_the_words_of_the_first(icu_cohort, folder, tmp_path):
    other = changed(icu_cohort, tmp_path / "cohort", of=())
    texts = opened(HOURS, other, folder, splits=("held_out",)).corpus_of.texts
    assert sum("HR: " in text for text in texts) > 5
    assert not any("Heart rate" in text for text in texts)
    assert texts == opened(HOURS, icu_cohort, folder, splits=("held_out",)).corpus_of.texts


def test_a_persons_names_are_read_once(icu_cohort, tmp_path):
    names = tmp_path / "names.csv"
    names.write_text("code,name,unit\nLAB//HR//bpm,Pulse,per min\n")
    views = TrajectoryViews(window=6, stride=3, min_hours=4, vocabulary=300, names=names)
    first = opened(views, icu_cohort, tmp_path / "fitted").corpus_of.texts
    names.unlink()
    assert opened(views, icu_cohort, tmp_path / "fitted").corpus_of.texts == first
    assert sum("Pulse: " in text for text in first) > 5


def test_the_form_of_another_cohort_or_a_changed_one_is_refused(icu_cohort, folder, tmp_path):
    opened(HOURS, changed(icu_cohort, tmp_path / "cohort"), tmp_path / "other")
    mixed = shutil.copytree(folder, tmp_path / "mixed")
    for name in ("another", "changed"):
        if name == "another":
            shutil.copy(tmp_path / "other" / "text.json", mixed)
        else:
            form = json.loads((folder / "text.json").read_text())
            (mixed / "text.json").write_text(json.dumps(form | {"names": {}}))
        with pytest.raises(Refusal) as refused:
            opened(HOURS, icu_cohort, mixed)
        assert refused.value.code == "FORM_HASH", name


def test_tokens_of_other_settings_are_refused_too(ct_ehr_cohort, tmp_path):
    opened(CELLS, ct_ehr_cohort, tmp_path / "one")
    tokens = CELLS.tokens.__class__(min_count=9)
    opened(CtEhrViews(crop=(16, 16, 16), tokens=tokens), ct_ehr_cohort, tmp_path / "two")
    shutil.copy(tmp_path / "two" / "tokens.json", tmp_path / "one")
    with pytest.raises(Refusal) as refused:
        opened(CELLS, ct_ehr_cohort, tmp_path / "one")
    assert refused.value.code == "FORM_HASH"


def test_a_fit_that_was_cut_short_is_made_again(icu_cohort, folder, tmp_path):
    cut = shutil.copytree(folder, tmp_path / "cut")
    (cut / "form.json").unlink()
    (cut / "text.json").write_text("{}")
    opened(HOURS, icu_cohort, cut)
    assert (cut / "text.json").read_bytes() == (folder / "text.json").read_bytes()
    assert (cut / "form.json").read_bytes() == (folder / "form.json").read_bytes()


@pytest.mark.parametrize("gone", ["text.json", "form.json", "tokenizer"])
def test_a_trained_model_lacks_nothing_that_was_fitted(folder, tmp_path, gone):
    copy = shutil.copytree(folder, tmp_path / "copy")
    check_fitted(HOURS, copy, None)
    (copy / gone).rename(tmp_path / "aside")
    with pytest.raises(Refusal) as refused:
        check_fitted(HOURS, copy, None)
    assert refused.value.code == "MODEL_BROKEN"
    if gone == "tokenizer":
        check_fitted(HOURS, copy, "a language model's own")
