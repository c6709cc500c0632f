"""The predictor sees what the hours allow, and nothing else."""

import dataclasses

import pytest
import torch

from mmjepa.batch import Layout
from mmjepa.predictor import Predictor, PredictorConfig, Slots, attention_mask, gather_slots

HOURS = 5


def trajectory(rows=2, hours=HOURS, pads=0):
    """Layout [d, s1, a1, ..., sT, aT], then padding; latent table of as many rows as there are real slots."""
    slots = 2 * hours + 1
    layout = Layout.empty(rows, slots + pads)
    s, a = torch.arange(1, slots, 2), torch.arange(2, slots, 2)
    layout.kind[:, 0], layout.kind[:, s], layout.kind[:, a] = 2, 0, 1
    layout.source[:, :slots] = torch.arange(rows * slots).reshape(rows, slots)
    layout.hour[:, s] = layout.hour[:, a] = torch.arange(1, hours + 1)
    layout.position = torch.arange(slots + pads).expand(rows, -1).clone()
    return layout


def table(layout, seed=0):
    return torch.randn(int(layout.source.max()) + 1, 6, generator=torch.Generator().manual_seed(seed))


def predictor(**settings):
    torch.manual_seed(3)
    settings = {"latent": 6, "width": 12, "depth": 2, "heads": 2, "ffn": 16, "positions": 20} | settings
    made = Predictor(PredictorConfig(**settings)).eval()
    for name, parameter in made.named_parameters():  # so that nothing is hidden behind a zero
        if parameter.ndim < 2 or name.startswith(("query", "output")):
            torch.nn.init.normal_(parameter, std=0.5)
    return made


@pytest.mark.parametrize(("latent", "positions"), [(4096, 149), (64, 149), (1, 149)])
def test_the_published_size_has_4097_h_and_75732992_parameters(latent, positions):
    with torch.device("meta"):
        made = Predictor(PredictorConfig(latent=latent, width=1024, depth=6, heads=8, ffn=4096, positions=positions))
    count = sum(p.numel() for p in made.parameters())
    assert count == 4097 * latent + 75_732_992
    assert latent != 4096 or count == 92_514_304


@torch.no_grad()
@pytest.mark.parametrize("mode", ["absolute", "residual"])
def test_what_comes_later_leaves_earlier_outputs_bit_identical(mode):
    model, layout = predictor(mode=mode), trajectory()
    latents = table(layout)
    before = model(gather_slots(latents, layout))
    for k in range(HOURS):  # change every latent of hour >= k + 1
        changed = latents.clone()
        changed[layout.source[layout.hour >= k + 1]] = 100.0
        after = model(gather_slots(changed, layout))
        assert torch.equal(after[:, : 2 * k + 1], before[:, : 2 * k + 1]), k
        assert not torch.equal(after[:, 2 * k + 1 :], before[:, 2 * k + 1 :]), k


@torch.no_grad()
def test_a_state_and_its_action_see_each_other_and_the_static_slot_sees_only_itself():
    model, layout = predictor(depth=1), trajectory(rows=1)
    latents = table(layout)
    before = model(gather_slots(latents, layout))[0]
    hour = layout.hour[0]
    for slot in range(2 * HOURS + 1):
        changed = latents.clone()
        changed[slot] += 1
        moved = (model(gather_slots(changed, layout))[0] != before).any(dim=1)
        assert moved.tolist() == (hour >= hour[slot]).tolist(), slot


@torch.no_grad()
def test_padding_changes_nothing():
    model, layout, padded = predictor(), trajectory(), trajectory(pads=4)
    latents = table(layout)
    expected = model(gather_slots(latents, layout))
    got = model(gather_slots(latents, padded))[:, : 2 * HOURS + 1]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    noisy = gather_slots(latents, padded)
    noisy.latent[:, 2 * HOURS + 1 :] = 1e3
    assert torch.equal(model(noisy)[:, : 2 * HOURS + 1], got)


@torch.no_grad()
def test_a_row_is_predicted_alike_alone_and_in_company():
    model, layout = predictor(), trajectory(rows=3)
    latents = table(layout)
    together = model(gather_slots(latents, layout))
    for row in range(3):
        fields = {f.name: getattr(layout, f.name)[row : row + 1] for f in dataclasses.fields(layout)}
        one = model(gather_slots(latents, Layout(**fields)))
        torch.testing.assert_close(one[0], together[row], atol=1e-5, rtol=0)


def cells(queries):
    """Two context cells and some queries, each (kind, days)."""
    layout = Layout.empty(1, 2 + len(queries))
    layout.kind[0, :2], layout.source[0, :2] = torch.tensor([0, 1]), torch.tensor([0, 1])
    layout.time[0, :2] = torch.tensor([-200.0, 0.0])
    for slot, (kind, days) in enumerate(queries, start=2):
        layout.kind[0, slot], layout.time[0, slot], layout.target[0, slot] = kind, days, slot - 2
    return layout


@torch.no_grad()
def test_queries_are_answered_jointly_as_singly():
    model = predictor(kinds=("ct", "ehr"), position="continuous", queries=True)
    latents, asked = table(cells([])), [(0, 30.0), (1, 30.0), (1, -90.0), (0, 400.0)]
    together = model(gather_slots(latents, cells(asked)))[0, 2:]
    singly = torch.cat([model(gather_slots(latents, cells([one])))[0, 2:] for one in asked])
    torch.testing.assert_close(together, singly, atol=1e-5, rtol=0)
    assert float(torch.cdist(together, together)[~torch.eye(4, dtype=torch.bool)].min()) > 1e-4
    context = model(gather_slots(latents, cells(asked)))[0, :2]
    torch.testing.assert_close(context, model(gather_slots(latents, cells([])))[0], atol=1e-5, rtol=0)


def test_the_mask_never_leaves_a_slot_blind():
    layout = trajectory(rows=1, pads=3)
    allow = attention_mask(layout)[0, 0]
    assert allow.any(dim=1).all()
    assert not allow[: 2 * HOURS + 1, 2 * HOURS + 1 :].any()


@pytest.mark.parametrize(
    "settings",
    [{}, {"mode": "residual"}, {"kinds": ("state", "action", "static"), "position": "continuous", "queries": True}],
)
def test_no_parameter_is_without_a_gradient_over_a_mixed_batch(settings):
    model, layout = predictor(**settings), trajectory(pads=2)
    if settings.get("queries"):
        for slot in range(3):  # the last slot of every kind becomes a query
            places = torch.nonzero(layout.kind[0] == slot)[:, 0]
            layout.source[1, places[-1]] = -1
    latents = table(trajectory())
    model(gather_slots(latents, layout))[layout.kind >= 0].square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@torch.no_grad()
def test_residual_mode_adds_the_slot_s_own_latent():
    layout = trajectory()
    latents = table(layout)
    slots = gather_slots(latents, layout)
    torch.testing.assert_close(predictor(mode="residual")(slots), predictor()(slots) + slots.latent)


@torch.no_grad()
def test_noise_and_dropout_act_in_training_alone():
    layout = trajectory()
    slots = gather_slots(table(layout), layout)
    quiet, noisy = (
        predictor(dropout=0.0, attention_dropout=0.0),
        predictor(dropout=0.0, attention_dropout=0.0, noise=0.1),
    )
    assert torch.equal(noisy(slots), quiet(slots))
    assert not torch.equal(noisy.train()(slots), quiet(slots))
    assert torch.equal(quiet.train()(slots), quiet.eval()(slots))
    dropping = predictor(dropout=0.2)
    assert not torch.equal(dropping.train()(slots), dropping.eval()(slots))


@torch.no_grad()
def test_every_kind_has_a_projection_of_its_own():
    model, layout = predictor(), trajectory(rows=1)
    latents = table(layout)
    before = model(gather_slots(latents, layout))
    for kind in range(3):
        other = trajectory(rows=1)
        other.kind[0, 1] = kind
        same = torch.equal(model(gather_slots(latents, other)), before)
        assert same == (kind == 0)


def test_impossible_settings_are_errors():
    with pytest.raises(ValueError, match="multiple of heads"):
        PredictorConfig(width=10, heads=4)
    with pytest.raises(ValueError, match="absolute"):
        PredictorConfig(queries=True, mode="residual")


def test_a_gathered_slot_holds_its_row_and_queries_hold_zeros():
    layout = cells([(0, 1.0)])
    slots = gather_slots(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), layout)
    assert isinstance(slots, Slots)
    assert slots.latent.tolist() == [[[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]]


def test_the_predictor_computes_in_float32_under_autocast():
    model = Predictor(PredictorConfig(latent=8, width=8, depth=1, heads=2, ffn=8, positions=9)).eval()
    torch.nn.init.normal_(model.output.weight)
    layout = Layout.empty(1, 3)
    layout.kind[0], layout.source[0], layout.hour[0] = torch.tensor([0, 1, 0]), torch.arange(3), torch.tensor([0, 0, 1])
    slots = gather_slots(torch.randn(3, 8), layout)
    with torch.autocast("cpu", torch.bfloat16):
        inside = model(slots)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, model(slots))
