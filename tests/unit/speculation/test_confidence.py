"""What the draft's sureness is worth, learnt from verdicts."""

from __future__ import annotations

import pytest

from redraft.speculation.confidence import Confidence


def test_nothing_learnt_yet_means_the_draft_is_taken_at_its_word() -> None:
    confidence = Confidence()
    for sure in (0.0, 0.01, 0.5, 0.97, 1.0):
        assert confidence.rate(sure, greedy=True) == confidence.rate(sure, greedy=False) == pytest.approx(sure)


def test_verdicts_move_it_for_that_sureness_and_kind_of_request_only() -> None:
    confidence = Confidence()
    for _ in range(200):
        confidence.observe([0.92], 0, greedy=True)
        confidence.observe([0.32], 1, greedy=False)
    assert confidence.rate(0.93, greedy=True) < 0.1
    assert confidence.rate(0.93, greedy=False) == pytest.approx(0.93)
    assert confidence.rate(0.33, greedy=False) > 0.9
    assert confidence.rate(0.33, greedy=True) == pytest.approx(0.33)
    assert confidence.rate(0.5, greedy=True) == pytest.approx(0.5)


def test_what_lies_behind_a_rejected_token_says_nothing() -> None:
    confidence = Confidence()
    for _ in range(200):
        confidence.observe([0.9, 0.6, 0.3], 1, greedy=True)
    assert confidence.rate(0.9, greedy=True) > 0.95
    assert confidence.rate(0.6, greedy=True) < 0.1
    assert confidence.rate(0.3, greedy=True) == pytest.approx(0.3)


def test_what_was_learnt_long_ago_gives_way() -> None:
    """Else a sureness that had bad luck would never be drafted at again."""
    confidence = Confidence()
    for _ in range(100):
        confidence.observe([0.7], 0, greedy=True)
    low = confidence.rate(0.7, greedy=True)
    for _ in range(10_000):
        confidence.observe([0.1], 0, greedy=True)
    assert low < 0.1
    assert confidence.rate(0.7, greedy=True) == pytest.approx(0.7, abs=0.01)


def test_what_positions_bring_beyond_a_price() -> None:
    """A quarter of the positions are sure ones, and nine in ten of those are accepted; of the others none is."""
    confidence = Confidence()
    assert confidence.surplus(0.9) == 1.0  # nothing seen: try
    for index in range(2000):
        confidence.see(0.95 if index % 4 == 0 else 0.05, greedy=True)
        confidence.observe([0.95 if index % 2 else 0.05], int(index % 2 and index % 20 != 1), greedy=True)
    for price, surplus in ((0.0, 0.25 * 0.9), (0.5, 0.25 * 0.4), (0.95, 0.0)):
        assert confidence.surplus(price) == pytest.approx(surplus, abs=0.02)


def test_positions_seen_long_ago_give_way() -> None:
    confidence = Confidence()
    for _ in range(1000):
        confidence.see(0.95, greedy=True)
    for _ in range(5000):  # far enough for the weights to be scaled down on the way
        confidence.see(0.05, greedy=False)
    assert confidence.surplus(0.5) < 1e-6
