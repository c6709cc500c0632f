"""Shared fixtures. One thread: several threads of tiny matrix products are slower, and far slower on a busy machine."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # started in the background: processes that tests interrupt would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The optional folder of small real data; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("MMJEPA_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the optional real-data folder (MMJEPA_DATA) is absent")
    return folder


@pytest.fixture(scope="session")
def toy():
    """The toy trajectory system, as a module."""
    spec = importlib.util.spec_from_file_location("toy", Path(__file__).parent / "engine" / "toy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_toy(toy, tmp_path):
    """Run the toy's script on some ranks: ``run_toy(ranks, action, path, ...)``; returns the finished process."""

    def start(ranks: int, *arguments: object, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, toy.__file__, *map(str, arguments)]
        if ranks > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command = [sys.executable, *launch, *command[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert not check or done.returncode == 0, done.stderr[:4000]  # the ranks first, then torchrun
        return done

    return start


@pytest.fixture(scope="session")
def ct_ehr_cohort(tmp_path_factory) -> Path:
    """A synthetic cohort of 12 subjects with paired CT and records; it is shared, so leave it as it is."""
    from mmjepa.ingest import ingest
    from synthetic import generate

    folder = tmp_path_factory.mktemp("ct_ehr")
    generate(folder / "source", patients=12)
    ingest(folder / "source", folder / "cohort")
    return folder / "cohort"


@pytest.fixture(scope="session")
def icu_cohort(tmp_path_factory) -> Path:
    """A bare MEDS root with 8 adults in intensive care for 5 to 19 hours; subjects 7 and 8 are held out."""
    import pandas as pd

    folder = tmp_path_factory.mktemp("icu")
    rows = []
    for subject in range(1, 9):
        hours = 3 + 2 * subject
        rows += [(subject, None, f"GENDER//{'FM'[subject % 2]}", None), (subject, -400_000.0, "MEDS_BIRTH", None)]
        rows += [(subject, -2.0, "HOSPITAL_ADMISSION//ER", None), (subject, 0.0, "ICU_ADMISSION//MICU", None)]
        rows += [(subject, h + 0.5, "LAB//HR//bpm", 60.0 + (7 * subject + 3 * h) % 40) for h in range(hours)]
        rows += [(subject, h + 0.7, "LAB//MAP//mmHg", 50.0 + subject * h % 30) for h in range(0, hours, 3)]
        rows += [(subject, 2.2, "INFUSION_START//NOREPI", 0.1), (subject, 4.5, "INFUSION_END//NOREPI", None)]
        rows += [(subject, float(hours), "ICU_DISCHARGE", None), (subject, hours + 9.0, "HOSPITAL_DISCHARGE", None)]
    frame = pd.DataFrame(rows, columns=["subject_id", "time", "code", "numeric_value"])
    frame = frame.sort_values(["subject_id", "time"], kind="stable", na_position="first")
    frame["time"] = pd.to_datetime(frame["time"].astype(float) * 3600, unit="s").astype("datetime64[us]")
    frame["numeric_value"] = frame["numeric_value"].astype("float32")
    for part in ("data", "metadata"):
        (folder / part).mkdir()
    frame.to_parquet(folder / "data" / "0.parquet", index=False)
    codes = pd.DataFrame({"code": frame["code"].unique(), "description": None}).astype("string")
    codes.to_parquet(folder / "metadata" / "codes.parquet")
    splits = pd.DataFrame({"subject_id": range(1, 9), "split": ["train"] * 6 + ["held_out"] * 2})
    splits.to_parquet(folder / "metadata" / "subject_splits.parquet")
    return folder


TINY_QWEN3 = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


@pytest.fixture(scope="session")
def icu_run(icu_cohort, tmp_path_factory) -> Path:
    """A finished trajectory run of a few steps, with an adapter and a teacher; leave it as it is."""
    from mmjepa.config import build
    from mmjepa.pretrain import RunConfig, pretrain

    out = tmp_path_factory.mktemp("icu_run") / "run"
    predictor = {"latent": 16, "width": 16, "depth": 1, "heads": 2, "ffn": 24, "positions": 29}
    loss = {"rollout": {"chained": True}}
    phases = [
        {"name": "tuning", "steps": 2, "train": ["ehr.base"], "loss": {"predict": 0, "next_token": 1}},
        {"name": "warm-up", "steps": 2, "train": ["predictor"], "loss": loss},
        {"name": "joint", "steps": 3, "train": ["ehr.adapter", "predictor"], "teacher": {"kind": "ema"}},
    ]
    values = {
        "data": str(icu_cohort),
        "out": str(out),
        "views": {"kind": "trajectory", "window": 14, "stride": 4, "vocabulary": 300, "min_hours": 4},
        "model": {"ehr": {"architecture": TINY_QWEN3, "adapter": {"rank": 2}}, "predictor": predictor},
        "curriculum": phases,
        "batch": 4,
        "optim": {"lr": {"default": 0.01}},
        "engine": {"device": "cpu"},
    }
    pretrain(build(RunConfig, values))
    return out


@pytest.fixture(scope="session")
def ct_ehr_run(ct_ehr_cohort, tmp_path_factory) -> Path:
    """A finished CT+EHR run of a few steps; leave it as it is."""
    from mmjepa.config import build
    from mmjepa.pretrain import RunConfig, pretrain

    out = tmp_path_factory.mktemp("ct_ehr_run") / "run"
    predictor = {"kinds": ["ct", "ehr", "ct_patch"], "queries": True, "position": "continuous", "depth": 1, "heads": 2}
    phases = [{"name": "joint", "steps": 3, "train": ["ct", "ehr.base", "ehr.front", "predictor"]}]
    values = {
        "data": str(ct_ehr_cohort),
        "out": str(out),
        "views": {"kind": "ct_ehr", "crop": [16, 16, 16]},
        "model": {
            "ct": {"patch": 8, "width": 12, "depth": 1, "heads": 2, "ffn": 16, "latent": 8},
            "ehr": {"architecture": TINY_QWEN3, "values": True, "latent": 8},
            "predictor": {**predictor, "latent": 8, "width": 12, "ffn": 16},
        },
        "curriculum": phases,
        "batch": 4,
        "engine": {"device": "cpu"},
    }
    pretrain(build(RunConfig, values))
    return out
