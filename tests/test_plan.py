"""A plan counts what the real modules hold, before anything is downloaded or trained."""

import dataclasses
from pathlib import Path

import pytest

from mmjepa.config import build, load_yaml
from mmjepa.encoders.qwen3 import make_base
from mmjepa.plan import build_on_meta, plan, plan_file
from mmjepa.pretrain import RunConfig
from mmjepa.refusal import Refusal

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"
PAPER = CONFIGS / "clin_jepa_qwen3_8b.yaml"


def counted(*overrides):
    return plan_file(PAPER, list(overrides))


@pytest.fixture(scope="module")
def paper():
    return counted()


def test_the_published_scale_has_the_published_counts(paper):
    parts = {name: entry["parameters"] for name, entry in paper["parameters"].items()}
    assert parts == {"ehr.base": 8_190_735_360, "ehr.adapter": 15_335_424, "predictor": 92_514_304}
    assert paper["total_parameters"] == sum(parts.values())
    assert paper["teacher_parameters"] == 15_335_424
    assert [phase["steps"] for phase in paper["phases"]] == [1500, 4000, 1500, 0, 3000]
    assert paper["memory"]["weights"] > 2 * 8_190_735_360


def test_counts_follow_depth_and_rank(paper):
    deeper = counted("model.predictor.depth=7")
    assert deeper["parameters"]["predictor"]["parameters"] - 92_514_304 == 12_596_224
    wider = counted("model.ehr.adapter.rank=32")
    assert wider["parameters"]["ehr.adapter"]["parameters"] == 2 * 15_335_424
    for other in (deeper, wider):
        assert other["memory"]["total_bytes"] > paper["memory"]["total_bytes"]
        assert sum(p["total_flops"] for p in other["phases"]) > sum(p["total_flops"] for p in paper["phases"])


def test_a_phase_that_trains_the_encoder_costs_more_than_one_that_keeps_its_latents(paper):
    warm_up, joint, alignment, sync, _ = (phase["flops_per_step"] for phase in paper["phases"])
    assert warm_up["ehr"] == 0
    assert joint["ehr"] > 2 * alignment["ehr"] > 0
    assert sync["ehr"] == sync["predictor"] == 0


def test_a_plan_counts_the_modules_that_a_run_would_build(ct_ehr_cohort, tmp_path):
    small = {
        "ct": {"patch": 8, "width": 12, "depth": 1, "heads": 2, "ffn": 16, "latent": 8},
        "ehr": {"latent": 8, "values": True, "architecture": {"vocab_size": 40, "hidden_size": 12}},
        "predictor": {
            "latent": 8,
            "width": 12,
            "heads": 2,
            "kinds": ["ct", "ehr", "ct_patch"],
            "queries": True,
            "position": "continuous",
        },
    }
    phases = [{"name": "p", "steps": 2, "train": ["ct", "predictor"]}]
    values = {"data": ".", "out": ".", "views": {"kind": "ct_ehr"}, "model": small, "curriculum": phases}
    config = build(RunConfig, values)
    made = plan(config)
    model = build_on_meta(config)
    assert made["total_parameters"] == sum(p.numel() for p in model.parameters())
    assert set(made["parameters"]) == {"ct", "ehr.base", "ehr.front", "predictor"}
    assert all(p.device.type == "meta" for p in model.parameters())


def test_unknown_parts_and_missing_architectures_are_refused(tmp_path):
    with pytest.raises(Refusal) as unknown:
        counted("curriculum=[{name: p, steps: 1, train: [ehr.adaptor]}]")
    assert unknown.value.code == "CONFIG_UNKNOWN_PART"
    assert "'ehr.adapter'" in unknown.value.hint
    with pytest.raises(Refusal) as missing:
        plan_file(CONFIGS / "ct_ehr_small.yaml", [f"model.ehr.path={tmp_path / 'none'}"])
    assert missing.value.code == "ENCODER_MISSING"


def test_a_path_is_planned_by_what_lies_there_and_not_by_the_small_model(tmp_path):
    small = CONFIGS / "ct_ehr_small.yaml"
    made = plan_file(small, [])
    make_base({"hidden_size": 48, "num_hidden_layers": 5}, 300).config.save_pretrained(tmp_path)
    there = plan_file(small, [f"model.ehr.path={tmp_path}"])
    assert (made["language_model"], there["language_model"]) == ("model.ehr.architecture", str(tmp_path))
    base = make_base({"hidden_size": 48, "num_hidden_layers": 5}, 300)
    assert there["parameters"]["ehr.base"]["parameters"] == sum(p.numel() for p in base.parameters())
    assert there["parameters"]["ehr.base"] != made["parameters"]["ehr.base"]


def test_every_config_of_the_recipes_can_be_planned():
    known = {field.name for field in dataclasses.fields(RunConfig)}
    runs = [path for path in sorted(CONFIGS.glob("*.yaml")) if load_yaml(path).keys() <= known]
    assert PAPER in runs
    for path in runs:
        assert plan_file(path, [])["total_parameters"] > 0, path.name


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("model.predictor.positions=100", "positions"),
        ("model.predictor.kinds=[action, state, static]", "kinds"),
        ("model.predictor.latent=64", "latent"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused_before_anything_runs(override, word):
    with pytest.raises(Refusal) as refused:
        counted(override)
    assert refused.value.code == "CONFIG_VALUE"
    assert word in refused.value.message


def test_queries_are_needed_exactly_where_cells_are_hidden():
    for override in ("model.predictor.queries=false", "model.predictor.position=learned"):
        with pytest.raises(Refusal) as refused:
            plan_file(CONFIGS / "ct_ehr_small.yaml", [override])
        assert override.split("=")[0] in refused.value.message
