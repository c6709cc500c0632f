"""The CT+EHR recipe goes on with the experiment that is there, and with no other."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

from mmjepa.config import build
from mmjepa.refusal import Refusal

RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain_ct_ehr.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("recipe_ct_ehr", RECIPE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_resume_goes_on_with_the_same_experiment_alone(recipe, tmp_path):
    values = {"out": tmp_path / "x", "inside": {"synthetic": {"patients": 24}}, "pretrain": {"seed": 1}}
    first = build(recipe.Experiment, values)
    recipe.enter(first)
    recipe.enter(dataclasses.replace(first, resume=True, draws=50, task="malignancy"))
    saved = (tmp_path / "x" / "experiment.yaml").read_text()
    for other in ({"inside": {"synthetic": {"patients": 50}}}, {"pretrain": {"seed": 2}}, {"outside": {}}):
        with pytest.raises(Refusal) as refused:
            recipe.enter(build(recipe.Experiment, {**values, **other, "resume": True}))
        assert refused.value.code == "CHECKPOINT_CONFIG"
        assert (tmp_path / "x" / "experiment.yaml").read_text() == saved


def test_a_folder_of_something_else_is_never_entered(recipe, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    for resume in (False, True):
        with pytest.raises(Refusal) as refused:
            recipe.enter(build(recipe.Experiment, {"out": tmp_path, "inside": {}, "resume": resume}))
        assert refused.value.code == "OUTPUT_EXISTS"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("wrong", [{"draws": 0}, {"workers": 0}, {"labelled": 0}])
def test_numbers_below_one_are_refused_before_anything_is_made(recipe, tmp_path, wrong):
    with pytest.raises(Refusal) as refused:
        build(recipe.Experiment, {"out": tmp_path / "x", "inside": {}, **wrong})
    assert refused.value.code == "CONFIG_VALUE"
