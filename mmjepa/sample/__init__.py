"""Sampling: stores and masks to batches of plain tensors. What a batch holds depends on (seed, epoch, subject) alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mmjepa.cohort import Cohort
from mmjepa.ehr.hourly import HourlyForm
from mmjepa.ehr.names import read_names
from mmjepa.ehr.saved import Form
from mmjepa.ehr.tokens import JointTokens
from mmjepa.files import read_json, write_json
from mmjepa.refusal import Refusal
from mmjepa.sample.ct_ehr import CtEhrSampler, CtEhrViews, Patch
from mmjepa.sample.trajectory import TrajectorySampler, TrajectoryViews, write_texts

Fitted = TypeVar("Fitted", bound=Form)
TEXT, TOKENS, HASH, TOKENIZER = "text.json", "tokens.json", "form.json", "tokenizer"


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
    """The sampler of a run. What is fitted (the form of the records, a tokenizer) is fitted on training subjects once, kept in
    ``folder``, and read from there ever after. Raises Refusal: FORM_HASH where another form lies there, and others.

    patch: voxels of the volume encoder's tokens. language_model: whose tokenizer to use; None: one trained here.
    """
    events = cohort.events()
    train = events.splits.get("train", events.subjects)
    if isinstance(views, TrajectoryViews):

        def fit() -> HourlyForm:
            return HourlyForm.fit(events, train, views.text, None if views.names is None else read_names(views.names))

        form = _fitted(HourlyForm.load, folder / TEXT, fit)
        tokenizer = _tokenizer(views, cohort, form, folder / TOKENIZER, language_model)
        return TrajectorySampler(cohort, views, form, tokenizer, seed=seed, splits=splits)
    tokens = _fitted(JointTokens.load, folder / TOKENS, lambda: JointTokens.fit(events, train, views.tokens))
    return CtEhrSampler(cohort, views, tokens, patch=patch, seed=seed, splits=splits)


def check_fitted(views: CtEhrViews | TrajectoryViews, folder: Path, language_model: str | None) -> None:
    """Refuse (MODEL_BROKEN) a trained model whose fitted part is gone: fitted anew, on another cohort, it would be another."""
    names = [HASH, TEXT] if isinstance(views, TrajectoryViews) else [HASH, TOKENS]
    if isinstance(views, TrajectoryViews) and language_model is None:
        names.append(TOKENIZER)
    for kept in (folder / name for name in names):
        if not kept.exists():
            raise Refusal(
                "MODEL_BROKEN", f"{kept} is gone; it was fitted in training", "Copy the whole run folder again"
            )


def _fitted(load: Callable[..., Fitted], path: Path, fit: Callable[[], Fitted]) -> Fitted:
    """The form in ``path``, fitted once; the hash kept beside it tells another cohort's form from it."""
    kept = path.with_name(HASH)
    if not kept.is_file():
        form = fit()
        form.save(path)
        write_json(kept, form.hash)  # last: what was cut short is fitted again
    return load(path, expected=str(read_json(kept)))


def _tokenizer(
    views: TrajectoryViews, cohort: Cohort, form: HourlyForm, folder: Path, language_model: str | None
) -> Any:
    from transformers import AutoTokenizer

    if language_model is None and not folder.is_dir():
        from mmjepa.ehr.tokenizer import train_tokenizer

        _, texts, _ = write_texts(cohort, views, form, ("train",))
        train_tokenizer(_distinct(texts), folder, views.vocabulary)
    try:
        return AutoTokenizer.from_pretrained(language_model or str(folder))
    except Exception:  # tokenizers raises bare exceptions that quote the file
        raise Refusal(
            "TOKENIZER_BROKEN", f"no tokenizer can be read at {language_model or folder}", "Copy it again"
        ) from None


def _distinct(texts: Sequence[Any]) -> list[str]:
    return sorted({line for text in texts for line in [*text.state, *text.action, text.static]})
