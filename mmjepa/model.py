"""Models on disk: safetensors and JSON, the language model in Hugging Face form, its adapter in peft's."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmjepa.config import build, to_plain
from mmjepa.encoders.monai_weights import read_monai_weights
from mmjepa.encoders.qwen3 import Qwen3Encoder, make_base
from mmjepa.encoders.slices25d import read_timm_weights
from mmjepa.encoders.vit3d import ViT3DConfig
from mmjepa.files import atomic_path, read_json, sha256, write_json
from mmjepa.jepa import JEPA, ModelConfig
from mmjepa.refusal import Refusal


def build_model(config: ModelConfig, folder: Path, vocabulary: int) -> JEPA:
    """A model with fresh weights (draws from torch's global random state), the volume encoder's from ``config.ct.weights``
    where it names a file.

    The language model comes through ``from_pretrained``: from ``config.ehr.path``, or from ``folder/base``, where a small
    one of ``vocabulary`` tokens is made first when there is none.
    """
    model = _initial(config, folder, vocabulary)
    if config.ct is not None and config.ct.weights is not None:
        if isinstance(config.ct, ViT3DConfig):
            begun = read_monai_weights(config.ct).state_dict()  # its pool, where it has one, is no part of a MONAI ViT
        else:
            begun = read_timm_weights(config.ct).backbone.state_dict(prefix="backbone.")
        model.encoders["ct"].load_state_dict(begun, strict=False)
    return model


def _initial(config: ModelConfig, folder: Path, vocabulary: int) -> JEPA:
    if config.ehr is None:
        return JEPA(config)
    if config.ehr.path is not None:
        return JEPA(config, load_base(config.ehr.path, config.ehr.dtype))
    small = folder / "base"
    if not (small / "config.json").is_file():
        with torch.random.fork_rng(devices=[]), _quiet(), atomic_path(small) as temporary:
            torch.manual_seed(torch.initial_seed() + 1)  # a stream of its own: the other parts draw the same either way
            make_base(config.ehr.architecture, vocabulary).save_pretrained(temporary)  # type: ignore[operator]
    with torch.random.fork_rng(devices=[]), _quiet():
        base = load_base(small, config.ehr.dtype)
    return JEPA(config, base)


def load_base(path: str | Path, dtype: str = "float32") -> nn.Module:
    """A causal language model through ``from_pretrained``, from a folder or a hub name (safetensors only)."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            str(path), dtype=getattr(torch, dtype), attn_implementation="sdpa", use_safetensors=True
        )
    except SafetensorError as error:
        raise Refusal("ENCODER_BROKEN", f"the weights at {path} are damaged ({error})", "Copy them again") from None
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise Refusal(
            "ENCODER_MISSING",
            f"no language model at {path}: {reason}",
            "Name a folder that save_pretrained wrote, or a hub name that this machine can reach",
        ) from None


def save_model(model: JEPA, folder: Path, *, base_trained: bool) -> None:
    """Write ``folder``: config.json, model.safetensors (all but the language model), ``ehr/`` (the language model, when it
    was made or trained here) and ``ehr_adapter/`` (in peft's form)."""
    outside = _language_model(model)
    if "ehr" in model.encoders:
        encoder = model.encoders["ehr"]
        assert isinstance(encoder, Qwen3Encoder)
        outside |= {f"encoders.ehr.{name}" for name in encoder.adapter_parameters()}
        with _quiet():
            _save_language_model(encoder, folder, keep_base=base_trained or encoder.config.path is None)
    tensors = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if n not in outside}
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary)
    write_json(folder / "config.json", to_plain(model.config))


def _language_model(model: JEPA) -> set[str]:
    """Names of the language model's own parameters."""
    return set(model.parts().get("ehr.base", ()))


def _save_language_model(encoder: Qwen3Encoder, folder: Path, *, keep_base: bool) -> None:
    for own in ("ehr", "ehr_adapter"):  # a finished run that is resumed writes the same bytes again
        shutil.rmtree(folder / own, ignore_errors=True)
    if encoder.config.adapter is not None:
        with atomic_path(folder / "ehr_adapter") as temporary:
            encoder.lm.save_pretrained(temporary)  # type: ignore[operator]
            _name_base(temporary, encoder.config.path)
    if keep_base:
        names = {id(p): name for name, p in encoder.causal_lm.named_parameters()}
        state = {names[id(p)].replace(".base_layer.", "."): p for p in encoder.base_parameters().values()}
        with atomic_path(folder / "ehr") as temporary:
            encoder.causal_lm.config.save_pretrained(temporary)
            tensors = {name: p.detach().cpu().contiguous() for name, p in state.items()}
            save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})


def _name_base(adapter: Path, base: str | None) -> None:
    """peft notes where the base was read from, an absolute path of this machine; keep the name that the user typed."""
    config = read_json(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", {**config, "base_model_name_or_path": base})
    (adapter / "README.md").unlink(missing_ok=True)  # an empty form that holds the same path


def fingerprint(folder: Path) -> str:
    """Hash of all weights that ``save_model`` wrote."""
    parts = ("model.safetensors", "ehr/model.safetensors", "ehr_adapter/adapter_model.safetensors")
    found = "".join(f"{part} {sha256(folder / part)}\n" for part in parts if (folder / part).is_file())
    return hashlib.sha256(found.encode()).hexdigest()


def load_model(folder: Path | str) -> JEPA:
    """The model that ``save_model`` wrote, in eval mode. Raises Refusal ``MODEL_MISSING``, ``MODEL_BROKEN``."""
    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        raise Refusal(
            "MODEL_MISSING",
            f"{folder} holds no finished model",
            "Finish the run first (resume=true), or name its model/ folder",
        )
    config = build(ModelConfig, read_json(folder / "config.json"))
    base = None
    if config.ehr is not None:
        with _quiet():
            own = folder / "ehr"
            base = load_base(own if own.is_dir() else str(config.ehr.path), config.ehr.dtype)
    model = JEPA(config, base)
    parameters = dict(model.named_parameters())
    tensors = _tensors(folder / "model.safetensors")
    if config.ehr is not None and config.ehr.adapter is not None:
        adapter = _tensors(folder / "ehr_adapter" / "adapter_model.safetensors")
        tensors |= {f"encoders.ehr.lm.{_adapter_name(name)}": value for name, value in adapter.items()}
    wanted = parameters.keys() - _language_model(model)
    if differing := sorted(wanted ^ tensors.keys()):
        lack = "lacks" if differing[0] in wanted else "holds the unknown"
        raise Refusal(
            "MODEL_BROKEN", f"{folder} {lack} {differing[0]}", "Write it again with the version that trained it"
        )
    with torch.no_grad():
        for name, value in tensors.items():
            parameters[name].copy_(value)
    return model.eval()


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError):
        raise Refusal(
            "MODEL_BROKEN", f"{path} is missing or damaged", "Copy it again, or resume its run, which writes it again"
        ) from None


def _adapter_name(name: str) -> str:
    """peft leaves the adapter's name out of the tensor names that it saves."""
    for half in ("lora_A", "lora_B"):
        name = name.replace(f".{half}.weight", f".{half}.default.weight")
    return name


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers inside."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
