"""Several ranks are one: the loss and the gradient of a global batch do not depend on how many processes share it."""

import json

import pytest
import torch


@pytest.fixture(scope="module")
def one_rank(toy, tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "one.json"
    toy.losses_and_gradients(path)
    return json.loads(path.read_text())


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_with_unequal_rows_give_the_loss_and_gradient_of_one(ranks, one_rank, toy, run_toy, tmp_path):
    run_toy(ranks, "losses", tmp_path / "many.json")
    many = json.loads((tmp_path / "many.json").read_text())
    assert many.keys() == one_rank.keys() == toy.LOSSES.keys()
    for name, alone in one_rank.items():
        expected, got = torch.tensor(alone["gradient"]), torch.tensor(many[name]["gradient"])
        assert expected.norm() > 1e-3, name
        assert many[name]["loss"] == pytest.approx(alone["loss"], rel=1e-5), name
        assert float((got - expected).norm() / expected.norm()) < 1e-5, name


def test_every_objective_pushes_beyond_the_prediction_term(one_rank):
    """Otherwise the test above would hold for a regulariser that is silently off."""
    plain = torch.tensor(one_rank["predict"]["gradient"])
    for name in ("chained", "forced", "vicreg", "two_sided", "sigreg", "sigreg_paper"):
        assert one_rank[name]["loss"] != one_rank["predict"]["loss"], name
        assert (torch.tensor(one_rank[name]["gradient"]) - plain).norm() > 1e-4 * plain.norm(), name
