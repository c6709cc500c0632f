"""The one rollout, against oracles that can be worked out by hand."""

import pytest
import torch

from mmjepa.batch import Layout
from mmjepa.predictor import Predictor, PredictorConfig, gather_slots
from mmjepa.rollout import rollout

HOURS = 5


def layout_of(rows=2, hours=HOURS):
    """[s1, a1, ..., sT, aT]; a state feeds the next."""
    layout = Layout.empty(rows, 2 * hours)
    s, a = torch.arange(0, 2 * hours, 2), torch.arange(1, 2 * hours, 2)
    layout.kind[:, s], layout.kind[:, a] = 0, 1
    layout.source = torch.arange(rows * 2 * hours).reshape(rows, -1)
    layout.hour[:, s] = layout.hour[:, a] = torch.arange(hours)
    layout.position = torch.arange(2 * hours).expand(rows, -1).clone()
    layout.feeds[:, s[:-1]] = s[1:]
    return layout


def slots_of(rows=2, width=3, seed=0):
    layout = layout_of(rows)
    latents = torch.randn(rows * 2 * HOURS, width, generator=torch.Generator().manual_seed(seed))
    return gather_slots(latents, layout)


def real(width=3, dropout=0.0):
    torch.manual_seed(0)
    config = PredictorConfig(
        kinds=("state", "action"),
        latent=width,
        width=8,
        depth=2,
        heads=2,
        ffn=16,
        positions=12,
        dropout=dropout,
        attention_dropout=dropout,
    )
    model = Predictor(config)
    torch.nn.init.normal_(model.output.weight, std=0.5)
    return model


def test_an_identity_predictor_repeats_the_last_known_state():
    slots, start = slots_of(), torch.tensor([0, 4])
    states = rollout(lambda s: s.latent, slots, start, 2)
    for row in range(2):
        assert torch.equal(states[row], slots.latent[row, start[row]].expand(2, -1))


def test_a_constant_predictor_says_the_constant():
    states = rollout(lambda s: torch.full_like(s.latent, 7.0), slots_of(), torch.tensor([2, 2]), 3)
    assert torch.equal(states, torch.full((2, 3, 3), 7.0))


def test_three_steps_by_hand():
    """next = 2 * state + action: 1 -> 2 + 10 -> 24 + 20 -> 88 + 30; the recorded later states are nonsense."""
    layout = layout_of(rows=1)
    slots = gather_slots(torch.tensor([[1.0], [10], [-5], [20], [-6], [30], [-7], [40], [-8], [50]]), layout)

    def step(s):
        out = torch.zeros_like(s.latent)
        out[:, 0::2] = 2 * s.latent[:, 0::2] + s.latent[:, 1::2]
        return out

    assert rollout(step, slots, torch.tensor([0]), 3)[0, :, 0].tolist() == [12.0, 44.0, 118.0]
    assert rollout(step, slots, torch.tensor([2]), 2)[0, :, 0].tolist() == [10.0, 50.0]


@torch.no_grad()
def test_states_after_the_start_are_never_read_and_actions_are():
    model, slots, start = real(), slots_of(), torch.tensor([2, 4])
    before = rollout(model, slots, start, 2)
    later = slots.latent.clone()
    for row in range(2):
        later[row, start[row] + 2 :: 2] = torch.randn_like(later[row, start[row] + 2 :: 2])
    assert torch.equal(rollout(model, gather_like(slots, later), start, 2), before)
    later[0, start[0] + 3] += 1  # the action of the next hour
    changed = rollout(model, gather_like(slots, later), start, 2)
    assert torch.equal(changed[:, 0], before[:, 0])
    assert not torch.equal(changed[0, 1], before[0, 1])
    assert torch.equal(changed[1], before[1])


def gather_like(slots, latent):
    return gather_slots(latent.flatten(0, 1), slots.layout)


@torch.no_grad()
def test_the_first_step_is_the_teacher_forced_output_and_the_slots_stay_as_they_are():
    model, slots, start = real(), slots_of(), torch.tensor([2, 6])
    kept = slots.latent.clone()
    states = rollout(model, slots, start, 2)
    torch.testing.assert_close(states[:, 0], model(slots)[torch.arange(2), start])
    assert torch.equal(slots.latent, kept)


def test_the_gradient_runs_through_the_chain():
    model, slots = real(), slots_of()
    slots.latent.requires_grad_()
    rollout(model, slots, torch.tensor([0, 2]), 3)[:, 2].square().sum().backward()
    gradient = slots.latent.grad
    assert gradient[0, 0].any()  # the last known state moves the third step, only through the fed-back ones
    assert not gradient[0, 2::2].any()
    assert not gradient[1, 4::2].any()
    torch.manual_seed(0)
    direct = torch.autograd.functional.jacobian(
        lambda x: rollout(lambda s: 3 * s.latent, gather_like(slots, x), torch.tensor([0, 0]), 3)[0, 2, 0],
        slots.latent.detach(),
    )
    assert float(direct[0, 0, 0]) == pytest.approx(27.0)


@torch.no_grad()
def test_rows_that_do_not_roll_and_steps_past_the_end_are_nan():
    states = rollout(real(), slots_of(3), torch.tensor([-1, 2 * HOURS - 4, 2 * HOURS - 2]), 3)
    assert states[0].isnan().all()
    assert states[1, 0].isfinite().all()
    assert states[1, 1:].isnan().all()
    assert states[2].isnan().all()


@torch.no_grad()
def test_a_row_rolls_alike_whatever_the_others_do():
    model, slots = real(), slots_of(2)
    alone = rollout(model, slots, torch.tensor([2, -1]), 3)
    together = rollout(model, slots, torch.tensor([2, 8]), 3)
    assert torch.equal(alone[0], together[0])


def test_dead_rows_give_no_nan_to_the_gradient():
    model, slots = real(), slots_of(2)
    states = rollout(model, slots, torch.tensor([2, -1]), 2)
    states[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
