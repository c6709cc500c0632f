"""What a run would cost: parameters by part, memory and FLOPs a step, counted on modules that hold no numbers.

Parameters are exact: the real modules are built on the meta device. Memory and FLOPs are estimates by the rules stated in
``assumptions``; they leave out the allocator, the framework and the data.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmjepa.curriculum import Phase
from mmjepa.encoders.qwen3 import Qwen3Config, make_base
from mmjepa.encoders.slices25d import Slices25D
from mmjepa.jepa import JEPA, part_of
from mmjepa.pretrain import RunConfig, check_parts
from mmjepa.refusal import Refusal
from mmjepa.sample import CtEhrViews, TrajectoryViews
from mmjepa.sample.ct_ehr import token_grid

JOINT_VOCABULARY = 2000
ASSUMPTIONS = [
    f"a language model made here has views.vocabulary tokens, or {JOINT_VOCABULARY} where joint tokens are not fitted yet",
    "FLOPs are the model's: recomputed activations and the one pass over all texts of an encoder that stands still are left out",
    "a matrix of n parameters costs 2n FLOPs a token forward, 2n backward for the inputs and 2n for its own gradient if it learns",
    "a 2.5-D encoder runs once on one stack of slices without numbers: its FLOPs are counted, its own gradient costs as much as its inputs', its activations are what its layers put out",
    "attention adds 4 * width * length FLOPs a token and layer forward, twice that backward",
    "weights in their dtype; gradients 4 and Adam's moments 8 bytes a trained parameter; teacher's shadows 4",
    "activations: 34 bytes a token, layer and unit of width at 2-byte precision, twice that in fp32, one micro-batch; with model.ehr.checkpointing a layer keeps its input alone, and one layer at a time is recomputed",
]


def plan(config: RunConfig, *, tokens_per_text: int = 128) -> dict[str, Any]:
    """Parameters, memory and FLOPs of a run, without data or weights. tokens_per_text: assumed mean length of a text (at
    most ``views.max_tokens``)."""
    model = build_on_meta(config)
    parts = model.parts()
    check_parts(config.curriculum, list(parts))
    table = {name: {"tensors": len(p), "parameters": sum(t.numel() for t in p.values())} for name, p in parts.items()}
    load = _load(config, tokens_per_text)
    phases = [_phase(config, phase, model, load) for phase in config.curriculum]
    shadowed = {
        p for phase in config.curriculum if phase.teacher.kind != "online" for p in phase.train if p != "predictor"
    }
    return {
        "parameters": table,
        "language_model": _source(config.model.ehr),
        "total_parameters": sum(entry["parameters"] for entry in table.values()),
        "teacher_parameters": sum(table[part]["parameters"] for part in shadowed),
        "per_step": load,
        "phases": phases,
        "memory": _memory(config, model, parts, shadowed, load),
        "assumptions": ASSUMPTIONS,
    }


def build_on_meta(config: RunConfig) -> JEPA:
    """The run's model on the meta device: shapes without storage."""
    with torch.device("meta"):
        return JEPA(config.model, None if config.model.ehr is None else _base(config.model.ehr, config))


def _base(encoder: Qwen3Config, config: RunConfig) -> nn.Module:
    if encoder.path is None:
        default = config.views.vocabulary if isinstance(config.views, TrajectoryViews) else JOINT_VOCABULARY
        return make_base(encoder.architecture, default).to(getattr(torch, encoder.dtype))
    held = dict(encoder.holds or _read(encoder.path))
    if "vocab_size" not in held:
        raise Refusal("CONFIG_VALUE", "model.ehr.holds names no vocab_size", "Give it as the model's own config does")
    return make_base(held, int(held.pop("vocab_size"))).to(getattr(torch, encoder.dtype))


def _source(encoder: Qwen3Config | None) -> str | None:
    """Where the language model's architecture was taken from."""
    if encoder is None:
        return None
    return "model.ehr.architecture" if encoder.path is None else "model.ehr.holds" if encoder.holds else encoder.path


def _read(path: str) -> dict[str, Any]:
    """The architecture of the language model at a path."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path).to_dict()
    except (OSError, ValueError):
        raise Refusal(
            "ENCODER_MISSING",
            f"the architecture of {path} cannot be read here",
            "Give model.ehr.holds (hidden_size, num_hidden_layers, vocab_size, ...), so that it need not be",
        ) from None


def _load(config: RunConfig, tokens_per_text: int) -> dict[str, int]:
    """What one optimiser step reads: sequences and their tokens, volumes and theirs, predictor slots."""
    views = config.views
    if isinstance(views, CtEhrViews):
        grid = math.prod(token_grid(views.crop, config.model.ct.patch if config.model.ct else 1))
        return {
            "items": config.batch,
            "text_tokens": config.batch * views.max_events,
            "text_length": views.max_events,
            "volume_tokens": config.batch * grid,
            "volume_length": grid,
            "slots": config.batch * grid,
            "slot_length": grid,
        }
    texts, length = 2 * views.window + 1, min(tokens_per_text, views.max_tokens)
    return {
        "items": config.batch,
        "text_tokens": config.batch * texts * length,
        "text_length": length,
        "volume_tokens": 0,
        "volume_length": 0,
        "slots": config.batch * texts,
        "slot_length": texts,
    }


def _phase(config: RunConfig, phase: Phase, model: JEPA, load: dict[str, int]) -> dict[str, Any]:
    scale = (phase.batch or config.batch) / config.batch
    costs = {}
    for name, encoder in model.encoders.items():
        tokens, length = (
            load["text_tokens" if name == "ehr" else "volume_tokens"],
            load["text_length" if name == "ehr" else "volume_length"],
        )
        learns = any(part.startswith(name) for part in phase.train)
        trained = sum(
            p.numel() for n, p in encoder.named_parameters(prefix=f"encoders.{name}") if part_of(n) in phase.train
        )
        if isinstance(encoder, Slices25D):
            forward = own = _one_stack(encoder, config)[0] * tokens
        else:
            forward, own = _forward(encoder, length) * tokens, 2 * trained * tokens
        kept = not learns and isinstance(config.views, TrajectoryViews)
        teacher = forward if phase.teacher.kind != "online" else 0
        costs[name] = (0 if kept else forward) + (forward + own if learns else 0) + teacher
    passes = 1 + (phase.loss.rollout.horizon if phase.loss.rollout and phase.loss.rollout.chained else 0)
    asked = bool(phase.loss.predict or phase.loss.rollout)
    costs["predictor"] = 3 * asked * passes * _forward(model.predictor, load["slot_length"]) * load["slots"]
    costs = {name: int(cost * scale) if phase.steps else 0 for name, cost in costs.items()}
    return {
        "phase": phase.name,
        "steps": phase.steps,
        "flops_per_step": costs,
        "total_flops": phase.steps * sum(costs.values()),
    }


def _forward(module: nn.Module, length: int) -> float:
    """FLOPs a token of one forward: matrices, and attention over sequences of ``length``."""
    matrices = sum(
        p.numel()
        for n, p in module.named_parameters()
        if p.ndim == 2 and "embed_tokens" not in n and "position" not in n
    )
    layers, width = _layers_and_width(module)
    return 2 * matrices + 4 * width * length * layers


def _one_stack(encoder: Slices25D, config: RunConfig) -> tuple[int, int]:
    """FLOPs forward of one token of a 2.5-D encoder, and how many numbers its layers put out."""
    from torch.utils.flop_counter import FlopCounterMode

    if not isinstance(config.views, CtEhrViews):
        return 0, 0
    held = []
    layers = [module for module in encoder.modules() if not list(module.children())]
    hooks = [layer.register_forward_hook(lambda _layer, _seen, out: held.append(out.numel())) for layer in layers]
    x, y, _ = config.views.crop
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder.tokens(torch.empty(1, 1, x, y, encoder.config.stack, device="meta"))
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops(), sum(held)


def _layers_and_width(module: nn.Module) -> tuple[int, int]:
    if hasattr(module, "blocks"):
        return len(module.blocks), module.config.width  # type: ignore[arg-type, union-attr, return-value]
    language = module.causal_lm.config  # type: ignore[union-attr]
    return language.num_hidden_layers, language.num_attention_heads * language.head_dim  # type: ignore[union-attr]


def _memory(
    config: RunConfig, model: JEPA, parts: dict[str, dict[str, nn.Parameter]], shadowed: set[str], load: dict[str, int]
) -> dict[str, int]:
    ever = {part for phase in config.curriculum for part in phase.train}
    trained = sum(p.numel() for part in ever for p in parts[part].values())
    size = 2 if config.engine.precision == "bf16" else 4
    micro = max(1, config.engine.accumulate)
    activations = 0
    for name, module in [*model.encoders.items(), ("predictor", model.predictor)]:
        tokens = load[{"ehr": "text_tokens", "ct": "volume_tokens", "predictor": "slots"}[name]]
        if isinstance(module, Slices25D):
            activations += size * tokens * _one_stack(module, config)[1] // micro
            continue
        layers, width = _layers_and_width(module)
        layer = 17 * size * tokens * width // micro
        recomputed = name == "ehr" and config.model.ehr is not None and config.model.ehr.checkpointing
        activations += layer + layers * size * tokens * width // micro if recomputed else layers * layer
    memory = {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "teacher": 4 * sum(p.numel() for part in shadowed for p in parts[part].values()),
        "activations": activations,
    }
    return {**memory, "total_bytes": sum(memory.values())}


def plan_file(path: Path | str, overrides: list[str]) -> dict[str, Any]:
    """``plan`` of a config file. ``data`` and ``out`` need not be set: nothing is read or written."""
    from mmjepa.config import build, load_yaml, override

    values = {"data": ".", "out": "."} | override(load_yaml(path), overrides)
    return plan(build(RunConfig, values))
