"""How likely a drafted token is to be accepted, by how sure the draft is where it is drawn.

Sureness is the largest probability of the draft's distribution there; what it is worth is learnt from verification, for
greedy and sampled requests apart. Whether a position is drafted may depend on that distribution and on the tokens
before, never on the token drawn: to drop one for what it is would bias the output (docs/lossless.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_BINS = 20  # of the largest probability
_FORGET = 0.999  # weight of an observation after one more of any kind
_PRIOR_WEIGHT = 8.0  # observations that the draft's own word counts for


@dataclass(slots=True)
class _Bin:
    accepted: float = 0.0
    tested: float = 0.0
    when: int = 0  # number of observations made when the two were right

    def forget_until(self, now: int) -> None:
        kept = _FORGET ** (now - self.when)
        self.accepted, self.tested, self.when = self.accepted * kept, self.tested * kept, now


class Confidence:
    """Acceptance by sureness, a decayed mean per bin; without observations, the sureness itself."""

    def __init__(self) -> None:
        self._bins = [_Bin() for _ in range(2 * _BINS)]
        self._now = 0

    def rate(self, sureness: float, *, greedy: bool) -> float:
        """Chance of a token to be accepted, given that those before it were."""
        found = self._bin(sureness, greedy)
        found.forget_until(self._now)
        return (found.accepted + _PRIOR_WEIGHT * sureness) / (found.tested + _PRIOR_WEIGHT)

    def observe(self, sureness: Sequence[float], num_accepted: int, *, greedy: bool) -> None:
        """What became of a sequence's drafted tokens; those behind a rejected one were not tested."""
        for position, sure in enumerate(sureness[: num_accepted + 1]):
            self._now += 1
            found = self._bin(sure, greedy)
            found.forget_until(self._now)
            found.tested += 1.0
            found.accepted += position < num_accepted

    def _bin(self, sureness: float, greedy: bool) -> _Bin:
        return self._bins[_BINS * greedy + min(int(sureness * _BINS), _BINS - 1)]
