"""Statistics and vocabularies fitted on more than the training split are told from those that are not."""

import json

import numpy as np
import pandas as pd
import pytest

from mmjepa.audit.fitted import fitted_statistics, fitted_vocabulary

PEOPLE = 40
SPLITS = {"train": list(range(20)), "tuning": list(range(20, 30)), "held_out": list(range(30, 40))}


@pytest.fixture(scope="module")
def store(events_of, store_of):
    draw = np.random.default_rng(0)
    rows = [(s, h, f"LAB//{h % 8}", float(draw.normal(5))) for s in range(PEOPLE) for h in range(12)]
    rows += [(s, 50.0, "RARE//ABROAD") for s in range(20, PEOPLE)]
    return store_of(events_of(rows, PEOPLE), SPLITS)


def codes_file(folder, store, splits: tuple[str, ...]):
    """codes.parquet with statistics over some splits, by pandas."""
    owner = np.repeat(store.subjects, np.diff(store.offsets))
    mine = np.isin(owner, np.concatenate([store.splits[name] for name in splits]))
    table = pd.DataFrame({"code": np.array(store.vocabulary)[store.codes[mine]], "value": store.values[mine]})
    found = table.groupby("code")["value"].agg(values_n="count", values_mean="mean", values_std="std", largest="max")
    found.reset_index().assign(description="x").to_parquet(folder / "codes.parquet")
    return folder / "codes.parquet"


@pytest.mark.parametrize(
    ("splits", "verdict"),
    [
        (("train",), "pass"),
        (("train", "tuning", "held_out"), "fail"),
        (("train", "tuning"), "fail"),
        (("held_out",), "fail"),
    ],
)
def test_statistics_of_other_splits_fail_and_those_of_the_training_split_do_not(tmp_path, store, splits, verdict):
    found = fitted_statistics(store, codes_file(tmp_path, store, splits))
    assert found.verdict == verdict, found.sentence
    if verdict == "fail":
        assert " + ".join(splits) in found.sentence
        assert found.count >= 3


def test_a_list_of_codes_without_numbers_or_a_cohort_without_splits_says_that_it_cannot_be_checked(tmp_path, store):
    path = tmp_path / "codes.parquet"
    pd.DataFrame({"code": store.vocabulary, "description": "x"}).to_parquet(path)
    assert fitted_statistics(store, path).verdict == "not-applicable"
    store = type(store)(**vars(store) | {"splits": {}})
    assert fitted_statistics(store, path).verdict == "not-applicable"


@pytest.mark.parametrize(
    ("codes", "fitted_on", "verdict"),
    [
        (["LAB//0", "LAB//1"], "f", "pass"),
        (["LAB//0", "RARE//ABROAD"], "f", "fail"),
        (["LAB//0", "RARE//ABROAD"], "another", "not-applicable"),
    ],
)
def test_a_vocabulary_with_codes_that_training_subjects_lack_fails(tmp_path, store, codes, fitted_on, verdict):
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps({"codes": codes, "fitted_on": fitted_on, "config": {"min_count": 5}}))
    assert fitted_vocabulary(store, path).verdict == verdict
