"""The EHR encoder reads packed sequences exactly as it reads each alone."""

import dataclasses

import pytest
import torch

from mmjepa.batch import SequenceView
from mmjepa.encoders.qwen3 import LoRAConfig, Qwen3Config, Qwen3Encoder, make_base
from mmjepa.refusal import Refusal

TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def encoder(**settings):
    torch.manual_seed(0)
    made = Qwen3Encoder(Qwen3Config(**settings), make_base(TINY, 30)).eval()
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def view_of(lengths, *, joint=False, seed=1):
    rng = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    view = SequenceView(
        "ehr",
        tokens=torch.randint(0, 30, (total,), generator=rng),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
    )
    if joint:
        has = torch.rand(total, generator=rng) < 0.6
        days = -100 * torch.rand(total, generator=rng)
        view = dataclasses.replace(view, values=torch.randn(total, generator=rng), has_value=has, days=days)
    return view


def alone(view, index):
    """The view of one of its sequences."""
    span = slice(int(view.offsets[index]), int(view.offsets[index + 1]))
    fields = {
        name: getattr(view, name)[span]
        for name in ("tokens", "values", "has_value", "days")
        if getattr(view, name) is not None
    }
    return dataclasses.replace(view, **fields, offsets=torch.tensor([0, span.stop - span.start]))


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("pack", [8, 20, 512])
def test_packed_sequences_are_encoded_as_each_alone(joint, pool, pack):
    lengths = [1, 7, 3, 19, 1, 12, 5]
    model = encoder(values=joint, pack=pack, pool=pool, latent=6, adapter=LoRAConfig(rank=2))
    view = view_of(lengths, joint=joint)
    with torch.no_grad():
        together = model(view)
        singles = torch.cat([model(alone(view, i)) for i in range(len(lengths))])
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, singles, atol=1e-5, rtol=0)
    assert float((together[0] - together[4]).abs().max()) > 1e-3 or view.tokens[0] == view.tokens[31]


@torch.no_grad()
def test_equal_texts_encoded_once_and_looked_up_are_those_encoded_each():
    model, view = encoder(), view_of([5, 9, 3])
    source = torch.tensor([2, 0, 0, 1, 2, 0])
    every = [alone(view, i) for i in source.tolist()]
    sizes = [0, *(len(one.tokens) for one in every)]
    repeated = dataclasses.replace(
        view, tokens=torch.cat([one.tokens for one in every]), offsets=torch.tensor(sizes).cumsum(0)
    )
    torch.testing.assert_close(model(view)[source], model(repeated), atol=1e-5, rtol=0)


def test_gradients_of_a_packed_batch_are_the_sum_of_those_of_each_alone():
    model, view = encoder(pack=16, adapter=None), view_of([5, 70, 3, 61, 66])
    weights = torch.randn(5, model.width, generator=torch.Generator().manual_seed(2))
    (model(view) * weights).sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for i in range(5):
        (model(alone(view, i)) * weights[i : i + 1]).sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(packed[name], p.grad, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_token_sees_no_later_token_and_no_other_sequence():
    model, view = encoder(pack=64), view_of([5, 6, 4])
    before = model.hidden_states(view)
    changed = dataclasses.replace(view, tokens=view.tokens.clone())
    changed.tokens[8] = (view.tokens[8] + 1) % 30  # the fourth token of the second sequence
    after = model.hidden_states(changed)
    moved = (after - before).abs().amax(dim=1) > 0
    assert moved.tolist() == [False] * 8 + [True] * 3 + [False] * 4


@torch.no_grad()
def test_value_and_time_are_read_and_a_value_that_is_not_there_is_not():
    model, view = encoder(values=True), view_of([4], joint=True)
    view.has_value = torch.tensor([True, True, False, True])
    base = model(view)
    for name, place, seen in (("values", 1, True), ("values", 2, False), ("days", 0, True)):
        changed = dataclasses.replace(view, **{name: getattr(view, name).clone()})
        getattr(changed, name)[place] += 5
        assert bool((model(changed) != base).any()) == seen, (name, place)


def test_an_empty_sequence_is_an_error():
    with pytest.raises(ValueError, match="without tokens"):
        encoder()(view_of([2, 0, 1]))


@torch.no_grad()
def test_next_tokens_are_the_following_tokens_of_the_same_sequence():
    model, view = encoder(), view_of([3, 1, 4])
    logits, tokens, sequence = model.next_token_logits(view)
    assert sequence.tolist() == [0, 0, 2, 2, 2]
    assert tokens.tolist() == [view.tokens[i].item() for i in (1, 2, 5, 6, 7)]
    expected = model.lm(input_ids=view.tokens[None, 4:8], use_cache=False).logits[0, :3]
    torch.testing.assert_close(logits[2:], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"adapter": LoRAConfig(rank=2)}, {"values": True, "latent": 6}])
def test_a_bfloat16_base_encodes_without_autocast(settings):
    torch.manual_seed(0)
    model = Qwen3Encoder(Qwen3Config(dtype="bfloat16", **settings), make_base(TINY, 30).bfloat16())
    latents = model(view_of([2, 5], joint="values" in settings))
    assert latents.dtype == torch.float32
    assert latents.isfinite().all()


def test_the_published_adapter_has_15335424_parameters():
    published = {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    }
    with torch.device("meta"):
        model = Qwen3Encoder(Qwen3Config(adapter=LoRAConfig()), make_base(published, 151936))
    adapter, base = model.adapter_parameters(), model.base_parameters()
    assert sum(p.numel() for p in adapter.values()) == 15_335_424
    assert sum(p.numel() for p in base.values()) == 8_190_735_360
    assert not adapter.keys() & base.keys()
    assert len(adapter) + len(base) == len(list(model.parameters()))


def test_a_missing_or_impossible_language_model_is_refused(tmp_path):
    from mmjepa.model import load_base

    with pytest.raises(Refusal) as missing:
        load_base(tmp_path / "nothing")
    assert missing.value.code == "ENCODER_MISSING"
    for impossible in ({"hidden_size": "wide"}, {"num_attention_heads": 0}, {"num_key_value_heads": 0}):
        with pytest.raises(Refusal) as wrong:
            make_base(impossible, 10)
        assert wrong.value.code == "ENCODER_ARCHITECTURE"
