"""Sampling: stores and masks to batches of plain tensors. What a batch holds depends on (seed, epoch, subject) alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmjepa.cohort import Cohort
from mmjepa.refusal import Refusal
from mmjepa.sample.ct_ehr import CtEhrSampler, CtEhrViews, Patch
from mmjepa.sample.trajectory import TrajectorySampler, TrajectoryViews, write_texts


def open_sampler(
    views: CtEhrViews | TrajectoryViews,
    cohort: Cohort,
    folder: Path,
    *,
    patch: Patch,
    language_model: str | None,
    seed: int,
    splits: Sequence[str] | None = ("train",),
) -> CtEhrSampler | TrajectorySampler:
    """The sampler of a run. What is fitted (token statistics, a tokenizer) is fitted on training subjects once, kept in
    ``folder``, and read from there ever after.

    patch: voxels of the volume encoder's tokens. language_model: whose tokenizer to use; None: one trained here.
    """
    if isinstance(views, TrajectoryViews):
        tokenizer = _tokenizer(views, cohort, folder / "tokenizer", language_model)
        return TrajectorySampler(cohort, views, tokenizer, seed=seed, splits=splits)
    from mmjepa.ehr.tokens import JointTokens

    path = folder / "tokens.json"
    if not path.is_file():
        CtEhrSampler.fit_tokens(cohort, views).save(path)
    return CtEhrSampler(cohort, views, JointTokens.load(path), patch=patch, seed=seed, splits=splits)


def check_fitted(views: CtEhrViews | TrajectoryViews, folder: Path, language_model: str | None) -> None:
    """Refuse (MODEL_BROKEN) a trained model whose fitted part is gone: fitted anew, on another cohort, it would be another."""
    kept = folder / ("tokenizer" if isinstance(views, TrajectoryViews) else "tokens.json")
    if not kept.exists() and not (isinstance(views, TrajectoryViews) and language_model is not None):
        raise Refusal("MODEL_BROKEN", f"{kept} is gone; it was fitted in training", "Copy the whole run folder again")


def _tokenizer(views: TrajectoryViews, cohort: Cohort, folder: Path, language_model: str | None) -> Any:
    from transformers import AutoTokenizer

    if language_model is None and not folder.is_dir():
        from mmjepa.ehr.tokenizer import train_tokenizer

        _, texts, _ = write_texts(cohort, views, ("train",))
        train_tokenizer(_distinct(texts), folder, views.vocabulary)
    try:
        return AutoTokenizer.from_pretrained(language_model or str(folder))
    except Exception:  # tokenizers raises bare exceptions that quote the file
        raise Refusal(
            "TOKENIZER_BROKEN", f"no tokenizer can be read at {language_model or folder}", "Copy it again"
        ) from None


def _distinct(texts: Sequence[Any]) -> list[str]:
    return sorted({line for text in texts for line in [*text.state, *text.action, text.static]})
