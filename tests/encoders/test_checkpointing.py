"""Recomputing activations changes what is kept, and nothing else."""

import pytest
import torch
from torch import Tensor

from mmjepa.batch import SequenceView
from mmjepa.encoders.qwen3 import LoRAConfig, Qwen3Config, Qwen3Encoder, make_base


def encoder(*, checkpointing: bool, adapter: LoRAConfig | None) -> Qwen3Encoder:
    torch.manual_seed(0)
    made = Qwen3Encoder(Qwen3Config(adapter=adapter, pack=16, checkpointing=checkpointing), make_base({}, 50))
    for name, parameter in made.named_parameters():
        if adapter is not None:
            parameter.requires_grad_(".lora_" in name)
        if ".lora_B" in name:  # starts at zero, which would hide a wrong gradient of lora_A
            torch.nn.init.normal_(parameter, std=0.1)
    return made.train()


def view() -> SequenceView:
    tokens = torch.randint(0, 50, (25,), generator=torch.Generator().manual_seed(1))
    return SequenceView("ehr", tokens, torch.tensor([0, 9, 12, 25]))


def gradients(made: Qwen3Encoder) -> tuple[Tensor, dict[str, Tensor], int]:
    """Latents, gradients by name, and the bytes that autograd kept for the backward pass."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        latents = made(view())
        forward = kept
        latents.square().sum().backward()
    return latents.detach(), {n: p.grad for n, p in made.named_parameters() if p.grad is not None}, forward


@pytest.mark.parametrize("adapter", [LoRAConfig(rank=2, alpha=4), None], ids=["adapter", "base"])
def test_gradients_are_the_same_bits_and_less_is_kept(adapter):
    latents, plain, kept = gradients(encoder(checkpointing=False, adapter=adapter))
    again, recomputed, kept_again = gradients(encoder(checkpointing=True, adapter=adapter))
    assert torch.equal(latents, again)
    assert plain
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert any(bool(gradient.any()) for name, gradient in plain.items() if "lora_A" in name or adapter is None)
    assert kept_again < kept / 2


def test_a_frozen_base_gets_no_gradient():
    made = encoder(checkpointing=True, adapter=LoRAConfig(rank=2, alpha=4))
    _, recomputed, _ = gradients(made)
    assert recomputed.keys() == made.adapter_parameters().keys()
