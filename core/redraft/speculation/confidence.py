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
_FORGET_SEEN = 0.995  # weight of a position seen after one more
_MAX_WEIGHT = 1e6  # of the next position, before all are scaled down


@dataclass(slots=True)
class _Bin:
    accepted: float = 0.0
    tested: float = 0.0
    when: int = 0  # number of observations made when the two were right
    seen: float = 0.0  # positions of this sureness, drafted or not, by a weight that grows

    def forget_until(self, now: int) -> None:
        kept = _FORGET ** (now - self.when)
        self.accepted, self.tested, self.when = self.accepted * kept, self.tested * kept, now

    def rate(self, sureness: float, now: int) -> float:
        self.forget_until(now)
        return (self.accepted + _PRIOR_WEIGHT * sureness) / (self.tested + _PRIOR_WEIGHT)


class Confidence:
    """Acceptance by sureness, a decayed mean per bin; without observations, the sureness itself."""

    def __init__(self) -> None:
        self._bins = [_Bin() for _ in range(2 * _BINS)]
        self._now = 0
        self._weight = 1.0  # of the next position seen; it grows where the others should shrink

    def rate(self, sureness: float, *, greedy: bool) -> float:
        """Chance of a token to be accepted, given that those before it were."""
        return self._bin(sureness, greedy).rate(sureness, self._now)

    def see(self, sureness: float, *, greedy: bool) -> None:
        """A position that the draft has run to, whether its token is worth verifying or not."""
        self._bin(sureness, greedy).seen += self._weight
        self._weight /= _FORGET_SEEN
        if self._weight > _MAX_WEIGHT:
            for each in self._bins:
                each.seen /= self._weight
            self._weight = 1.0

    def surplus(self, price: float) -> float:
        """Tokens that a position brings on average beyond its price, drafted only where it is worth that; 1 if nothing
        was seen yet."""
        total = sum(each.seen for each in self._bins)
        if total == 0.0:
            return 1.0
        worth = 0.0
        for index, each in enumerate(self._bins):
            if each.seen > 0.0:
                middle = (index % _BINS + 0.5) / _BINS
                worth += each.seen * max(each.rate(middle, self._now) - price, 0.0)
        return worth / total

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
