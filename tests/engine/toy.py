"""A toy trajectory system: random short sequences on a tiny Qwen3, under a five-phase curriculum.

Loaded by path from the fixtures, and run as a script by tests that need processes of their own.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from mmjepa.batch import Batch, Layout, SequenceView
from mmjepa.curriculum import Curriculum, Phase
from mmjepa.encoders.qwen3 import LoRAConfig, Qwen3Config, make_base
from mmjepa.engine.loop import Engine, EngineConfig
from mmjepa.engine.optim import OptimConfig
from mmjepa.engine.start import world
from mmjepa.jepa import JEPA, LossConfig, ModelConfig, RolloutLoss
from mmjepa.keyed import generator
from mmjepa.masking import draw_rollout_start
from mmjepa.objectives.sigreg import SIGRegConfig
from mmjepa.objectives.vicreg import VICRegConfig
from mmjepa.predictor import PredictorConfig
from mmjepa.run import Run
from mmjepa.teacher import TeacherConfig

VOCABULARY, TEXTS, WINDOWS = 50, 40, 12
TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


class ToySampler:
    """Windows of 5 to 8 hours over a corpus of 40 random sequences."""

    fingerprint = "toy"

    def __init__(self, seed: int = 0, shortest: int = 5) -> None:
        rng = generator(seed, "toy")
        self.seed = seed
        self.sequences = [rng.integers(0, VOCABULARY, int(rng.integers(2, 7))) for _ in range(TEXTS)]
        self.windows = [rng.integers(0, TEXTS, (2, int(rng.integers(shortest, 9)))) for _ in range(WINDOWS)]

    def __len__(self) -> int:
        return WINDOWS

    def view(self, ids: np.ndarray) -> SequenceView:
        parts = [self.sequences[i] for i in ids]
        offsets = np.cumsum([0, *(len(part) for part in parts)])
        tokens = torch.from_numpy(np.concatenate(parts))
        return SequenceView("ehr", tokens, torch.from_numpy(offsets), ids=torch.from_numpy(ids))

    def corpus(self, encoder: str) -> Iterator[SequenceView] | None:
        return iter([self.view(ids) for ids in np.array_split(np.arange(TEXTS), 4)])

    def batch(self, items: Sequence[tuple[int, int]]) -> Batch:
        chosen = [self.windows[index] for _, index in items]
        ids, inverse = np.unique(np.concatenate([w.ravel() for w in chosen]), return_inverse=True)
        longest = max(w.shape[1] for w in chosen)
        layout, done = Layout.empty(len(items), 2 * longest), 0
        for row, ((epoch, index), w) in enumerate(zip(items, chosen, strict=True)):
            t = w.shape[1]
            rows = torch.from_numpy(inverse[done : done + 2 * t])
            done += 2 * t
            s, a = torch.arange(0, 2 * t, 2), torch.arange(1, 2 * t, 2)
            layout.kind[row, s], layout.kind[row, a] = 0, 1
            layout.source[row, s], layout.source[row, a] = rows[:t], rows[t:]
            layout.hour[row, s] = layout.hour[row, a] = torch.arange(t)
            layout.target[row, s[:-1]], layout.feeds[row, s[:-1]] = rows[1:t], s[1:]
            start = draw_rollout_start(t, generator(self.seed, "rollout", epoch, index))
            layout.start[row] = 2 * start if start >= 0 else -1
        layout.position = torch.arange(2 * longest).expand(len(items), -1).clone()
        return Batch([self.view(ids)], None, layout, torch.tensor([index for _, index in items]))


def toy_model(seed: int = 0, *, dropout: float = 0.1) -> JEPA:
    torch.manual_seed(seed)
    config = ModelConfig(
        ehr=Qwen3Config(adapter=LoRAConfig(rank=2, alpha=4), pack=16),
        predictor=PredictorConfig(
            kinds=("state", "action"),
            latent=16,
            width=16,
            depth=1,
            heads=2,
            ffn=32,
            positions=16,
            dropout=dropout,
            attention_dropout=dropout,
        ),
        distance="l1_sum",
    )
    return JEPA(config, make_base(TINY, VOCABULARY))


def toy_phases(scale: int = 1) -> tuple[Phase, ...]:
    chained, forced = LossConfig(rollout=RolloutLoss(chained=True)), LossConfig(rollout=RolloutLoss(chained=False))
    ema = TeacherConfig(kind="ema", tau=0.9)
    return (
        Phase(
            name="tuning",
            steps=2 * scale,
            train=("ehr.base",),
            loss=LossConfig(predict=0, next_token=1),
            own_schedule=True,
        ),
        Phase(name="warm-up", steps=3 * scale, train=("predictor",), loss=chained),
        Phase(name="joint", steps=5 * scale, train=("ehr.adapter", "predictor"), teacher=ema, loss=forced, batch=3),
        Phase(name="alignment", steps=3 * scale, train=("predictor",), teacher=ema, loss=forced),
        Phase(name="sync", steps=0, sync=True),
        Phase(name="final", steps=3 * scale, train=("predictor",), loss=chained),
    )


LOSSES = {
    "predict": LossConfig(),
    "chained": LossConfig(rollout=RolloutLoss(chained=True)),
    "forced": LossConfig(rollout=RolloutLoss(chained=False)),
    "vicreg": LossConfig(vicreg=VICRegConfig()),
    "two_sided": LossConfig(vicreg=VICRegConfig(two_sided=True, convention="mean")),
    "sigreg": LossConfig(sigreg=SIGRegConfig(weight=1.0, slices=32)),
    "sigreg_paper": LossConfig(sigreg=SIGRegConfig(weight=1.0, slices=32, convention="paper")),
    "next_token": LossConfig(predict=0, next_token=1),
}


def train(
    out: Path,
    *,
    resume: bool = False,
    scale: int = 1,
    workers: int = 0,
    phases: tuple[Phase, ...] | None = None,
    batch: int = 4,
    dropout: float = 0.1,
    accumulate: int = 1,
    checkpoint: int = 2,
    log: int = 2,
) -> Engine:
    """Run the curriculum into ``out``; every rank calls this."""
    plain = {"toy": scale}
    with world("cpu") as here:
        run = Run(out)
        if here.first:
            run = Run.resume(out, plain) if resume else Run.create(out, plain)
        here.wait()
        sampler = ToySampler()
        curriculum = Curriculum(toy_phases(scale) if phases is None else phases, batch, len(sampler), 0)
        config = EngineConfig(device="cpu", checkpoint=checkpoint, log=log, workers=workers, accumulate=accumulate)
        optim = OptimConfig(lr={"default": 1e-2})
        engine = Engine(toy_model(dropout=dropout), sampler, curriculum, run, here, config=config, optim=optim, seed=0)
        _die_after(os.environ.get("TOY_DIE_AFTER"))
        engine.fit()
        here.wait()
        return engine


def _die_after(steps: str | None) -> None:
    """Let this process vanish, without a word to anyone, when it has taken so many steps."""
    if steps is None:
        return
    taken, original = [0], Engine._step

    def step(self: Engine, *arguments: object) -> None:
        if taken[0] == int(steps):
            os._exit(9)
        taken[0] += 1
        original(self, *arguments)

    Engine._step = step


def losses_and_gradients(out: Path) -> None:
    """Under torchrun or alone: for every objective, the loss and all gradients of one global batch."""
    from torch.nn.parallel import DistributedDataParallel

    from mmjepa.engine.loader import count
    from mmjepa.jepa import Share

    results = {}
    with world("cpu") as here:
        # of three ranks the last has windows too short for a rollout, and must still take part in every collective
        sampler, items = ToySampler(2, shortest=3), [(0, i) for i in range(7)]
        mine = np.array_split(np.arange(7), here.size)[here.rank]
        batch = sampler.batch([items[i] for i in mine])
        totals = here.total(count([batch], 2))
        share = Share(totals[:2], int(totals[2]), int(totals[3]), ranks=here.size, key=5)
        for name, loss in LOSSES.items():
            model = toy_model(dropout=0.0)
            torch.nn.init.normal_(model.predictor.output.weight)  # so that gradients are not tiny
            for n, p in model.named_parameters():
                p.requires_grad_(("lora" in n) or ("predictor" in n) or name == "next_token")
                if "lora_B" in n:
                    torch.nn.init.normal_(p, std=0.1)
            wrapped = DistributedDataParallel(model, find_unused_parameters=True) if here.size > 1 else model
            terms = wrapped(batch, loss, share)
            terms["loss"].backward()
            value = float(here.mean(terms["loss"].detach()))
            gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            results[name] = {"loss": value, "gradient": gradient.tolist()}
            del wrapped, terms, model
        if here.first:
            out.write_text(json.dumps(results))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    action, path = sys.argv[1], Path(sys.argv[2])
    if action == "train":
        train(path, resume="resume" in sys.argv[3:], scale=int(os.environ.get("TOY_SCALE", "1")))
    else:
        losses_and_gradients(path)
