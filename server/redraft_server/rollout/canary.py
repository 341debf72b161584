"""Is the candidate as good as the draft in service? A test that may be looked at after every request.

Each completion gives a number in [0, 1]: its mean expected acceptance. A *confidence sequence* is an interval for the
mean that holds at all times at once with probability 1 - level, so stopping as soon as it says something is allowed;
a fixed-size test looked at again and again would cry wolf sooner or later. Used here: the predictable plug-in
empirical-Bernstein sequence (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", 2024,
Theorem 2). It assumes nothing of the numbers but the bounds; its width shrinks with their variance.

Both drafts serve at the same time, on requests shared out by a hash, so a drift of the traffic hits both alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

_MAX_BET = 0.75
MIN_SAMPLES = 8
"""Of the candidate, before a time-out can decide by the means alone."""


@dataclass(slots=True)
class ConfidenceSequence:
    """An interval for the mean of numbers in [0, 1], valid at all times with probability 1 - level."""

    level: float
    count: int = 0
    _sum: float = 0.0
    _squares: float = 0.0  # of the distances from the mean known at the time, estimates the variance
    _weight: float = 0.0  # Σ λ
    _weighted: float = 0.0  # Σ λ x
    _penalty: float = 0.0  # Σ v ψ(λ)

    def add(self, value: float) -> None:
        """Take one more number, 0 <= value <= 1."""
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{value} is not between 0 and 1")
        mean = (0.5 + self._sum) / (self.count + 1)
        variance = (0.25 + self._squares) / (self.count + 1)
        now = self.count + 1
        bet = min(_MAX_BET, math.sqrt(2.0 * math.log(2.0 / self.level) / (variance * now * math.log(1.0 + now))))
        self._weight += bet
        self._weighted += bet * value
        self._penalty += (value - mean) ** 2 * (-math.log1p(-bet) - bet)
        self.count = now
        self._sum += value
        self._squares += (value - (0.5 + self._sum) / (now + 1)) ** 2

    @property
    def mean(self) -> float:
        return self._sum / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high), within [0, 1]."""
        if not self.count:
            return 0.0, 1.0
        centre = self._weighted / self._weight
        half = (math.log(2.0 / self.level) + self._penalty) / self._weight
        return max(0.0, centre - half), min(1.0, centre + half)


class Verdict(Enum):
    """What the evidence says. The value of one that ends in a roll-back is its reason."""

    UNDECIDED = "undecided"
    BETTER = "better"
    AS_GOOD = "as_good"
    WORSE = "worse_than_active"
    BROKEN_PROMISE = "below_promise"

    @property
    def promotes(self) -> bool:
        return self in (Verdict.BETTER, Verdict.AS_GOOD)

    @property
    def rolls_back(self) -> bool:
        return self in (Verdict.WORSE, Verdict.BROKEN_PROMISE)


@dataclass(slots=True)
class CanaryTest:
    """Sequential comparison of a candidate with the active draft, and with what its manifest promised.

    Args:
        level: probability that the draft that is in truth as good is rolled back as worse, whatever the number of
            looks. Half of it goes to each of the two means.
        margin: how much worse than the active draft still counts as good as it, in expected acceptance.
        promised: expected acceptance that the candidate was published with; None: nothing was promised.
        promise_margin: how far below the promise it may stay. Traffic has drifted since it was measured, so a
            candidate that beats the active draft is promoted all the same.
    """

    level: float
    margin: float
    promised: float | None
    promise_margin: float
    candidate: ConfidenceSequence = field(init=False)
    active: ConfidenceSequence = field(init=False)

    def __post_init__(self) -> None:
        self.candidate = ConfidenceSequence(self.level / 2.0)
        self.active = ConfidenceSequence(self.level / 2.0)

    @property
    def difference(self) -> tuple[float, float]:
        """Interval of candidate - active."""
        low, high = self.candidate.interval
        active_low, active_high = self.active.interval
        return low - active_high, high - active_low

    def verdict(self) -> Verdict:
        low, high = self.difference
        if low > 0.0:
            return Verdict.BETTER
        if high < 0.0:
            return Verdict.WORSE
        if self.promised is not None and self.candidate.interval[1] < self.promised - self.promise_margin:
            return Verdict.BROKEN_PROMISE
        return Verdict.AS_GOOD if low > -self.margin else Verdict.UNDECIDED

    def verdict_at_end(self) -> Verdict:
        """When the time is up: the means decide, if there is anything to go by; else still undecided."""
        verdict = self.verdict()
        if verdict is not Verdict.UNDECIDED or min(self.candidate.count, self.active.count) < MIN_SAMPLES:
            return verdict
        return Verdict.AS_GOOD if self.candidate.mean >= self.active.mean - self.margin else Verdict.WORSE
