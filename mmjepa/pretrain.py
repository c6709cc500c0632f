"""Pretraining as one call: a config in, a run out."""

import difflib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmjepa.audit import audit
from mmjepa.cohort import Cohort
from mmjepa.config import build, load_yaml, override, to_plain
from mmjepa.curriculum import Curriculum, Phase
from mmjepa.engine.loop import Engine, EngineConfig
from mmjepa.engine.optim import OptimConfig
from mmjepa.engine.start import World, world
from mmjepa.files import read_json, sha256, write_json
from mmjepa.jepa import JEPA, ModelConfig
from mmjepa.keyed import torch_seed
from mmjepa.model import build_model, save_model
from mmjepa.predictor import PredictorConfig
from mmjepa.progress import say
from mmjepa.refusal import Refusal
from mmjepa.run import Run
from mmjepa.sample import CtEhrSampler, CtEhrViews, TrajectorySampler, TrajectoryViews, open_sampler
from mmjepa.sample.ct_ehr import KINDS as CELL_KINDS
from mmjepa.sample.images import say_images
from mmjepa.sample.trajectory import KINDS as HOUR_KINDS


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a run needs. data: cohort or bare MEDS root. out: run folder. batch: items (subjects, windows) an
    optimiser step, over all ranks. resume: go on from the run's last checkpoint. strict: refuse data
    that fails the audit, instead of stamping the failure on the run."""

    data: Path
    out: Path
    views: CtEhrViews | TrajectoryViews
    model: ModelConfig
    curriculum: tuple[Phase, ...]
    seed: int = 0
    batch: int = 32
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    resume: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        if not self.curriculum:
            raise ValueError("curriculum has no phase")
        if self.batch < 1:
            raise ValueError(f"batch={self.batch} must be at least 1")
        _check_slots(self.views, self.model.predictor)


def _check_slots(views: CtEhrViews | TrajectoryViews, predictor: PredictorConfig) -> None:
    """What the sampler lays out must be what the predictor reads."""
    cells = isinstance(views, CtEhrViews)
    kinds = CELL_KINDS if cells else HOUR_KINDS
    if predictor.kinds != kinds:
        raise ValueError(f"model.predictor.kinds={list(predictor.kinds)} must be {list(kinds)} for {views.kind} views")
    if cells and not (predictor.queries and predictor.position == "continuous"):
        raise ValueError("hidden cells need model.predictor.queries=true and model.predictor.position=continuous")
    if not cells and predictor.position == "learned" and 2 * views.window + 1 > predictor.positions:
        raise ValueError(f"views.window={views.window} hours need model.predictor.positions={2 * views.window + 1}")


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML with ``key=value`` overrides. Raises the CONFIG_* refusals."""
    return build(RunConfig, override(load_yaml(path), overrides))


def pretrain(config: RunConfig) -> dict[str, Any]:
    """Train by the config's curriculum; returns a summary with the run folder and a report of every phase.

    Started by torchrun, every rank calls this. Ctrl-C leaves a checkpoint; ``resume`` goes on from it with the same bits
    as if it had never stopped.
    """
    if config.engine.device == "cuda" and not torch.cuda.is_available():
        raise Refusal("DEVICE_MISSING", "engine.device is cuda and torch finds none", "See `mmjepa doctor`, or use cpu")
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    with world(config.engine.device) as here:
        run = enter_run(config, here)
        with _removed_if_refused(run, new=here.first and not config.resume):
            cohort = open_cohort(config.data, "pretraining")
            if here.first:
                audited(config, cohort, run)
            if not here.first:
                here.wait()  # rank 0 fits and makes what the others then read
            sampler = run_sampler(config, cohort, run)
            model = fresh_model(config, run, sampler.vocabulary)
            if here.first:
                here.wait()
                say_sampling(sampler)
            run.fingerprints = {"data_fingerprint": sampler.fingerprint}
            check_parts(config.curriculum, list(model.parts()))
            check_rates(config.optim, list(model.parts()))
            check_losses(config.curriculum, config.model)
            curriculum = Curriculum(config.curriculum, config.batch, len(sampler), config.seed)
            engine = Engine(
                model, sampler, curriculum, run, here, config=config.engine, optim=config.optim, seed=config.seed
            )
        phases = engine.fit()
        if here.first:
            trained = any("ehr.base" in phase.train for phase in config.curriculum)
            save_model(model, run.model, base_trained=trained)
            write_json(run.facts, {**run.saved_facts(), **run.fingerprints, "sampling": sampler.report})
        here.wait()
    return {"run": str(config.out), "steps": curriculum.steps, "items": len(sampler), "phases": phases}


@contextmanager
def _removed_if_refused(run: Run, *, new: bool) -> Iterator[None]:
    """A run refused or interrupted before its first step leaves no new folder: the next command shall find its name free."""
    try:
        yield
    except (Refusal, KeyboardInterrupt):
        if new:
            shutil.rmtree(run.folder, ignore_errors=True)
        raise


def audited(config: RunConfig, cohort: Cohort, run: Run) -> None:
    """Audit the data for a run, again if they changed: findings in ``audit.json``, verdict and what failed in ``run.json``.

    Raises Refusal ``AUDIT_FAILED`` where the config is strict and a check failed, and the Refusals of ``mmjepa.audit.audit``.
    """
    of = {"data": cohort.fingerprint, "labels": _label_files(cohort)}
    found: dict[str, Any] = read_json(run.audit) if run.audit.is_file() else {}
    if found.get("of") != of:
        found = {**audit(config.data), "of": of}
        write_json(run.audit, found)
    failed = [f"{finding['check']} {finding['name']}" for finding in found["findings"] if finding["verdict"] == "fail"]
    write_json(run.facts, {**run.saved_facts(), "audit": {"verdict": found["verdict"], "failed": failed}})
    if failed and config.strict:
        raise Refusal(
            "AUDIT_FAILED",
            f"{config.data} fails {len(failed)} checks of the audit: {', '.join(failed)}",
            f"Mend it as `mmjepa audit {config.data}` says, or train with strict=false: the failure is then on the report",
        )


def _label_files(cohort: Cohort) -> dict[str, str]:
    """Path below ``labels/`` -> sha256, of every file there."""
    files = sorted(path for path in cohort.labels_folder.rglob("*") if path.is_file())
    return {path.relative_to(cohort.labels_folder).as_posix(): sha256(path) for path in files}


def enter_run(config: RunConfig, here: World) -> Run:
    """Create or re-open the run folder; rank 0 first."""
    plain = to_plain(config)
    run = Run(config.out)
    if here.first:
        run = Run.resume(config.out, plain) if config.resume else Run.create(config.out, plain)
    here.wait()
    return run


def run_sampler(
    config: RunConfig, cohort: Cohort, run: Run, splits: Sequence[str] | None = ("train",)
) -> CtEhrSampler | TrajectorySampler:
    """The run's sampler over some splits of a cohort, with what was fitted in this run."""
    return open_sampler(
        config.views,
        cohort,
        run.model,
        patch=config.model.ct.patch if config.model.ct else 1,
        language_model=config.model.ehr.path if config.model.ehr else None,
        seed=config.seed,
        splits=splits,
    )


def open_cohort(path: Path | str, what: str) -> Cohort:
    """A cohort with records. what: needs them. Raises Refusal COHORT_NO_RECORDS where there are only images."""
    try:
        return Cohort.open(path)
    except Refusal:
        if not (Path(path) / "ct" / "index.parquet").is_file():
            raise
    raise Refusal(
        "COHORT_NO_RECORDS",
        f"{path}: this cohort has images only; {what} needs records",
        "Ingest both into a new cohort: mmjepa ingest --ehr MEDS --ct IMAGES --crosswalk TABLE --out COHORT; "
        "mmjepa.ct.batches reads images alone",
    )


def say_sampling(sampler: CtEhrSampler | TrajectorySampler) -> None:
    """On standard error, what part of the volumes is read and which images are taken."""
    if isinstance(sampler, CtEhrSampler):
        for line in say_images(sampler.report, chosen_by=sampler.config.prefer_kernel):
            say(line)


def fresh_model(config: RunConfig, run: Run, vocabulary: int) -> JEPA:
    """The model with its initial weights, which the seed alone decides."""
    torch.manual_seed(torch_seed(config.seed, "weights"))
    return build_model(config.model, run.model, vocabulary)


def check_losses(phases: Sequence[Phase], model: ModelConfig) -> None:
    """A phase of next tokens needs a text encoder, and one that learns where nothing else does. Raises ``CONFIG_VALUE``."""
    for phase in phases:
        if not phase.loss.next_token:
            continue
        if model.ehr is None or model.ehr.values:
            raise Refusal(
                "CONFIG_VALUE",
                f"phase '{phase.name}' asks for next_token, but this model reads no text",
                "Set its loss.next_token to 0; tokens with values have no next token to tell",
            )
        only = not (phase.loss.predict or phase.loss.rollout or phase.loss.vicreg or phase.loss.sigreg)
        if only and not any(part.startswith("ehr.") for part in phase.train):
            raise Refusal(
                "CONFIG_VALUE",
                f"phase '{phase.name}' has next_token alone, which teaches none of {', '.join(phase.train) or 'its parts'}",
                "Name ehr.base or ehr.adapter in its train, or give it another loss",
            )


def check_rates(optim: OptimConfig, parts: Sequence[str]) -> None:
    """Every learning rate must be of a part or an encoder of this model. Raises Refusal ``CONFIG_UNKNOWN_PART``."""
    known = ["default", *parts, *{part.split(".")[0] for part in parts}]
    for name in optim.lr:
        # a config may name parts that only a larger model has: its adapter, its front
        if name not in known and name.split(".")[0] not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise Refusal(
                "CONFIG_UNKNOWN_PART", f"optim.lr names the unknown part '{name}'", f"The nearest is '{near}'"
            )


def check_parts(phases: Sequence[Phase], parts: Sequence[str]) -> None:
    """Every part that a phase trains must exist. Raises Refusal ``CONFIG_UNKNOWN_PART`` with the nearest name."""
    for phase in phases:
        for part in phase.train:
            if part not in parts:
                near = difflib.get_close_matches(part, parts, n=1, cutoff=0.0)[0]
                raise Refusal(
                    "CONFIG_UNKNOWN_PART",
                    f"phase '{phase.name}' trains the unknown part '{part}'",
                    f"The nearest part is '{near}'; this model has {', '.join(parts)}",
                )
