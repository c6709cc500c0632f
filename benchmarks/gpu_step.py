"""What one joint training step of the trajectory system costs: tokens a second, FLOPs utilisation, memory, largest costs.

The model, losses and optimiser are those of ``recipes/configs/clin_jepa_qwen3_8b.yaml`` in its joint phase, with random
weights made on the device: Qwen3-8B in bfloat16 under a rank-16 adapter, recomputing activations, an EMA teacher pass, the
predictor, L1, backward, clipping, AdamW over adapter and predictor, the average's update. The step is the engine's own.
Only the texts are made up: random token ids, windows of 72 hours, each hour a state text of about 250 tokens and an action
text of about 100, and a static text of 11 (``Lengths``), two windows a step. Without CUDA, or with ``--small``, the same path
runs at tiny dimensions: that says that the path works, nothing of its speed.

Time is the median of the timed steps after two others; the device is waited for before and after each. Peak memory is the
allocator's on CUDA and the process's on a CPU. The five largest costs come from one more step under torch.profiler: operators by
their own time on the device.

Model FLOPs a step, for T tokens, N = parameters of the language model's matrices (no embedding, no output head, which this
step does not use), n of the adapter, p of the predictor, S slots, texts of l tokens, L layers of attention width A:

    student forward, teacher forward, gradients of activations:  (2 + 2 + 2) N T
    the adapter, which has gradients of weights too:              (2 + 2 + 2 + 2) n T
    attention inside each text, forward twice and backward:       4 * sum(2 A L l^2)
    predictor forward and backward:                               6 p S

Utilisation = model FLOPs / time / the rate of a bfloat16 matrix product of 8192^3 measured in the same process. What is run on
top, and is not counted there, goes into ``executed``: recomputation (2 N T more and one more attention), attention over groups
of texts of similar length (2 A W^2 a text and layer, W the longest of its group, instead of 2 A l^2), and the scores that a fused
attention computes again in its backward pass (2.5 forward passes instead of 2).

The last line on standard output is one JSON object. It needs neither MONAI nor nibabel, pydicom, meds or pandas.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mmjepa.batch import Batch, Layout, SequenceView
from mmjepa.config import build, load_yaml
from mmjepa.curriculum import Curriculum, Phase
from mmjepa.encoders.packing import group_sequences
from mmjepa.encoders.qwen3 import Qwen3Encoder, make_base
from mmjepa.engine.loop import Engine, EngineConfig
from mmjepa.engine.optim import OptimConfig
from mmjepa.engine.start import World
from mmjepa.jepa import JEPA, ModelConfig
from mmjepa.keyed import generator
from mmjepa.masking import draw_rollout_start
from mmjepa.run import Run

RECIPE = Path(__file__).parents[1] / "recipes" / "configs" / "clin_jepa_qwen3_8b.yaml"
JOINT = "joint refinement"
STATE, ACTION, STATIC = range(3)


@dataclass(frozen=True)
class Lengths:
    """Hours of a window, and tokens a text: mean and standard deviation of a normal distribution, at least 8."""

    hours: int = 72
    state: tuple[int, int] = (250, 40)
    action: tuple[int, int] = (100, 30)
    static: int = 11


SMALL_LENGTHS = Lengths(hours=8, state=(24, 4), action=(12, 3), static=8)
SMALL_MODEL: dict[str, Any] = {
    "ehr": {
        "pack": 128,
        "adapter": {"rank": 4, "alpha": 8},
        "holds": {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
    },
    "predictor": {"latent": 64, "width": 32, "depth": 2, "heads": 2, "ffn": 64},
}


class Texts:
    """A sampler of windows of made-up texts, in the layout of the trajectory system."""

    fingerprint = "made up"

    def __init__(self, lengths: Lengths, vocabulary: int, seed: int) -> None:
        self.lengths, self.vocabulary, self.seed = lengths, vocabulary, seed

    def __len__(self) -> int:
        return 1_000_000

    def corpus(self, encoder: str) -> Iterator[SequenceView] | None:
        """No text comes twice."""
        return None

    def batch(self, items: Sequence[tuple[int, int]]) -> Batch:
        """Windows by (epoch, index)."""
        hours, sizes, tokens, starts = self.lengths.hours, [], [], []
        for epoch, index in items:
            rng = generator(self.seed, "texts", epoch, index)
            drawn = [rng.normal(*of, size=hours) for of in (self.lengths.state, self.lengths.action)]
            size = np.maximum(8, np.concatenate([[self.lengths.static], *drawn]).round().astype(np.int64))
            sizes.append(size)
            tokens.append(rng.integers(0, self.vocabulary, size=int(size.sum())))
            starts.append(draw_rollout_start(hours, rng))
        offsets = torch.tensor([0, *np.cumsum(np.concatenate(sizes)).tolist()])
        view = SequenceView("ehr", torch.from_numpy(np.concatenate(tokens)), offsets)
        layout = lay_out(len(items), hours)
        layout.start = torch.tensor([2 * k + 1 if k >= 0 else -1 for k in starts])
        return Batch([view], None, layout, torch.tensor([index for _, index in items]))


def lay_out(windows: int, hours: int) -> Layout:
    """``TrajectorySampler.lay_out`` for windows of equal length whose texts are all distinct and stand in the view as static,
    states, actions. That room needs meds, which this script does without."""
    layout = Layout.empty(windows, 2 * hours + 1)
    rows = torch.arange(windows * (2 * hours + 1)).view(windows, -1)
    state, action, hour = torch.arange(1, 2 * hours, 2), torch.arange(2, 2 * hours + 1, 2), torch.arange(1, hours + 1)
    layout.kind[:, 0], layout.kind[:, state], layout.kind[:, action] = STATIC, STATE, ACTION
    layout.source[:, 0] = rows[:, 0]
    layout.source[:, state], layout.source[:, action] = rows[:, 1 : hours + 1], rows[:, hours + 1 :]
    layout.hour[:, state], layout.hour[:, action] = hour, hour
    layout.target[:, state[:-1]], layout.feeds[:, state[:-1]] = rows[:, 2 : hours + 1], state[1:]
    layout.position = torch.arange(2 * hours + 1).expand(windows, -1).clone()
    layout.time = layout.hour / 24.0
    return layout


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries, ``over`` laid on ``base``."""
    return {**base, **{k: merged(base[k], v) if isinstance(v, dict) and k in base else v for k, v in over.items()}}


def make_engine(values: dict[str, Any], sampler: Texts, windows: int, device: torch.device, folder: Path) -> Engine:
    """The engine in the recipe's joint phase, with random weights."""
    config = build(ModelConfig, values["model"])
    assert config.ehr is not None
    architecture = dict(config.ehr.holds)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, config.ehr.dtype))
    try:
        with device:
            base = make_base(architecture, architecture.pop("vocab_size"))
    finally:
        torch.set_default_dtype(default)
    phase = next(build(Phase, phase) for phase in values["curriculum"] if phase["name"] == JOINT)
    curriculum = Curriculum((phase,), windows, len(sampler), sampler.seed)
    settings = EngineConfig(precision=values["engine"]["precision"], device=device.type)
    engine = Engine(
        JEPA(config, base),
        sampler,
        curriculum,
        Run(folder),
        World(0, 1, device),
        config=settings,
        optim=build(OptimConfig, values["optim"]),
        seed=sampler.seed,
    )
    engine._enter(phase, fresh=False)
    return engine


def model_flops(encoder: Qwen3Encoder, predictor: torch.nn.Module, batch: Batch) -> dict[str, float]:
    """Model FLOPs and executed FLOPs of a step by the formula above."""
    (view,) = batch.views
    assert isinstance(view, SequenceView)
    lengths = view.offsets.diff()
    settings = encoder.causal_lm.config
    layers, width = settings.num_hidden_layers, settings.num_attention_heads * settings.head_dim
    matrices = sum(p.numel() for n, p in encoder.base_parameters().items() if ".layers." in n and p.ndim == 2)
    adapter = sum(p.numel() for p in encoder.adapter_parameters().values())
    heads = sum(p.numel() for n, p in predictor.named_parameters() if p.ndim == 2 and not n.startswith("position"))
    tokens, slots = int(lengths.sum()), batch.layout.kind.numel()
    attention = float(2 * width * layers * (lengths.double() ** 2).sum())
    padded = sum(len(places) * places.shape[1] ** 2 for places in group_sequences(lengths).places)
    rest = 8 * adapter * tokens + 6 * heads * slots
    again = 1 if encoder.config.checkpointing else 0
    return {
        "matrix_parameters": matrices,
        "tokens": tokens,
        "model_flops": 6 * matrices * tokens + 4 * attention + rest,
        "executed_flops": (6 + 2 * again) * matrices * tokens + (4.5 + again) * 2.0 * width * layers * padded + rest,
    }


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds, the device waited for before and after."""
    wait(device)
    started = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Until the device has done all it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, size: int) -> float:
    """FLOPs a second of a bfloat16 matrix product of size^3: the median of ten after three."""
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = [timed(lambda: one @ other, device) for _ in range(13)][3:]
    return 2 * size**3 / statistics.median(seconds)


def largest_costs(call: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """The five operators with the most time of their own on the device."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as seen:
        call()
        wait(device)
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    # kernels have rows of their own, which repeat the time of the operators that launched them
    rows = [row for row in seen.key_averages() if row.device_type == DeviceType.CPU and getattr(row, own) > 0]
    total = sum(getattr(row, own) for row in rows)
    rows.sort(key=lambda row: -getattr(row, own))
    return [
        {
            "operator": row.key,
            "calls": row.count,
            "ms": round(getattr(row, own) / 1000, 2),
            "share": round(getattr(row, own) / total, 4),
        }
        for row in rows[:5]
    ]


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(*, small: bool, windows: int, pack: int | None, steps: int, device: torch.device) -> dict[str, Any]:
    """One JSON object of figures."""
    values = load_yaml(RECIPE)
    values["model"] = merged(values["model"], {"ehr": {"path": None, "checkpointing": True}})
    if small:
        values["model"] = merged(values["model"], SMALL_MODEL)
    pack = values["model"]["ehr"]["pack"] = pack or values["model"]["ehr"]["pack"]
    lengths = SMALL_LENGTHS if small else Lengths()
    values["model"]["predictor"]["positions"] = max(
        2 * lengths.hours + 1, values["model"]["predictor"].get("positions", 0)
    )
    sampler = Texts(lengths, values["model"]["ehr"]["holds"]["vocab_size"], seed=0)
    size = 512 if device.type == "cpu" else 8192
    rate = matmul_rate(device, size)
    say(f"bfloat16 {size}^3: {rate / 1e12:.3g} TFLOP/s; making the model")
    with tempfile.TemporaryDirectory(prefix="mmjepa-step-") as folder:
        engine = make_engine(values, sampler, windows, device, Path(folder))
        phase = engine.curriculum.phases[0]
        batches = [sampler.batch(engine.curriculum.drawn(0, step)) for step in range(steps + 3)]
        encoder = engine.model.encoders["ehr"]
        assert isinstance(encoder, Qwen3Encoder)
        load = model_flops(encoder, engine.model.predictor, batches[2])
        seconds = []
        for step in range(steps + 2):
            seconds.append(timed(lambda step=step: engine._step(0, phase, step, [batches[step]]), device))
            engine.done += 1
            say(f"step {step + 1} of {steps + 2}: {seconds[-1]:.3f} s")
        peak = peak_memory(device)
        costs = largest_costs(lambda: engine._step(0, phase, steps + 2, [batches[-1]]), device)
    losses = [float(terms["loss"]) for _, terms in engine.log.pending]
    if not np.isfinite(losses).all():
        raise SystemExit(f"the loss is not finite: {losses}")
    spent = statistics.median(seconds[2:])
    return {
        "benchmark": "gpu_step",
        "small": small,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "windows": windows,
        "lengths": vars(lengths),
        "pack": pack,
        "checkpointing": True,
        **load,
        "seconds_per_step": spent,
        "seconds_of_steps": [round(s, 4) for s in seconds],
        "tokens_per_second": load["tokens"] / spent,
        "matmul_size": size,
        "matmul_flops_per_second": rate,
        "model_flops_utilisation": load["model_flops"] / spent / rate,
        "executed_flops_utilisation": load["executed_flops"] / spent / rate,
        "peak_memory_bytes": peak,
        "largest_costs": costs,
        "losses": losses,
    }


def say(line: str) -> None:
    """A line to a person."""
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny dimensions (always on a CPU)")
    parser.add_argument("--windows", type=int, default=2, help="windows a step (default 2)")
    parser.add_argument("--pack", type=int, help="tokens a packed row (default: the recipe's)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default 5)")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = options.small or device.type == "cpu"
    figures = measure(small=small, windows=options.windows, pack=options.pack, steps=options.steps, device=device)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
