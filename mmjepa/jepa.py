"""The composition: encoders, predictor, teacher and objectives in one forward that returns all losses."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmjepa.batch import Batch, SequenceView, View
from mmjepa.encoders.qwen3 import Qwen3Config, Qwen3Encoder
from mmjepa.encoders.slices25d import Slices25D, Slices25DConfig
from mmjepa.encoders.vit3d import ViT3D, ViT3DConfig
from mmjepa.objectives.distance import Distance, latent_distance
from mmjepa.objectives.next_token import next_token
from mmjepa.objectives.sigreg import SIGRegConfig, sigreg
from mmjepa.objectives.vicreg import VICRegConfig, vicreg
from mmjepa.predictor import Predictor, PredictorConfig, Slots, gather_slots
from mmjepa.refusal import Refusal
from mmjepa.rollout import rollout
from mmjepa.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class RolloutLoss:
    """weight; horizon in hours; chained: predictions are fed back (else the real states are the context)."""

    weight: float = 1.0
    horizon: int = 2
    chained: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.horizon <= 2:
            raise ValueError(f"horizon={self.horizon} must be 1 or 2: rollouts start where two more hours are left")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms of one phase. predict: hidden latents, or the next state at every hour."""

    predict: float = 1.0
    rollout: RolloutLoss | None = None
    vicreg: VICRegConfig | None = None
    sigreg: SIGRegConfig | None = None
    next_token: float = 0.0

    def __post_init__(self) -> None:
        if min(self.predict, self.next_token) < 0:
            raise ValueError(f"predict={self.predict} and next_token={self.next_token} are weights, at least 0")
        if not (self.predict or self.next_token or self.rollout or self.vicreg or self.sigreg):
            raise ValueError("every term has weight 0: there is nothing to minimise")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The parts. ct: ``kind: vit3d`` or ``kind: slices25d``. distance: between prediction and target. target_norm:
    LayerNorm without affine on targets."""

    ct: ViT3DConfig | Slices25DConfig | None = None
    ehr: Qwen3Config | None = None
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    distance: Distance = "l2_mean"
    target_norm: bool = False

    def __post_init__(self) -> None:
        if self.ct is None and self.ehr is None:
            raise ValueError("a model needs at least one encoder: set ct or ehr")
        if isinstance(self.ct, ViT3DConfig) and self.ct.channels != 1:
            raise ValueError(f"ct.channels={self.ct.channels} must be 1: the crops of a batch have one window")


@dataclass
class Share:
    """What makes a rank's micro-batch one share of the global batch. counts: int64 [kinds], targets of each kind in the
    global batch; rollouts, tokens: likewise; ranks; parts: micro-batches an optimiser step; key: seed of the step."""

    counts: Tensor
    rollouts: int
    tokens: int
    ranks: int = 1
    parts: int = 1
    key: int = 0


class JEPA(nn.Module):
    """Encode what may be seen, predict what may not, compare with a target that is not pushed."""

    def __init__(self, config: ModelConfig, base: nn.Module | None = None) -> None:
        """base: the language model under the EHR encoder (``mmjepa.model.load_base``), when there is one."""
        super().__init__()
        self.config = config
        self.encoders = nn.ModuleDict()
        if config.ct is not None:
            self.encoders["ct"] = _volume_encoder(config.ct)
        if config.ehr is not None:
            if base is None:
                raise ValueError("the EHR encoder needs a language model: pass base")
            self.encoders["ehr"] = Qwen3Encoder(config.ehr, base)
        widths = {name: encoder.width for name, encoder in self.encoders.items()} | {
            "predictor": config.predictor.latent
        }
        if len(set(widths.values())) > 1:
            raise Refusal(
                "CONFIG_VALUE",
                f"the latent widths differ: {widths}",
                "Set latent of each encoder to model.predictor.latent",
            )
        self.predictor = Predictor(config.predictor)
        self.teacher = Teacher()
        self.kept: dict[str, Tensor] = {}

    def parts(self) -> dict[str, dict[str, nn.Parameter]]:
        """Every parameter in exactly one named part; a phase says which parts learn."""
        parts: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            parts.setdefault(part_of(name), {})[name] = parameter
        return parts

    def online(self) -> dict[str, nn.Parameter]:
        """Encoder parameters by the names that the teacher uses (without ``encoders.``)."""
        return dict(self.encoders.named_parameters())

    def encode(self, views: list[View]) -> Tensor:
        """Online latents [R, D] of all views, in their order."""
        return self._table([self._encode(view) for view in views])

    def _table(self, parts: list[Tensor]) -> Tensor:
        """One table of latents; a row of zeros, which nothing points at, where there is no view at all."""
        return torch.cat(parts) if parts else self.predictor.output.weight.new_zeros(1, self.config.predictor.latent)

    def _encode(self, view: View) -> Tensor:
        kept = self.kept.get(view.encoder)
        if kept is not None and isinstance(view, SequenceView) and view.ids is not None:
            return kept[view.ids]
        return self.encoders[view.encoder](view)

    def targets(self, batch: Batch) -> Tensor | None:
        """Target latents [R', D] without gradient; None where they are the online latents of the same views."""
        if batch.targets is None and self.teacher.kind == "online":
            return None
        views = batch.views if batch.targets is None else batch.targets
        return self._table([self.teacher.encode(self.encoders, view.encoder, view) for view in views])

    def forward(self, batch: Batch, loss: LossConfig, share: Share) -> dict[str, Tensor]:
        """All terms of a micro-batch, unweighted by rank: their mean over ranks and sum over micro-batches is the value
        for the global batch, and ``loss`` is what to differentiate."""
        terms: dict[str, Tensor] = {}
        total = torch.zeros((), device=batch.layout.kind.device)
        if loss.predict or loss.rollout or loss.vicreg or loss.sigreg:
            targets = self.targets(batch)
            latents = self.encode(batch.views)
            targets = latents.detach() if targets is None else targets
            if self.config.target_norm:
                targets = F.layer_norm(targets.float(), targets.shape[-1:])
            if loss.predict or loss.rollout:
                total = total + self._predictions(batch, loss, share, latents, targets, terms)
            total = total + self._regularisers(batch, loss, share, latents, terms)
            with torch.no_grad():
                terms["latent_std"] = latents.float().std(dim=0, correction=0).mean() / share.parts
                terms["latent_norm"] = latents.float().norm(dim=-1).mean() / share.parts
        if loss.next_token:
            terms["next_token"] = self._next_token(batch, share)
            total = total + loss.next_token * terms["next_token"]
        terms["loss"] = total
        return terms

    def _predictions(
        self, batch: Batch, loss: LossConfig, share: Share, latents: Tensor, targets: Tensor, terms: dict[str, Tensor]
    ) -> Tensor:
        slots = gather_slots(latents, batch.layout)
        predicted = self.predictor(slots)
        asked = batch.layout.target >= 0
        distance = latent_distance(predicted[asked], targets[batch.layout.target[asked]], self.config.distance)
        kinds = batch.layout.kind[asked]
        present = share.counts.to(kinds.device)
        # the mean over targets of each kind, then over the kinds that the global batch asks for
        weight = share.ranks / (present[kinds] * (present > 0).sum())
        terms["predict"] = (distance * weight).sum()
        for index, name in enumerate(self.config.predictor.kinds):
            if share.counts[index] > 0 and int((share.counts > 0).sum()) > 1:
                terms[f"predict.{name}"] = (distance * (kinds == index)).sum().detach() * share.ranks / present[index]
        total = loss.predict * terms["predict"]
        if loss.rollout is not None and share.rollouts:
            terms["rollout"] = self._rollout_term(batch, loss.rollout, slots, predicted, targets, share)
            total = total + loss.rollout.weight * terms["rollout"]
        return total

    def _rollout_term(
        self, batch: Batch, loss: RolloutLoss, slots: Slots, predicted: Tensor, targets: Tensor, share: Share
    ) -> Tensor:
        """Sum over steps of the mean over windows of the distance to the target latents (arXiv 2605.10840)."""
        layout = batch.layout
        rows = torch.nonzero(layout.start >= 0)[:, 0]
        current, total = layout.start[rows], predicted.sum() * 0.0
        chain = rollout(self.predictor, slots, layout.start, loss.horizon)[rows] if loss.chained else None
        for step in range(loss.horizon):
            step_prediction = predicted[rows, current] if chain is None else chain[:, step]
            wanted = targets[layout.target[rows, current]]
            total = total + latent_distance(step_prediction, wanted, self.config.distance).sum()
            current = layout.feeds[rows, current]
        return total * share.ranks / share.rollouts

    def _regularisers(
        self, batch: Batch, loss: LossConfig, share: Share, latents: Tensor, terms: dict[str, Tensor]
    ) -> Tensor:
        """Regularisers over the latents in the slots of each kind. Not over the table's rows: a text that stands in
        several slots is one row, and how many rows a rank has would then depend on the ranks."""
        kinds = []
        for index in range(len(self.config.predictor.kinds) if loss.vicreg or loss.sigreg else 0):
            source = batch.layout.source[batch.layout.kind == index]
            kinds.append(latents[source[source >= 0]])
        total = latents.new_zeros(())
        if loss.vicreg is not None:
            terms["vicreg"] = torch.stack([vicreg(z, loss.vicreg) for z in kinds]).sum() / share.parts
            total = total + terms["vicreg"]
        if loss.sigreg is not None:
            terms["sigreg"] = torch.stack([sigreg(z, loss.sigreg, share.key) for z in kinds]).sum() / share.parts
            total = total + loss.sigreg.weight * terms["sigreg"]
        return total

    def _next_token(self, batch: Batch, share: Share) -> Tensor:
        used, first, sums = batch.uses(), 0, []
        for view in batch.views:
            encoder = self.encoders[view.encoder]
            if isinstance(view, SequenceView) and isinstance(encoder, Qwen3Encoder):
                logits, tokens, sequence = encoder.next_token_logits(view)
                sums.append((next_token(logits, tokens) * used[first + sequence]).sum())
            first += view.rows
        if not sums:
            raise ValueError("next_token needs views of token sequences")
        return torch.stack(sums).sum() * share.ranks / max(1, share.tokens)


def _volume_encoder(config: ViT3DConfig | Slices25DConfig) -> nn.Module:
    """The encoder of a config. Raises Refusal ENCODER_ARCHITECTURE for one that keeps running statistics: they mix the
    rows of a batch, and neither a teacher nor a saved model holds them."""
    if isinstance(config, ViT3DConfig):
        return ViT3D(config)
    encoder = Slices25D(config)
    kept = encoder.state_dict().keys() - dict(encoder.named_parameters()).keys()
    if kept:
        raise Refusal(
            "ENCODER_ARCHITECTURE",
            f"the backbone {config.backbone!r} keeps {len(kept)} tensors that are no weights, first {min(kept)}",
            "Name one without batch normalisation, for instance convnext_atto or vit_tiny_patch16_224",
        )
    return encoder


def part_of(name: str) -> str:
    """The part that a parameter belongs to: ``predictor``, ``ct``, ``ehr.base``, ``ehr.adapter`` or ``ehr.front``."""
    if name.startswith("predictor."):
        return "predictor"
    encoder, rest = name.removeprefix("encoders.").split(".", 1)
    if ".lora_" in rest:
        return f"{encoder}.adapter"
    if encoder == "ehr":
        return "ehr.base" if rest.startswith("lm.") else "ehr.front"
    return encoder
