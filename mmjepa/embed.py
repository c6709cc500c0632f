"""What a trained run is used for: embedding tables and rollouts of a cohort."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from mmjepa.batch import View
from mmjepa.cohort import Cohort
from mmjepa.config import build
from mmjepa.evaluate.rollout import Rollout, rollout_metrics
from mmjepa.evaluate.tables import EmbeddingTable, write_embeddings
from mmjepa.files import atomic_path, sha256
from mmjepa.jepa import JEPA
from mmjepa.model import fingerprint, load_model
from mmjepa.predictor import gather_slots
from mmjepa.pretrain import RunConfig, fresh_model, open_cohort, run_sampler, say_sampling
from mmjepa.progress import track
from mmjepa.refusal import Refusal
from mmjepa.rollout import rollout
from mmjepa.run import Run
from mmjepa.sample import check_fitted
from mmjepa.sample.trajectory import CHUNK, ActionPolicy, TrajectorySampler, Written


class TrainedRun:
    """A run folder, opened: its config, and its model in eval mode.

    untrained: the weights it began with instead, which the seed alone decides.
    """

    def __init__(self, folder: Path | str, *, untrained: bool = False) -> None:
        self.run = Run.open(Path(folder))
        self.config = build(RunConfig, self.run.saved_config())
        self.untrained = untrained
        self.model = load_model(self.run.model)
        language_model = self.config.model.ehr.path if self.config.model.ehr else None
        check_fitted(self.config.views, self.run.model, language_model)
        if untrained:
            vocabulary = self.model.encoders["ehr"].causal_lm.config.vocab_size if "ehr" in self.model.encoders else 0  # type: ignore[union-attr]
            self.model = fresh_model(self.config, self.run, vocabulary).eval()

    def facts(self, cohort: Cohort) -> dict[str, Any]:
        """Fingerprints that travel with every table made here."""
        return {
            "model": "untrained" if self.untrained else fingerprint(self.run.model),
            "config": sha256(self.run.config),
            "data": cohort.fingerprint,
        }


@torch.no_grad()
def embed(run: Path | str, cohort: Path | str, out: Path | str, *, untrained: bool = False) -> dict[str, Any]:
    """Write the embedding table of a cohort under a run's frozen encoders.

    CT+EHR: one row for each date with a CT (its middle crop, of the image that ``views.prefer_kernel`` says), z = the CT
    latent and the EHR latent side by side (zeros where a subject has no record; counted). Trajectory: one row for each hour of each stay, z = the state latent. Returns the counts.
    """
    if Path(out).exists():
        raise Refusal("OUTPUT_EXISTS", f"{out} already exists", "Name another file with --out")
    trained, opened = TrainedRun(run, untrained=untrained), open_cohort(cohort, "embedding")
    sampler = run_sampler(trained.config, opened, trained.run, splits=None)
    say_sampling(sampler)
    keys, z, missing = [], [], 0
    for frame, views, present in track(sampler.embedding_batches(), f"embed {cohort}", sampler.embedding_chunks):
        parts = [_spread(trained.model, view, present).numpy() for view in views]
        if len(parts) == 1 and trained.config.views.kind == "ct_ehr":
            parts.append(np.zeros_like(parts[0]))
        keys.append(frame)
        z.append(np.concatenate(parts, axis=1))
        missing += int((~present).sum())
    frame = pd.concat(keys, ignore_index=True)
    split = opened.events().splits
    table = EmbeddingTable(
        subject_id=frame["subject_id"].to_numpy(),
        prediction_time=frame["prediction_time"].to_numpy(),
        z=np.concatenate(z).astype(np.float32),
        split=_split_of(frame["subject_id"].to_numpy(), split) if split else None,
        facts=trained.facts(opened),
    )
    write_embeddings(out, table)
    subjects = int(frame["subject_id"].nunique())
    found = {
        "table": str(out),
        "rows": len(frame),
        "subjects": subjects,
        "width": table.z.shape[1],
        "without_record": missing,
    }
    images = ("crop_mm", "crop_covers", "several_images", "kernels")
    return found | {name: sampler.report[name] for name in images if name in sampler.report}


def _spread(model: JEPA, view: View, present: np.ndarray) -> torch.Tensor:
    """A view's latents at the rows that exist, zeros elsewhere."""
    latents = model.encode([view])
    if len(latents) == len(present):
        return latents
    spread = latents.new_zeros(len(present), latents.shape[1])
    spread[torch.from_numpy(present)] = latents
    return spread


def _split_of(subjects: np.ndarray, splits: dict[str, np.ndarray]) -> np.ndarray:
    of = {int(subject): name for name, members in splits.items() for subject in members}
    return np.array([of.get(int(subject), "") for subject in subjects], dtype=object)


@torch.no_grad()
def rollout_table(
    run: Path | str,
    cohort: Path | str,
    out: Path | str | None = None,
    *,
    from_hour: int = 24,
    horizon: int = 48,
    splits: Sequence[str] = ("held_out",),
    policies: Sequence[ActionPolicy] = ("recorded", "hold", "none"),
    draws: int = 2000,
) -> dict[str, Any]:
    """Roll the stays of some splits forward from hour ``from_hour`` and judge the drift beside forecasts that cost nothing.

    The first ``from_hour`` hours of a stay are known; the rollout ends with the window that the run was trained on.
    policies: which actions the later hours hold; ``recorded`` ones are privileged (they tell of the future). The
    climatology is the median of the training stays. Returns ``table`` (rows with intervals and counts) and ``summary``,
    both by policy; ``out``: also written there as csv.
    """
    if out is not None and Path(out).exists():
        raise Refusal("OUTPUT_EXISTS", f"{out} already exists", "Name another file with --out")
    trained, opened = TrainedRun(run), Cohort.open(cohort)
    if trained.config.views.kind != "trajectory":
        raise Refusal("RUN_KIND", f"{run} has no hours to roll over", "Name a run of pretrain_trajectory")
    window = trained.config.views.window
    if draws < 1:
        raise Refusal("ROLLOUT_DRAWS", f"draws is {draws}", "Want 1 or more")
    if not 2 <= from_hour < window or horizon < 1:
        raise Refusal(
            "ROLLOUT_HOURS",
            f"from_hour is {from_hour} and horizon {horizon}",
            f"from_hour lies in 2..{window - 1} (this run knows windows of {window} h) and horizon is at least 1",
        )
    known = run_sampler(trained.config, opened, trained.run, splits=("train",))
    asked = run_sampler(trained.config, opened, trained.run, splits=splits)
    assert isinstance(known, TrajectorySampler) and isinstance(asked, TrajectorySampler)  # noqa: PT018
    hours = min(window, from_hour + horizon)
    climatology = np.nanmedian(_states(known.written, _latents(trained.model, known).numpy(), hours), axis=0)
    latents, results = _latents(trained.model, asked), {}
    for policy in policies:
        results[policy], latents = _roll(
            trained.model, asked, latents, climatology, from_hour - 1, hours, policy, draws
        )
    table = pd.concat([r.table.assign(actions=p) for p, r in results.items()], ignore_index=True)
    if out is not None:
        with atomic_path(out) as temporary:
            table.to_csv(temporary, index=False)
    return {
        "from_hour": from_hour,
        "splits": list(splits),
        "table": table.replace({np.nan: None}).to_dict("records"),
        "summary": {policy: result.summary for policy, result in results.items()},
    }


def _latents(model: JEPA, sampler: TrajectorySampler, known: torch.Tensor | None = None) -> torch.Tensor:
    """Latents of every text of a sampler, by id: float32 [texts, D]. known: those of the first ids, encoded before."""
    done = [] if known is None else [known]
    ids = np.arange(0 if known is None else len(known), len(sampler.corpus_of))
    chunks = np.array_split(ids, max(1, len(ids) // CHUNK)) if len(ids) else []
    return torch.cat(done + [model.encode([sampler.corpus_of.view(chunk)]) for chunk in track(chunks, "encode texts")])


def _states(written: Sequence[Written], latents: np.ndarray, hours: int) -> np.ndarray:
    """[n, hours, D], NaN past the end of a stay."""
    states = np.full((len(written), hours, latents.shape[1]), np.nan, dtype=np.float32)
    for row, w in enumerate(written):
        length = min(hours, len(w.states))
        states[row, :length] = latents[w.states[:length]]
    return states


def _roll(
    model: JEPA,
    sampler: TrajectorySampler,
    latents: torch.Tensor,
    climatology: np.ndarray,
    start: int,
    hours: int,
    policy: ActionPolicy,
    draws: int,
) -> tuple[Rollout, torch.Tensor]:
    """The judged rollout under one policy, and the latents with those of the policy's own texts behind them."""
    chosen = sampler.rollout_stays(start, hours, policy)
    if not chosen:
        raise Refusal("ROLLOUT_EMPTY", f"no stay lasts beyond hour {start + 1}", "Lower from_hour, or name more splits")
    latents = _latents(model, sampler, latents)
    predictions = []
    for w, actions in track(chosen, f"roll out, actions {policy}"):
        _, layout = sampler.lay_out([(w.static, w.states[: len(actions)], actions)])
        ids = torch.from_numpy(np.unique(np.concatenate([[w.static], w.states[: len(actions)], actions])))
        slots = gather_slots(latents[ids], layout)
        predictions.append(rollout(model.predictor, slots, torch.tensor([2 * start + 1]), hours - 1 - start)[0])
    judged = rollout_metrics(
        _states([w for w, _ in chosen], latents.numpy(), hours),
        torch.stack(predictions).numpy(),
        np.array([w.stay.subject_id for w, _ in chosen]),
        climatology,
        start=start,
        draws=draws,
    )
    return judged, latents
