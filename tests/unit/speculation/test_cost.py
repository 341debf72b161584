"""Step costs: what is believed of a pass's time by what passes took."""

from __future__ import annotations

import math

import pytest

from redraft.speculation.cost import StepCost
from tests.step_costs import cost


def test_step_cost_interpolates_and_extrapolates() -> None:
    costs = cost(_2=1.0, _4=3.0, _8=4.0)
    assert costs.estimate(1) == 1.0, "below the smallest: as the smallest"
    assert costs.estimate(2) == 1.0
    assert costs.estimate(3) == pytest.approx(2.0)
    assert costs.estimate(6) == pytest.approx(3.5)
    assert costs.estimate(16) == pytest.approx(8.0), "beyond the largest: proportional"
    assert StepCost().estimate(5) == 0.0


def test_step_cost_is_a_moving_average() -> None:
    costs = cost(_4=1.0)
    costs.observe(4, 2.0)
    assert costs.estimate(4) == pytest.approx(1.1)
    for _ in range(100):
        costs.observe(4, 2.0)
    assert costs.estimate(4) == pytest.approx(2.0, rel=1e-3)


def test_a_change_of_the_machine_s_speed_reaches_sizes_that_are_not_tried() -> None:
    """Otherwise the size in use would look dear beside the others whenever a neighbour takes a core."""
    costs = cost(_1=1.0, _2=1.1, _4=1.4)
    for _ in range(200):
        costs.observe(4, 2.8)
    assert costs.estimate(4) == pytest.approx(2.8, rel=1e-2)
    assert costs.estimate(1) == pytest.approx(2.0, rel=0.2)
    assert costs.estimate(2) / costs.estimate(1) == pytest.approx(1.1)


def test_one_preempted_step_does_not_rule_a_size_out() -> None:
    costs = cost(_1=1.0, _2=1.1)
    costs.observe(2, 50.0)
    assert costs.estimate(2) < 1.25
    assert costs.estimate(2) / costs.estimate(1) < 1.13


def test_a_pass_is_never_believed_to_be_dearer_than_one_of_more_tokens() -> None:
    costs = cost(_1=1.0, _2=3.0, _4=1.5)
    assert costs.estimate(2) == costs.estimate(4) == 1.5
    assert costs.estimate(1) == 1.0
    for _ in range(300):
        costs.observe(4, 6.0)
        costs.observe(2, 3.0)
    assert costs.estimate(2) == pytest.approx(3.0, rel=0.05), "what was seen of it is not lost"


def test_passes_of_a_few_tokens_more_do_not_make_twice_as_many_look_cheap() -> None:
    costs = cost(_8=1.0, _16=2.0)
    for _ in range(100):
        costs.observe(9, 1.05)
    assert costs.estimate(9) == pytest.approx(1.05, rel=1e-2)
    assert costs.estimate(16) == pytest.approx(2.0, rel=0.1)


def test_large_steps_share_a_size_class() -> None:
    costs = StepCost()
    for size in (33, 40, 64):
        costs.observe(size, 1.0)
    assert costs.estimate(64) == 1.0
    assert math.isclose(costs.estimate(128), 2.0)
