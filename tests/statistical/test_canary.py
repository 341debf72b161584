"""The canary's error rate when it is looked at after every request, and how soon it notices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.random import Generator

from redraft_server.rollout.canary import CanaryTest, ConfidenceSequence, Verdict

RUNS, LENGTH, LEVEL = 300, 400, 0.05
Draw = Callable[[Generator, int], np.ndarray]


def beta(mean: float, spread: float) -> Draw:
    return lambda random, size: random.beta(mean * spread, (1 - mean) * spread, size)


def greedy_requests(mean: float) -> Draw:
    """At temperature 0 each position is hit or missed; a short request has few positions."""
    return lambda random, size: random.binomial(6, mean, size) / 6


def run(test: CanaryTest, candidate: np.ndarray, active: np.ndarray, per_candidate: int = 1) -> tuple[Verdict, int]:
    """Feed both, `per_candidate` requests of the active draft to one of the candidate; look after each."""
    for index, value in enumerate(candidate):
        for other in active[index * per_candidate : (index + 1) * per_candidate]:
            test.active.add(float(other))
        test.candidate.add(float(value))
        if (verdict := test.verdict()) is not Verdict.UNDECIDED:
            return verdict, index + 1
    return test.verdict(), len(candidate)


def canary(**changes: float | None) -> CanaryTest:
    values: dict[str, float | None] = {"level": LEVEL, "margin": 0.02, "promised": None, "promise_margin": 0.1}
    return CanaryTest(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("draw", [beta(0.5, 8), beta(0.95, 20), greedy_requests(0.4), beta(0.05, 3)])
def test_the_interval_holds_at_all_times_at_once(draw: Draw) -> None:
    random = np.random.default_rng(1)
    truth = float(draw(random, 400_000).mean())
    missed = 0
    for _ in range(RUNS):
        sequence = ConfidenceSequence(LEVEL)
        for value in draw(random, LENGTH):
            sequence.add(float(value))
            low, high = sequence.interval
            if not low <= truth <= high:
                missed += 1
                break
    assert missed <= LEVEL * RUNS + 3 * (LEVEL * RUNS) ** 0.5
    assert high - low < 0.35  # and it says something in the end


@pytest.mark.parametrize("draw", [beta(0.5, 8), greedy_requests(0.4)])
@pytest.mark.parametrize("per_candidate", [1, 9])
def test_a_draft_that_is_as_good_is_not_rolled_back(draw: Draw, per_candidate: int) -> None:
    random = np.random.default_rng(2)
    verdicts = [
        run(canary(margin=0.0), draw(random, 150), draw(random, 150 * per_candidate), per_candidate)[0]
        for _ in range(RUNS // 3)
    ]
    assert sum(verdict.rolls_back for verdict in verdicts) <= LEVEL * len(verdicts) + 3
    assert sum(verdict is Verdict.BETTER for verdict in verdicts) <= LEVEL * len(verdicts) + 3


def test_a_degraded_draft_is_noticed_soon() -> None:
    random = np.random.default_rng(3)
    for drop, within in ((0.5, 35), (0.3, 90)):
        results = [run(canary(), beta(0.6 - drop, 8)(random, 400), beta(0.6, 8)(random, 3600), 9) for _ in range(40)]
        assert {verdict for verdict, _ in results} == {Verdict.WORSE}
        assert float(np.mean([count for _, count in results])) < within


def test_a_better_draft_is_promoted_and_one_just_as_good_in_the_end() -> None:
    random = np.random.default_rng(4)
    verdict, count = run(canary(margin=0.0), beta(0.8, 10)(random, 1000), beta(0.6, 10)(random, 9000), 9)
    assert verdict is Verdict.BETTER
    assert count < 200
    verdict, _ = run(canary(margin=0.05), beta(0.6, 20)(random, 4000), beta(0.6, 20)(random, 4000))
    assert verdict is Verdict.AS_GOOD


def test_a_broken_promise_counts_only_against_one_that_is_not_better() -> None:
    random = np.random.default_rng(5)
    low, lower = beta(0.4, 10)(random, 600), beta(0.2, 10)(random, 600)
    assert run(canary(promised=0.9), low, low[::-1])[0] is Verdict.BROKEN_PROMISE
    # traffic has drifted away from what both were measured on: the new one is still the one to have
    drifted = canary(promised=0.55, margin=0.0)
    assert run(drifted, low, lower)[0] is Verdict.BETTER


def test_at_the_end_the_means_decide_if_there_is_anything_to_go_by() -> None:
    test = canary()
    for value in (0.4, 0.6, 0.5):
        test.candidate.add(value)
        test.active.add(value)
    assert test.verdict_at_end() is Verdict.UNDECIDED
    for value in [0.4, 0.6] * 5:
        test.candidate.add(value)
        test.active.add(value)
    assert test.verdict() is Verdict.UNDECIDED
    assert test.verdict_at_end() is Verdict.AS_GOOD
    for value in [0.2] * 5:
        test.candidate.add(value)
    assert test.verdict_at_end() is Verdict.WORSE


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
def test_numbers_outside_the_bounds_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        ConfidenceSequence(0.05).add(value)


def test_without_numbers_nothing_is_known() -> None:
    assert ConfidenceSequence(0.05).interval == (0.0, 1.0)
    assert canary().verdict_at_end() is Verdict.UNDECIDED
