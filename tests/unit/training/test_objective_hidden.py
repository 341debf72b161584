"""FitNets and RKD: what they are blind to, what they see, and that they can be learnt from."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from redraft.errors import ConfigError
from redraft_training.objectives.hidden import MAX_RELATED, FeatureHead, feature_loss, relation_loss
from redraft_training.objectives.loss import loss
from redraft_training.objectives.objective import Objective
from redraft_training.objectives.presets import preset
from tests.unit.training.objective_cases import dense, make_batch, random_logits, random_probs, student


def states(n: int, size: int, seed: int) -> torch.Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed))


def test_feature_loss_is_half_the_squared_error_in_units_of_the_target() -> None:
    target = torch.tensor([[3.0, 4.0], [0.0, 5.0]])  # squared norms 25, 25
    guess = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert feature_loss([guess], [target]).tolist() == pytest.approx([0.0, 0.5])
    assert feature_loss([100 * guess], [100 * target]).tolist() == pytest.approx([0.0, 0.5])
    assert feature_loss([guess, guess], [target, guess + 1.0]).shape == (2,)


def test_feature_head_learns_a_linear_map() -> None:
    torch.manual_seed(0)
    head, own = FeatureHead([6], [4]), states(64, 6, 1)
    target = own @ states(6, 4, 2) + 3.0
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        value = feature_loss(head([own]), [target]).mean()
        value.backward()
        optimizer.step()
    assert value.item() < 1e-3


def test_relations_are_blind_to_scale_rotation_and_size() -> None:
    own = states(10, 5, 3)
    rotation = torch.linalg.qr(states(8, 8, 4)).Q
    larger = 7.0 * torch.nn.functional.pad(own, (0, 3)) @ rotation + 2.0
    assert relation_loss([own], [larger]).item() == pytest.approx(0.0, abs=1e-6)
    assert relation_loss([own], [states(10, 8, 5)]).item() > 0.05


def test_relations_by_hand() -> None:
    """An equilateral and a right-angled isosceles triangle."""
    even = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
    right = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    mean = (2 + math.sqrt(2)) / 3
    distances = [1 - 1 / mean, 1 - 1 / mean, 1 - math.sqrt(2) / mean]
    distance = sum(0.5 * x * x for x in distances) * 2 / 9  # 9 pairs, those with themselves 0
    cosines = [0.5 - 0.0, 0.5 - math.sqrt(0.5), 0.5 - math.sqrt(0.5)]  # at each corner; (i, k) and (k, i)
    angle = sum(0.5 * x * x for x in cosines) * 2 / 27
    assert relation_loss([even], [right]).item() == pytest.approx(distance + 2 * angle, rel=1e-4)


def test_relations_stay_finite_for_equal_states_and_bounded_for_many() -> None:
    own = torch.zeros(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(relation_loss([own], [states(4, 3, 6)]), own)
    assert bool(gradient.isfinite().all())
    many = states(5 * MAX_RELATED, 3, 7).requires_grad_()
    (gradient,) = torch.autograd.grad(relation_loss([many], [states(5 * MAX_RELATED, 3, 8)]), many)
    assert int((gradient.abs().sum(dim=1) > 0).sum()) == MAX_RELATED
    assert relation_loss([own[:2]], [states(2, 3, 9)]).item() == 0.0


@pytest.mark.parametrize("name", ["fitnets", "rkd"])
def test_hidden_states_are_added_with_their_weight(name: str) -> None:
    torch.manual_seed(0)
    logits, probs, own, theirs = random_logits(6, 10), random_probs(6, 11), states(6, 5, 12), states(6, 7, 13)
    own.requires_grad_()
    head, batch = FeatureHead([5], [7]), make_batch([-1] * 6)
    targets = dataclasses.replace(dense(probs, hidden=(theirs,)), known=torch.tensor([True] * 5 + [False]))
    objective = preset(name).model_copy(update={"hidden_weight": 3.0})
    result = loss(student(logits, hidden=(own,)), targets, batch, objective, head=head)
    alone = loss(student(logits), targets, batch, Objective(temperature=1.0))
    hidden = (
        feature_loss(head([own[:5]]), [theirs[:5]]).mean()
        if name == "fitnets"
        else relation_loss([own[:5]], [theirs[:5]])
    )
    torch.testing.assert_close(result.loss, alone.loss + 3.0 * hidden)
    torch.testing.assert_close(result.values, alone.values)
    assert result.metrics[f"{objective.what}_loss"] == pytest.approx(hidden.item())
    result.loss.backward()
    assert own.grad is not None
    assert own.grad[:5].abs().sum() > 0
    assert own.grad[5].abs().sum() == 0
    assert (head.projections[0].weight.grad is not None) == (name == "fitnets")


def test_missing_hidden_states_or_head_are_named() -> None:
    logits, probs, batch = random_logits(3, 14), random_probs(3, 15), make_batch([-1] * 3)
    with pytest.raises(ConfigError, match="re-run the target"):
        loss(student(logits, hidden=(states(3, 4, 0),)), dense(probs), batch, preset("rkd"))
    with pytest.raises(ConfigError, match="FeatureHead"):
        loss(student(logits, hidden=(states(3, 4, 0),)), dense(probs, (states(3, 4, 1),)), batch, preset("fitnets"))
