"""The step benchmark takes the library's own step, counts its work rightly, and needs no data library."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mmjepa.sample.trajectory import TrajectorySampler

aten = torch.ops.aten
# torch counts no fused attention on a CPU by itself
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g, q, k, v
    ),
}
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_step.py"
BLOCKED = ("monai", "nibabel", "pydicom", "meds", "pandas", "sklearn", "scipy", "matplotlib", "joblib")


@pytest.fixture(scope="module")
def gpu_step() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_step"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_layout_is_the_trajectory_rooms(gpu_step):
    sampler = TrajectorySampler.__new__(TrajectorySampler)
    sampler.corpus_of = SimpleNamespace(view=lambda ids: ids)
    windows, hours = 3, 5
    rows = np.arange(windows * (2 * hours + 1)).reshape(windows, -1)
    views, wanted = sampler.lay_out([(row[0], row[1 : hours + 1], row[hours + 1 :]) for row in rows])
    ours = gpu_step.lay_out(windows, hours)
    assert views[0].tolist() == rows.ravel().tolist()
    assert all(torch.equal(getattr(ours, name), getattr(wanted, name)) for name in vars(wanted))


def test_windows_do_not_depend_on_their_company(gpu_step):
    sampler = gpu_step.Texts(gpu_step.SMALL_LENGTHS, 512, seed=0)
    alone, together = sampler.batch([(0, 7)]), sampler.batch([(0, 3), (0, 7)])
    length = len(alone.views[0].tokens)
    assert torch.equal(together.views[0].tokens[-length:], alone.views[0].tokens)
    assert together.layout.start[1] == alone.layout.start[0]


def test_executed_flops_are_those_that_torch_counts(gpu_step, tmp_path, monkeypatch):
    counted = []
    real = gpu_step.largest_costs

    def costs(call, device):
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            call()
        counted.append(counter.get_total_flops())
        return real(lambda: None, device)

    monkeypatch.setattr(gpu_step, "largest_costs", costs)
    figures = gpu_step.measure(small=True, windows=2, pack=None, steps=1, device=torch.device("cpu"))
    assert figures["executed_flops"] == pytest.approx(counted[0], rel=0.05)
    assert figures["model_flops"] < figures["executed_flops"]
    assert figures["matrix_parameters"] == 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 192)


def test_it_runs_without_the_data_libraries_and_ends_in_one_json_line():
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({BLOCKED!r})); sys.argv = ['gpu_step.py', '--steps', '1']"
    )
    code += f"; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    figures = json.loads(line)
    assert figures["small"] or figures["device"] != "cpu"
    assert len(figures["largest_costs"]) == 5
    assert figures["model_flops_utilisation"] > 0
