"""Drafting is closed by its losses, and a trial costs what was budgeted for it."""

from __future__ import annotations

import pytest

from redraft.speculation.ledger import Ledger


def run(ledger: Ledger, steps: int, cost: float, gain: float, *, is_promising: bool) -> int:
    """Steps that drafted, of so many; plain ones take a second."""
    drafted = 0
    for _ in range(steps):
        if ledger.is_open(1.0, is_promising=is_promising):
            drafted += 1
            ledger.charge(cost)
            ledger.credit(gain)
    return drafted


def test_what_pays_stays_open() -> None:
    assert run(Ledger(), 1000, 0.4, 0.5, is_promising=True) == 1000


def test_earlier_gains_are_no_cushion() -> None:
    ledger = Ledger()
    assert run(ledger, 1000, 0.4, 2.0, is_promising=True) == 1000
    assert run(ledger, 1000, 0.4, 0.0, is_promising=True) < 100


def test_one_bad_step_among_good_ones_is_forgiven() -> None:
    ledger = Ledger()
    for _ in range(50):
        assert run(ledger, 1, 6.0, 0.0, is_promising=True) == 1
        assert run(ledger, 30, 0.3, 0.6, is_promising=True) == 30


@pytest.mark.parametrize("is_promising", [False, True])
@pytest.mark.parametrize("cost", [0.05, 0.3, 1.0, 5.0])
def test_a_lasting_loss_costs_a_fiftieth(is_promising: bool, cost: float) -> None:
    steps = 50_000
    drafted = run(Ledger(), steps, cost, 0.0, is_promising=is_promising)
    assert drafted > 0
    assert cost * drafted < 0.021 * steps + 50


def test_without_a_promise_it_waits_first() -> None:
    ledger = Ledger()
    assert run(ledger, 29, 0.1, 0.0, is_promising=False) == 0
    assert run(ledger, 1, 0.1, 0.0, is_promising=True) == 1, "a promise opens at once"
    assert run(ledger, 300, 0.1, 0.0, is_promising=False) >= 9, "else a step in thirty is a trial"


def test_nothing_is_closed_before_a_plain_step_is_known() -> None:
    ledger = Ledger()
    for _ in range(100):
        assert ledger.is_open(0.0, is_promising=True)
        ledger.charge(1.0)
