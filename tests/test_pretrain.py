"""Pretraining as one call leaves a run that says what it did, and can be entered again."""

import dataclasses
import json
import shutil
from unittest.mock import Mock

import pyarrow.parquet as pq
import pytest
import torch

import mmjepa.pretrain
from mmjepa.cohort import Cohort
from mmjepa.config import build, load_yaml
from mmjepa.curriculum import Phase
from mmjepa.embed import embed
from mmjepa.engine.checkpoint import load_latest
from mmjepa.engine.log import read_metrics
from mmjepa.engine.loop import Engine
from mmjepa.pretrain import RunConfig, audited, check_parts, open_cohort, pretrain, read_config
from mmjepa.refusal import Refusal
from mmjepa.run import Run


def config_of(run, **changes):
    return dataclasses.replace(build(RunConfig, load_yaml(run / "config.yaml")), **changes)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_leaves_what_it_was_made_of(icu_run, icu_cohort):
    facts = json.loads((icu_run / "run.json").read_text())
    assert facts["data_fingerprint"] == Cohort.open(icu_cohort).fingerprint
    assert facts["sampling"]["windows"] > 0
    assert [row["step"] for row in read_metrics(icu_run / "metrics.jsonl")] == list(range(1, 8))
    phases = json.loads((icu_run / "phases.json").read_text())
    assert [(p["phase"], p["steps"]) for p in phases] == [("tuning", 2), ("warm-up", 2), ("joint", 3)]
    assert {p.name for p in (icu_run / "model").iterdir()} >= {"config.json", "model.safetensors", "ehr", "ehr_adapter"}


def test_a_run_is_stamped_with_the_audit_of_its_data_and_a_strict_one_refuses_data_that_fail(
    icu_run, tmp_path, monkeypatch
):
    facts = json.loads((icu_run / "run.json").read_text())
    assert facts["audit"] == {"verdict": "pass", "failed": []}
    assert json.loads((icu_run / "audit.json").read_text())["findings"]
    bad = {"verdict": "fail", "findings": [{"check": "8", "name": "events after death", "verdict": "fail"}]}
    monkeypatch.setattr(mmjepa.pretrain, "audit", lambda data: bad)
    with pytest.raises(Refusal, match=r"AUDIT_FAILED.*8 events after death"):
        pretrain(config_of(icu_run, out=tmp_path / "strict", strict=True))
    assert not (tmp_path / "strict").exists()
    pretrain(config_of(icu_run, out=tmp_path / "lenient"))
    facts = json.loads((tmp_path / "lenient" / "run.json").read_text())
    assert facts["audit"] == {"verdict": "fail", "failed": ["8 events after death"]}


def test_a_resume_audits_again_only_when_records_or_labels_changed(icu_run, icu_cohort, tmp_path, monkeypatch):
    cohort, run = tmp_path / "cohort", tmp_path / "run"
    shutil.copytree(icu_cohort, cohort)
    shutil.copytree(icu_run, run)
    looked = Mock(return_value={"verdict": "pass", "findings": []})
    monkeypatch.setattr(mmjepa.pretrain, "audit", looked)
    config = config_of(icu_run, out=run, data=cohort)

    def audits() -> int:
        before = looked.call_count
        audited(config, Cohort.open(cohort), Run(run))
        return looked.call_count - before

    assert audits() == 0
    (cohort / "labels" / "task").mkdir(parents=True)
    for content in ("one", "two"):
        (cohort / "labels" / "task" / "0.parquet").write_text(content)
        assert (audits(), audits()) == (1, 0)
    (cohort / "labels" / "task" / "0.parquet").rename(cohort / "labels" / "task" / "1.parquet")
    assert (audits(), audits()) == (1, 0)
    shard = next((Cohort.open(cohort).meds_root / "data").rglob("*.parquet"))
    pq.write_table(pq.read_table(shard).slice(1), shard)
    assert (audits(), audits()) == (1, 0)
    (run / "audit.json").write_text('{"verdict": "pass", "findings": []}')
    assert (audits(), audits()) == (1, 0)


def test_the_saved_config_is_complete_and_gives_the_same_run(icu_run, tmp_path):
    pretrain(config_of(icu_run, out=tmp_path / "again"))
    ours, theirs = load_latest(icu_run / "checkpoints"), load_latest(tmp_path / "again" / "checkpoints")
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(value, theirs.tensors[name]) for name, value in ours.tensors.items())
    other = config_of(icu_run, out=tmp_path / "seed", seed=1)
    pretrain(other)
    changed = load_latest(tmp_path / "seed" / "checkpoints")
    assert not torch.equal(
        ours.tensors["model/predictor.output.weight"], changed.tensors["model/predictor.output.weight"]
    )


def test_resuming_a_finished_run_changes_no_byte(icu_run, tmp_path):
    shutil.copytree(icu_run, tmp_path / "run")
    before = contents(tmp_path / "run")
    summary = pretrain(config_of(icu_run, out=tmp_path / "run", resume=True))
    assert contents(tmp_path / "run") == before
    assert summary["steps"] == 7
    assert [p["phase"] for p in summary["phases"]] == ["tuning", "warm-up", "joint"]


def test_a_run_killed_midway_ends_as_if_it_had_not_been(icu_run, tmp_path, monkeypatch):
    original = Engine._step

    def step(self, *arguments):
        if self.done == 5:
            raise SystemExit
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_step", step)
        with pytest.raises(SystemExit):
            pretrain(config_of(icu_run, out=tmp_path / "run"))
    pretrain(config_of(icu_run, out=tmp_path / "run", resume=True))
    assert contents(tmp_path / "run" / "model") == contents(icu_run / "model")


def test_changed_data_and_existing_outputs_are_refused(icu_run, icu_cohort, tmp_path, monkeypatch):
    with pytest.raises(Refusal) as exists:
        pretrain(config_of(icu_run))
    assert exists.value.code == "OUTPUT_EXISTS"
    shutil.copytree(icu_run, tmp_path / "run")
    opened = mmjepa.pretrain.run_sampler

    def other_data(*arguments, **named):
        sampler = opened(*arguments, **named)
        sampler.fingerprint = "other"
        return sampler

    monkeypatch.setattr(mmjepa.pretrain, "run_sampler", other_data)
    with pytest.raises(Refusal) as data:
        pretrain(config_of(icu_run, out=tmp_path / "run", resume=True))
    assert data.value.code == "CHECKPOINT_DATA"


def test_a_cohort_of_images_alone_is_refused_with_what_it_lacks(ct_ehr_run, ct_ehr_cohort, tmp_path):
    shutil.copytree(ct_ehr_cohort / "ct", tmp_path / "cohort" / "ct")
    starts = {
        "pretraining": lambda: pretrain(config_of(ct_ehr_run, data=tmp_path / "cohort", out=tmp_path / "run")),
        "embedding": lambda: embed(ct_ehr_run, tmp_path / "cohort", tmp_path / "z.parquet"),
    }
    for what, start in starts.items():
        with pytest.raises(Refusal) as refused:
            start()
        assert refused.value.code == "COHORT_NO_RECORDS"
        assert f"this cohort has images only; {what} needs records" in refused.value.message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cohort"]
    with pytest.raises(Refusal) as empty:
        open_cohort(tmp_path, "pretraining")
    assert empty.value.code == "COHORT_EMPTY"


def test_a_run_says_what_part_of_the_volumes_it_reads(ct_ehr_run, ct_ehr_cohort, tmp_path, capsys):
    sampling = json.loads((ct_ehr_run / "run.json").read_text())["sampling"]
    assert sampling["crop_mm"] == [16, 16, 16]
    assert sampling["crop_covers"] == 0.125
    assert sampling["kernels"] == {"not told": sampling["subjects"]}
    found = embed(ct_ehr_run, ct_ehr_cohort, tmp_path / "z.parquet")
    assert found["crop_covers"] == 0.125
    assert "a CT crop is 16 x 16 x 16 mm, 12.5 % of the median volume" in capsys.readouterr().err


def test_an_unknown_part_names_the_nearest_and_leaves_no_checkpoint(icu_run, tmp_path):
    parts = ["ehr.base", "ehr.adapter", "predictor"]
    with pytest.raises(Refusal) as refused:
        check_parts([Phase(name="p", steps=1, train=("predicter",))], parts)
    assert refused.value.code == "CONFIG_UNKNOWN_PART"
    assert "'predictor'" in refused.value.hint
    check_parts([Phase(name="p", steps=1, train=tuple(parts))], parts)


def test_configs_without_phases_or_items_are_refused(icu_run, tmp_path):
    for override, word in (("curriculum=[]", "no phase"), ("batch=0", "batch=0"), ("views.window=1", "window")):
        with pytest.raises(Refusal) as refused:
            read_config(icu_run / "config.yaml", [override])
        assert refused.value.code == "CONFIG_VALUE"
        assert word in refused.value.message


def test_a_refusal_or_ctrl_c_before_the_first_step_leaves_the_name_free(icu_run, tmp_path, monkeypatch):
    config = config_of(icu_run, out=tmp_path / "run")
    wrong = dataclasses.replace(config, curriculum=(Phase(name="p", steps=1, train=("predicter",)),))
    for refused in (dataclasses.replace(config, data=tmp_path / "none"), wrong):
        with pytest.raises(Refusal):
            pretrain(refused)
        assert not (tmp_path / "run").exists()
    with monkeypatch.context() as patch:
        patch.setattr(mmjepa.pretrain, "fresh_model", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    assert not (tmp_path / "run").exists()
    shutil.copytree(icu_run, tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(Refusal):
        pretrain(dataclasses.replace(config, data=tmp_path / "none"))
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("engine.threads=0", "threads"),
        ("engine.device=tpu", "device"),
        ("optim.lr.default=-1", "lr"),
        ("optim.lr.default=.nan", "lr"),
        ("optim.warmup=5", "warmup"),
        ("optim.clip=0", "clip"),
        ("model.ehr.adapter.rank=0", "rank"),
        ("model.ehr.latent=0", "latent"),
        ("model.predictor.dropout=2", "dropout"),
        ("model.predictor.depth=0", "depth"),
        ("model.predictor.heads=0", "heads"),
        ("model.ct={heads: 0}", "heads"),
        ("model.ct={patch: 0}", "patch"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_read(icu_run, override, word):
    with pytest.raises(Refusal) as refused:
        read_config(icu_run / "config.yaml", [override])
    assert refused.value.code == "CONFIG_VALUE"
    assert word in refused.value.message


def test_a_device_that_is_not_there_is_refused(icu_run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = config_of(icu_run, out=tmp_path / "run")
    with pytest.raises(Refusal) as refused:
        pretrain(dataclasses.replace(config, engine=dataclasses.replace(config.engine, device="cuda")))
    assert refused.value.code == "DEVICE_MISSING"
    assert not (tmp_path / "run").exists()


def test_a_rate_of_an_unknown_part_is_refused_with_the_nearest():
    from mmjepa.engine.optim import OptimConfig
    from mmjepa.pretrain import check_rates

    parts = ["ct", "ehr.base", "predictor"]
    check_rates(OptimConfig(lr={"default": 1.0, "ct": 1.0, "ehr.adapter": 1.0}), parts)
    with pytest.raises(Refusal) as refused:
        check_rates(OptimConfig(lr={"default": 1.0, "predictr": 1.0}), parts)
    assert refused.value.code == "CONFIG_UNKNOWN_PART"
    assert "'predictor'" in refused.value.hint


@pytest.mark.parametrize("values", [{"predict": 0}, {"predict": -1}, {"next_token": -0.1}])
def test_a_phase_with_nothing_to_minimise_or_a_negative_weight_is_refused(values):
    from mmjepa.config import build
    from mmjepa.jepa import LossConfig

    with pytest.raises(Refusal):
        build(LossConfig, values)


@pytest.mark.parametrize(
    ("values", "train", "loss", "fits"),
    [
        (False, ["ehr.base"], {"predict": 0, "next_token": 1}, True),
        (False, ["predictor"], {"predict": 0, "next_token": 1}, False),
        (False, ["predictor"], {"predict": 1, "next_token": 1}, True),
        (True, ["ehr.base"], {"predict": 0, "next_token": 1}, False),
        (True, ["ehr.base"], {"predict": 1}, True),
    ],
)
def test_next_tokens_need_a_text_encoder_that_learns(values, train, loss, fits):
    from mmjepa.encoders.qwen3 import Qwen3Config
    from mmjepa.jepa import ModelConfig
    from mmjepa.pretrain import check_losses

    phases = [build(Phase, {"name": "p", "steps": 1, "train": train, "loss": loss})]
    model = ModelConfig(ehr=Qwen3Config(values=values, latent=96))
    if fits:
        check_losses(phases, model)
    else:
        with pytest.raises(Refusal, match="next_token"):
            check_losses(phases, model)


def test_an_adapter_on_layers_that_do_not_exist_is_refused():
    from mmjepa.encoders.qwen3 import LoRAConfig, Qwen3Config, Qwen3Encoder, make_base

    with pytest.raises(Refusal) as refused:
        Qwen3Encoder(Qwen3Config(adapter=LoRAConfig(modules=("nope",))), make_base({}, 40))
    assert refused.value.code == "ENCODER_ADAPTER"
