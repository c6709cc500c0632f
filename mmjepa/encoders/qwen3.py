"""The EHR encoder: a Qwen3 causal language model whose last real token, after the final norm, is the latent.

Texts go in as token ids. Joint code+value tokens go in through the same embedding table, plus a code of the value and of
the time. Sequences lie behind one another without padding, and attention is computed sequence by sequence (``packing``).
"""

import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmjepa.batch import SequenceView
from mmjepa.codes import TIME_WIDTH, time_code
from mmjepa.encoders.packing import group_sequences, register_attention
from mmjepa.refusal import Refusal


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapter (peft). Clin-JEPA: rank 16, alpha 32 on q, k, v, o, no bias, no dropout."""

    rank: int = 16
    alpha: int = 32
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """path: folder or hub name for ``from_pretrained``; None: a small model is made from ``architecture`` (keys of
    transformers' Qwen3Config) and the vocabulary at hand. holds: the same keys, of what lies at ``path``, for planning on a
    machine that cannot read it. adapter: LoRA on a frozen base; None: the base itself learns.
    values: also read values and times (joint tokens). pack: most tokens a row of the stream; sequences run on
    over rows. latent: output width, None for the
    hidden size without a projection. pool: the latent is the state of the last token (Clin-JEPA), or the mean over all.
    dtype: of the base weights. checkpointing: keep no layer's activations, compute them again in the backward pass."""

    path: str | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    holds: dict[str, Any] = field(default_factory=dict)
    adapter: LoRAConfig | None = None
    values: bool = False
    pack: int = 512
    latent: int | None = None
    pool: Literal["last", "mean"] = "last"
    dtype: str = "float32"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.pack < 8:
            raise ValueError(f"pack={self.pack} is below 8 tokens")
        if self.latent is not None and self.latent < 1:
            raise ValueError(f"latent={self.latent} must be at least 1")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r} must be float32 or bfloat16")


SMALL: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}


def make_base(architecture: dict[str, Any], vocabulary: int) -> nn.Module:
    """A Qwen3 language model with random weights: ``SMALL`` with ``architecture`` laid over it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import Qwen3Config as HFConfig
    from transformers import Qwen3ForCausalLM

    try:
        settings: dict[str, Any] = {**SMALL, **architecture, "vocab_size": vocabulary, "attn_implementation": "sdpa"}
        config = HFConfig(**settings)
        return Qwen3ForCausalLM(config)
    except (TypeError, ValueError, ZeroDivisionError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise Refusal("ENCODER_ARCHITECTURE", f"Qwen3 cannot be built from {architecture}: {reason}") from None


def _checkpoint_activations(language: Any) -> None:
    """Recompute layers in the backward pass, by the name that this transformers has for it. After the adapter is in: peft
    would otherwise make the embeddings ask for gradients, which only the reentrant form needs."""
    newer = getattr(language, "activation_checkpointing_enable", None)
    (newer or language.gradient_checkpointing_enable)({"use_reentrant": False})


class Qwen3Encoder(nn.Module):
    """Sequences in, one latent each."""

    def __init__(self, config: Qwen3Config, base: nn.Module) -> None:
        """base: a causal language model, made here or loaded; modified in place when there is an adapter."""
        super().__init__()
        self.config = config
        hidden = base.config.hidden_size  # type: ignore[union-attr]
        if config.adapter is not None:
            from peft import LoraConfig, get_peft_model

            settings = LoraConfig(
                r=config.adapter.rank,
                lora_alpha=config.adapter.alpha,
                target_modules=list(config.adapter.modules),
                bias="none",
                task_type="CAUSAL_LM",
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft reads an attribute that transformers renamed
                try:
                    base = get_peft_model(base, settings)  # type: ignore[arg-type]
                except ValueError:
                    raise Refusal(
                        "ENCODER_ADAPTER",
                        f"the language model has none of the modules {', '.join(config.adapter.modules)}",
                        "Name its linear layers in model.ehr.adapter.modules, for instance q_proj, k_proj, v_proj, o_proj",
                    ) from None
        self.lm = base
        self.causal_lm.config._attn_implementation = register_attention()
        if config.checkpointing:
            _checkpoint_activations(self.causal_lm)
        if config.values:
            language = base.config  # type: ignore[union-attr]
            # each code has a direction of its own along which its value moves the token; values and times start as loud
            # as the codes themselves
            self.value = nn.Embedding(language.vocab_size, hidden)  # type: ignore[arg-type, union-attr]
            self.time = nn.Linear(TIME_WIDTH, hidden, bias=False)
            nn.init.normal_(self.value.weight, std=language.initializer_range)  # type: ignore[arg-type, union-attr]
            nn.init.normal_(self.time.weight, std=language.initializer_range / (TIME_WIDTH / 2) ** 0.5)  # type: ignore[operator, union-attr]
        self.head = nn.Linear(hidden, config.latent) if config.latent is not None else nn.Identity()

    @property
    def causal_lm(self) -> Any:
        """The language model without peft's wrapper."""
        return self.lm.base_model.model if self.config.adapter is not None else self.lm  # type: ignore[union-attr]

    @property
    def width(self) -> int:
        """Latent width."""
        return self.config.latent or self.causal_lm.config.hidden_size

    def hidden_states(self, view: SequenceView) -> Tensor:
        """States after the final norm, [L, H], of all tokens of a view, in the view's own order."""
        lengths = view.offsets.diff()
        count, device = int(view.offsets[-1]), lengths.device
        groups = group_sequences(lengths.cpu(), device)
        position = torch.arange(count, device=device) - torch.repeat_interleave(view.offsets[:-1], lengths)
        rows = -(-count // self.config.pack)
        tail = -count % rows
        embedded = nn.functional.pad(self._embed(view), (0, 0, 0, tail)).unflatten(0, (rows, -1))
        states = self.causal_lm.model(
            inputs_embeds=embedded,
            position_ids=nn.functional.pad(position, (0, tail)).unflatten(0, (rows, -1)),
            attention_mask=torch.ones(rows, 1, 1, 1, dtype=torch.bool, device=device),  # 4-D: none is made
            use_cache=False,
            groups=groups,
        ).last_hidden_state
        return states.flatten(0, 1)[:count]

    def forward(self, view: SequenceView) -> Tensor:
        """Latents [V, latent], float32: the pooled states of each sequence. Raises ValueError on an empty sequence."""
        lengths = view.offsets.diff()
        if bool((lengths < 1).any()):
            raise ValueError("a sequence without tokens has no latent")
        states = self.hidden_states(view).float()
        if self.config.pool == "last":
            return self.head(states[view.offsets[1:] - 1]).float()
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        sums = states.new_zeros(len(lengths), states.shape[1]).index_add(0, sequence, states)
        return self.head(sums / lengths[:, None]).float()

    def next_token_logits(self, view: SequenceView) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [M, vocabulary], the true next tokens [M] and the sequence each stands in [M], over all positions but
        each sequence's last."""
        lengths = view.offsets.diff()
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        followed = torch.ones_like(sequence, dtype=torch.bool)
        followed[view.offsets[1:] - 1] = False
        places = torch.nonzero(followed)[:, 0]
        return self.causal_lm.lm_head(self.hidden_states(view)[places]), view.tokens[places + 1], sequence[places]

    def _embed(self, view: SequenceView) -> Tensor:
        embedded = self.causal_lm.get_input_embeddings()(view.tokens)
        if not self.config.values:
            return embedded
        assert view.values is not None, "joint tokens carry values, has_value and days"
        assert view.has_value is not None
        assert view.days is not None
        value = (view.values * view.has_value)[:, None] * self.value(view.tokens)
        return embedded + (value + self.time(time_code(view.days))).to(embedded.dtype)

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """The language model's own parameters."""
        return {name: p for name, p in self.named_parameters() if name.startswith("lm.") and ".lora_" not in name}

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters."""
        return {name: p for name, p in self.named_parameters() if ".lora_" in name}
