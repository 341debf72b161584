"""Has the traffic moved away from what the draft has learnt? Acceptance of late against that of the longer past."""

from __future__ import annotations

import math
from dataclasses import dataclass

_SIGMAS = 3.5  # a false alarm in some millions of drafted tokens; it costs a cycle, which the gate then refuses


@dataclass
class DriftDetector:
    """Two exponential moving averages of the acceptance rate, over drafted tokens.

    Drift: the short average lies below the long one by more than `threshold` *and* by more than the noise of the short
    one explains. The noise is that between sequences, which differ far more than single tokens do: with a variance v of
    a sequence's rate and w tokens drafted in a sequence (both estimated, weighted by tokens), an average over W tokens
    has the variance v w / 2W.

    Attributes:
        threshold: of acceptance rate.
        short_tokens, long_tokens: the averages' windows W, in drafted tokens. No drift is seen before `short_tokens`
            have been drafted.
    """

    threshold: float = 0.05
    short_tokens: float = 2_000.0
    long_tokens: float = 20_000.0
    short: float = math.nan
    long: float = math.nan
    drafted: float = 0.0
    _variance: float = 0.0
    _weight: float = 0.0

    def observe(self, num_accepted: int, num_drafted: int) -> None:
        """Take in one sequence's counts."""
        if num_drafted == 0:
            return
        rate = num_accepted / num_drafted
        self.drafted += num_drafted
        # at first each is the plain mean of all there is
        long_window = min(self.drafted, self.long_tokens)
        deviation = 0.0 if math.isnan(self.long) else (rate - self.long) ** 2
        self._variance = _moved(self._variance, deviation, num_drafted, long_window)
        self._weight = _moved(self._weight, num_drafted, num_drafted, long_window)
        self.short = _moved(self.short, rate, num_drafted, min(self.drafted, self.short_tokens))
        self.long = _moved(self.long, rate, num_drafted, long_window)

    @property
    def noise(self) -> float:
        """Standard deviation of the short average while nothing changes."""
        return math.sqrt(self._variance * self._weight / (2.0 * self.short_tokens))

    @property
    def drifted(self) -> bool:
        return (
            self.drafted >= self.short_tokens
            and self.long - self.short > self.threshold
            and self.long - self.short > _SIGMAS * self.noise
        )

    def reset(self) -> None:
        """Begin anew, as after another draft has gone into service."""
        self.short = self.long = math.nan
        self.drafted = self._variance = self._weight = 0.0


def _moved(average: float, value: float, weight: float, window: float) -> float:
    if math.isnan(average):
        return value
    return average + (value - average) * min(weight / window, 1.0)
