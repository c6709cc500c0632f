"""Embedding tables and rollouts of a run are what its model says, row by row."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from mmjepa.cohort import Cohort
from mmjepa.embed import TrainedRun, embed, rollout_table
from mmjepa.evaluate.tables import read_embeddings
from mmjepa.model import load_model
from mmjepa.pretrain import run_sampler
from mmjepa.refusal import Refusal


@pytest.fixture(scope="module")
def tables(ct_ehr_run, ct_ehr_cohort, icu_run, icu_cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    runs = {"ct_ehr": (ct_ehr_run, ct_ehr_cohort), "icu": (icu_run, icu_cohort)}
    return {
        name: (*places, folder / f"{name}.parquet", embed(*places, folder / f"{name}.parquet"))
        for name, places in runs.items()
    }


@torch.no_grad()
@pytest.mark.parametrize("name", ["ct_ehr", "icu"])
@pytest.mark.parametrize("size", [1, 3])
def test_rows_do_not_depend_on_their_company(name, size, tables):
    run, cohort, path, summary = tables[name]
    table, opened = read_embeddings(path), TrainedRun(run)
    sampler = run_sampler(opened.config, Cohort.open(cohort), opened.run, splits=None)
    rows = []
    for _, views, present in sampler.embedding_batches(size=size):
        parts = []
        for view in views:
            latents, spread = opened.model.encode([view]), torch.zeros(len(present), 8 if name == "ct_ehr" else 16)
            spread[torch.from_numpy(present) if len(latents) < len(present) else slice(None)] = latents
            parts.append(spread)
        if name == "ct_ehr" and len(parts) == 1:
            parts.append(torch.zeros_like(parts[0]))
        rows.append(torch.cat(parts, dim=1))
    order = np.lexsort((table.prediction_time, table.subject_id))
    keys = pd.concat([frame for frame, _, _ in sampler.embedding_batches()], ignore_index=True)
    again = np.lexsort((keys["prediction_time"], keys["subject_id"]))
    np.testing.assert_allclose(torch.cat(rows).numpy()[again], table.z[order], atol=1e-5)
    assert summary["rows"] == len(table.z)


def test_a_table_says_which_subjects_times_and_splits_its_rows_are_of(tables):
    _, cohort, path, summary = tables["ct_ehr"]
    table, events = read_embeddings(path), Cohort.open(cohort).events()
    index = pd.read_parquet(cohort / "ct" / "index.parquet")
    assert sorted(table.subject_id) == sorted(index["subject_id"])
    for subject, split in zip(table.subject_id, table.split, strict=True):
        assert subject in events.splits[split]
    assert summary["width"] == table.z.shape[1] == 16
    assert summary["without_record"] == int((np.abs(table.z[:, 8:]).sum(axis=1) == 0).sum())


def test_the_untrained_embedding_is_that_of_a_fresh_model_of_the_same_seed(ct_ehr_run, ct_ehr_cohort, tables, tmp_path):
    from mmjepa.keyed import torch_seed
    from mmjepa.model import build_model

    embed(ct_ehr_run, ct_ehr_cohort, tmp_path / "t.parquet", untrained=True)
    untrained, trained = read_embeddings(tmp_path / "t.parquet"), read_embeddings(tables["ct_ehr"][2])
    opened = TrainedRun(ct_ehr_run)
    torch.manual_seed(torch_seed(opened.config.seed, "weights"))
    vocabulary = opened.model.encoders["ehr"].causal_lm.config.vocab_size
    fresh = build_model(opened.config.model, tmp_path / "elsewhere", vocabulary).eval()
    sampler = run_sampler(opened.config, Cohort.open(ct_ehr_cohort), opened.run, splits=None)
    with torch.no_grad():
        _, views, _ = next(sampler.embedding_batches())
        expected = fresh.encode([views[0]]).numpy()
    np.testing.assert_allclose(untrained.z[:, :8], expected, atol=1e-6)
    assert np.abs(untrained.z - trained.z).max() > 1e-4
    assert untrained.facts["model"] == "untrained"
    assert trained.facts["model"] != "untrained"


def test_tables_of_other_adapters_have_other_fingerprints(icu_run, icu_cohort, tmp_path):
    """The latents come from the language model and its adapter, so the fingerprint must cover them."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(icu_run, tmp_path / "run")
    cohort = Cohort.open(icu_cohort)
    before = TrainedRun(tmp_path / "run").facts(cohort)["model"]
    assert before == TrainedRun(icu_run).facts(cohort)["model"]
    path = tmp_path / "run" / "model" / "ehr_adapter" / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    assert TrainedRun(tmp_path / "run").facts(cohort)["model"] != before


def test_existing_tables_and_unfinished_runs_are_refused(icu_run, icu_cohort, tables, tmp_path):
    def code(call):
        with pytest.raises(Refusal) as refused:
            call()
        return refused.value.code

    assert code(lambda: embed(icu_run, icu_cohort, tables["icu"][2])) == "OUTPUT_EXISTS"
    assert code(lambda: embed(tmp_path, icu_cohort, tmp_path / "t")) == "RUN_MISSING"
    assert code(lambda: load_model(tmp_path)) == "MODEL_MISSING"
    assert code(lambda: rollout_table(icu_run, icu_cohort, draws=0)) == "ROLLOUT_DRAWS"


def test_a_rollout_judges_the_model_under_every_policy(icu_run, icu_cohort, tmp_path):
    result = rollout_table(icu_run, icu_cohort, tmp_path / "r.csv", from_hour=4, horizon=8, draws=20)
    assert set(result["summary"]) == {"recorded", "hold", "none"}
    table = pd.read_csv(tmp_path / "r.csv")
    assert set(table["actions"]) == {"recorded", "hold", "none"}
    assert len(table) == len(result["table"]) > 0
    again = rollout_table(icu_run, icu_cohort, from_hour=4, horizon=8, draws=20)
    assert again["table"] == result["table"]


@torch.no_grad()
def test_what_happens_after_the_last_known_hour_moves_no_rollout_without_recorded_actions(icu_run, icu_cohort):
    """The predictions of ``hold`` and ``none`` are functions of the first hours: give another future, get the same."""
    import mmjepa.embed as module

    opened = TrainedRun(icu_run)
    sampler = run_sampler(opened.config, Cohort.open(icu_cohort), opened.run, splits=None)
    seen = []

    def catch(truth, predictions, *arguments, **named):
        seen.append(predictions)

    original, module.rollout_metrics = module.rollout_metrics, catch
    try:
        for policy in ("none", "hold", "recorded"):
            for scrambled in (False, True):
                kept = [w.states.copy() for w in sampler.written]
                actions = [w.actions.copy() for w in sampler.written]
                if scrambled:
                    for w in sampler.written:
                        w.states[4:] = w.states[4:][::-1].copy()
                        w.actions[4:] = w.actions[4:][::-1].copy()
                latents = module._latents(opened.model, sampler)
                module._roll(opened.model, sampler, latents, np.zeros((10, 16)), 3, 10, policy, 2)
                for w, states, acts in zip(sampler.written, kept, actions, strict=True):
                    w.states[:], w.actions[:] = states, acts
    finally:
        module.rollout_metrics = original
    for plain, scrambled, same in ((*seen[:2], True), (*seen[2:4], True), (*seen[4:], False)):
        assert np.allclose(plain, scrambled, atol=1e-5, equal_nan=True) == same


def test_what_was_fitted_in_training_is_never_fitted_anew(icu_run, icu_cohort, ct_ehr_run, ct_ehr_cohort, tmp_path):
    for run, cohort, fitted in ((ct_ehr_run, ct_ehr_cohort, "tokens.json"), (icu_run, icu_cohort, "tokenizer")):
        copy = tmp_path / run.name / fitted
        shutil.copytree(run, copy)
        kept = copy / "model" / fitted
        if kept.is_dir():
            (kept / "tokenizer.json").write_text("{")
            with pytest.raises(Refusal) as broken:
                embed(copy, cohort, tmp_path / "t.parquet")
            assert broken.value.code == "TOKENIZER_BROKEN"
            shutil.rmtree(kept)
        else:
            kept.unlink()
        with pytest.raises(Refusal) as gone:
            embed(copy, cohort, tmp_path / "t.parquet")
        assert gone.value.code == "MODEL_BROKEN"
        assert not kept.exists()
