"""The loop: phases in order, steps in phases, checkpoints between them."""

import hashlib
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmjepa.batch import Batch, to_device
from mmjepa.curriculum import Curriculum, Phase
from mmjepa.engine import checkpoint
from mmjepa.engine.loader import Sampler, count, steps
from mmjepa.engine.log import MetricsLog
from mmjepa.engine.optim import OptimConfig, clip_gradients, make_optimizer, moments, restore_moments, set_rate
from mmjepa.engine.start import World
from mmjepa.files import write_json
from mmjepa.jepa import JEPA, Share
from mmjepa.keyed import torch_seed
from mmjepa.progress import bar, say
from mmjepa.refusal import Refusal
from mmjepa.run import Run


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """precision: ``fp32`` or ``bf16`` autocast. accumulate: micro-batches an optimiser step. workers: loader processes.
    checkpoint: steps between checkpoints (one is also left at every phase's end). log: steps between fetches of the
    metrics. device: ``cpu`` or ``cuda``, None for CUDA where there is one. threads: None leaves torch's own choice."""

    precision: str = "fp32"
    accumulate: int = 1
    workers: int = 0
    checkpoint: int = 200
    log: int = 10
    device: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision={self.precision!r} must be fp32 or bf16")
        if min(self.accumulate, self.checkpoint, self.log) < 1 or self.workers < 0:
            raise ValueError("accumulate, checkpoint and log are at least 1, workers at least 0")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads={self.threads} must be at least 1")
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(f"device={self.device!r} must be cpu or cuda")


class Engine:
    """Trains a JEPA by a curriculum into a run folder."""

    def __init__(
        self,
        model: JEPA,
        sampler: Sampler,
        curriculum: Curriculum,
        run: Run,
        world: World,
        *,
        config: EngineConfig,
        optim: OptimConfig,
        seed: int,
    ) -> None:
        self.model, self.sampler, self.curriculum, self.run, self.world = model, sampler, curriculum, run, world
        self.config, self.optim, self.seed = config, optim, seed
        _check_batches(curriculum, world.size * config.accumulate)
        model.to(world.device)
        self.parts = model.parts()
        self.optimizer = make_optimizer(self.parts, optim)
        self.log = MetricsLog(run.metrics, world)
        self.wrapped: nn.Module = model
        self.position, self.done = (0, 0), 0
        self.reports: list[dict[str, Any]] = []
        self.before: dict[str, str] = {}
        self.random: Tensor | None = None
        self.stopping = False

    def fit(self) -> list[dict[str, Any]]:
        """Run every phase that is still to do; returns a report for each phase. Ctrl-C raises KeyboardInterrupt after a
        checkpoint is left."""
        torch.manual_seed(torch_seed(self.seed, "steps", self.world.rank))
        self._resume()
        try:
            with self._interruptible():
                for phase, step in self.curriculum.walk(*self.position):
                    if phase >= len(self.curriculum.phases):
                        break
                    self._run_phase(phase, step)
        finally:
            self.wrapped = self.model  # the wrapper must not outlive the process group
        return self.reports

    def _run_phase(self, index: int, first: int) -> None:
        phase = self.curriculum.phases[index]
        self._enter(phase, fresh=first == 0)
        batches = self._batches(index, first)
        with bar(f"phase {phase.name}", phase.steps - first) if self.world.first else nullcontext() as progress:
            for step in range(first, phase.steps):
                self._step(index, phase, step, next(batches))
                self.position, self.done = (index, step + 1), self.done + 1
                logged = self.done % self.config.log == 0
                note = f"loss {self.log.flush():.4g}" if logged else None
                if progress is not None:
                    progress.advance(note=note)
                if self._asked_to_stop():
                    self._save()
                    raise KeyboardInterrupt(f"stopped after step {self.done}; go on with resume=true")
                if self.done % self.config.checkpoint == 0 and step + 1 < phase.steps:
                    self._save()
        self.log.flush()
        self._leave(phase)
        self.position = (index + 1, 0)
        if phase.steps:
            self._save()

    def _batches(self, index: int, first: int) -> Iterator[list[Batch]]:
        parts, workers = self.config.accumulate, self.config.workers
        batches = steps(self.sampler, self.curriculum, index, first, self.world, parts=parts, workers=workers)
        if self.random is not None:  # restored only now: making the iterator may have drawn from it
            self._set_random(self.random)
            self.random = None
        return batches

    def _step(self, index: int, phase: Phase, step: int, batches: list[Batch]) -> None:
        started = time.perf_counter()
        set_rate(self.optimizer, self.curriculum.rate(index, step, self.optim.warmup, self.optim.floor))
        share, terms = self._share(batches), {}
        for number, batch in enumerate(batches):
            last = number + 1 == len(batches)
            sync = (
                nullcontext()
                if last or not isinstance(self.wrapped, DistributedDataParallel)
                else self.wrapped.no_sync()
            )
            with sync:
                part = self._forward(batch, phase, share)
                part["loss"].backward()
            counted = {name: torch.tensor(float(n * share.ranks)) for name, n in batch.notes.items()}
            for name, value in {**part, **counted}.items():
                terms[name] = terms.get(name, 0.0) + value.detach().to(self.world.device)
        norms = clip_gradients(self.parts, self.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if phase.teacher.kind == "ema":
            self.model.teacher.update(self.model.online(), phase.teacher.tau_at(step / phase.steps))
        facts = {"step": self.done + 1, "phase": phase.name, "seconds": round(time.perf_counter() - started, 4)}
        self.log.add(facts, {**terms, **{f"gradient.{name}": norm for name, norm in norms.items()}})

    def _forward(self, batch: Batch, phase: Phase, share: Share) -> dict[str, Tensor]:
        device = self.world.device
        with self._precision():
            return self.wrapped(to_device(batch, device), phase.loss, share)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _share(self, batches: list[Batch]) -> Share:
        kinds = len(self.model.config.predictor.kinds)
        totals = self.world.total(count(batches, kinds).to(self.world.device)).cpu()
        return Share(
            counts=totals[:kinds],
            rollouts=int(totals[kinds]),
            tokens=int(totals[kinds + 1]),
            ranks=self.world.size,
            parts=len(batches),
            key=torch_seed(self.seed, "slices", self.done),
        )

    def _enter(self, phase: Phase, *, fresh: bool) -> None:
        for part, parameters in self.parts.items():
            for parameter in parameters.values():
                parameter.requires_grad_(part in phase.train)
        online = self.model.online()
        trained = {name: p for name, p in online.items() if p.requires_grad}
        self.model.teacher.begin(phase.teacher, trained)
        if fresh:
            if phase.sync:
                self.model.teacher.sync(online)
            self.before = digests(self.parts)
        self.model.kept = self._keep_frozen() if phase.steps else {}
        self.model.train()
        self.wrapped = self.model
        if self.world.size > 1 and phase.steps:
            self.wrapped = DistributedDataParallel(self.model, find_unused_parameters=True)

    @torch.no_grad()
    def _keep_frozen(self) -> dict[str, Tensor]:
        """Latents of all sequences under encoders that stand still in this phase: encoded once, looked up after."""
        kept = {}
        self.model.eval()
        for name, encoder in self.model.encoders.items():
            chunks = self.sampler.corpus(name)
            if chunks is not None and not any(p.requires_grad for p in encoder.parameters()):
                with self._precision():
                    kept[name] = torch.cat([encoder(to_device(view, self.world.device)) for view in chunks])
        return kept

    def _leave(self, phase: Phase) -> None:
        after, online = digests(self.parts), self.model.online()
        report: dict[str, Any] = {
            "phase": phase.name,
            "steps": phase.steps,
            "teacher": phase.teacher.kind,
            "sync": phase.sync,
        }
        report["trained"] = {part: self._trained(part, after) for part in phase.train}
        report["frozen"] = {p: {"bit_equal": self.before[p] == after[p]} for p in self.parts if p not in phase.train}
        if not all(entry["bit_equal"] for entry in report["frozen"].values()):
            raise RuntimeError(f"a part that stands still in phase '{phase.name}' changed: {report['frozen']}")
        report["teacher_gap"] = float(self.model.teacher.gap(online))
        self.reports.append(report)
        self.model.kept = {}
        if self.world.first:
            write_json(self.run.phases, self.reports)
            moved = ", ".join(f"{p} ({len(t['tensors'])} tensors)" for p, t in report["trained"].items()) or "nothing"
            still = ", ".join(report["frozen"]) or "nothing"
            gap = f"teacher gap {report['teacher_gap']:.3g}"
            say(f"  trained: {moved}; {phase.steps} updates; frozen, bit-equal: {still}; {gap}")

    def _trained(self, part: str, after: dict[str, str]) -> dict[str, Any]:
        parameters = self.parts[part]
        count = sum(p.numel() for p in parameters.values())
        return {"tensors": list(parameters), "parameters": count, "changed": self.before[part] != after[part]}

    def _save(self) -> None:
        self.log.flush()
        # a part that no phase trains is as the config and the seed make it: a frozen language model need not be written
        learns = {part for phase in self.curriculum.phases for part in phase.train}
        tensors = {f"model/{name}": p for part in learns for name, p in self.parts[part].items()}
        names = {id(p): name for name, p in self.model.named_parameters()}
        tensors |= {f"adam/{name}": value for name, value in moments(self.optimizer, names).items()}
        tensors |= {f"teacher/{name}": value for name, value in self.model.teacher.shadows.items()}
        states = self.world.gather(self._random().to(self.world.device))
        tensors |= {f"random/{rank}": state for rank, state in enumerate(states)}
        if self.world.first:
            facts = {"step": self.done, "position": list(self.position), "ranks": self.world.size}
            facts |= {"reports": self.reports, "before": self.before, **self.run.fingerprints}
            checkpoint.save(self.run.checkpoints, checkpoint.State(tensors, facts))
        self.world.wait()

    def _resume(self) -> None:
        state = self.run.latest(self.world.size)
        if state is None:
            self.log.rewind(0)  # steps may have been logged before the first checkpoint
            return
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in state.group("model").items():
                parameters[name].copy_(value)
        restore_moments(self.optimizer, parameters, state.group("adam"))
        # copies, because the file's own tensors lie at other alignments, where a matrix product may round otherwise
        shadows = state.group("teacher")
        self.model.teacher.shadows = {n: value.to(self.world.device, copy=True) for n, value in shadows.items()}
        phase, step = state.facts["position"]
        self.position, self.done = (phase, step), state.facts["step"]
        self.reports, self.before = state.facts["reports"], state.facts["before"]
        self.random = state.group("random")[str(self.world.rank)]
        self.log.rewind(self.done)
        if self.world.first:
            say(f"resumed after step {self.done} of {self.curriculum.steps}")

    def _random(self) -> Tensor:
        state = torch.get_rng_state()
        return torch.cat([state, torch.cuda.get_rng_state()]) if self.world.device.type == "cuda" else state

    def _set_random(self, state: Tensor) -> None:
        size = len(torch.get_rng_state())
        torch.set_rng_state(state[:size])
        if self.world.device.type == "cuda":
            torch.cuda.set_rng_state(state[size:])

    def _asked_to_stop(self) -> bool:
        if self.world.size == 1:
            return self.stopping
        return bool(self.world.total(torch.tensor([int(self.stopping)], device=self.world.device)).item())

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C lets the step in flight end, then a checkpoint is left; a second Ctrl-C stops at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True
            say("stopping after this step ...")

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _check_batches(curriculum: Curriculum, shares: int) -> None:
    for index, phase in enumerate(curriculum.phases):
        if phase.steps and curriculum.batch_of(index) < shares:
            raise Refusal(
                "CONFIG_VALUE",
                f"phase '{phase.name}' has {curriculum.batch_of(index)} items a step for {shares} micro-batches",
                "Raise batch, or lower engine.accumulate or the number of ranks",
            )


def digests(parts: dict[str, dict[str, nn.Parameter]]) -> dict[str, str]:
    """sha256 over the bytes of each part's tensors: equal digests, equal bits."""
    result = {}
    for part, parameters in parts.items():
        digest = hashlib.sha256()
        for name, parameter in parameters.items():
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        result[part] = digest.hexdigest()
    return result
