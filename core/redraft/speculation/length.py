"""How many tokens to draft: the k that maximises predicted goodput, measured not configured.

For a sequence whose draft tokens are accepted with probability a, a step with k drafted tokens emits
(1 - a^(k+1)) / (1 - a) tokens on average (Leviathan et al. 2023). For a batch, goodput is the sum of that over the
sequences, divided by the time of the step: one target pass over all tokens and k draft passes. Both times come from
the steps themselves. The choice looks only at what earlier steps did, never at the tokens being drafted, so it cannot
bias the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from redraft.speculation.cost import StepCost
from redraft.speculation.state import SequenceState

_FORGET = 0.9  # weight of a step's acceptance after one more step
_PRIOR_WEIGHT = 4.0  # tested positions that the batch-wide acceptance counts for in a young sequence
_HYSTERESIS = 1.02  # a different k must promise this much more goodput
_FIRST_PROBE, _LAST_PROBE = 32, 512  # steps without speculation before one token is tried again


@dataclass(slots=True)
class Acceptance:
    """Decayed counts of draft tokens tested and accepted."""

    accepted: float = 0.0
    tested: float = 0.0

    def observe(self, num_accepted: int, num_drafted: int) -> None:
        self.accepted = _FORGET * self.accepted + num_accepted
        self.tested = _FORGET * self.tested + min(num_accepted + 1, num_drafted)

    def rate(self, prior: float) -> float:
        rate = (self.accepted + _PRIOR_WEIGHT * prior) / (self.tested + _PRIOR_WEIGHT)
        return min(rate, 0.999)


def expected_tokens(acceptance: float, num_drafted: int) -> float:
    """Mean tokens emitted by a step with `num_drafted` tokens, each accepted with probability `acceptance` < 1."""
    return float((1.0 - acceptance ** (num_drafted + 1)) / (1.0 - acceptance))


class LengthController:
    """Chooses k for one proposer.

    Args:
        target_cost: seconds of a target pass by number of tokens, shared and observed by the engine.
        draft_cost: seconds of one draft pass by number of sequences; None for a proposer that costs nothing.
    """

    def __init__(self, name: str, target_cost: StepCost, draft_cost: StepCost | None) -> None:
        self.name = name
        self.target_cost = target_cost
        self.draft_cost = draft_cost
        self._overall = Acceptance()
        self._last_k = 1
        self._idle_steps = 0
        self._probe_after = _FIRST_PROBE

    def observe(self, state: SequenceState, num_accepted: int, num_drafted: int) -> None:
        state.acceptance.setdefault(self.name, Acceptance()).observe(num_accepted, num_drafted)
        self._overall.observe(num_accepted, num_drafted)
        if num_accepted:
            self._probe_after = _FIRST_PROBE

    def choose(self, states: Sequence[SequenceState], limits: Sequence[int]) -> list[int]:
        """k per sequence, at most limits[i]."""
        rates = [self._rate(state) for state in states]
        longest = max(limits, default=0)
        if longest == 0:
            return [0] * len(limits)
        goodputs = [self._goodput(rates, limits, k) for k in range(longest + 1)]
        best_k = max(range(longest + 1), key=goodputs.__getitem__)
        stay = min(self._last_k, longest)
        if goodputs[best_k] <= _HYSTERESIS * goodputs[stay]:
            best_k = stay
        self._last_k, best = best_k, goodputs[best_k]
        if best_k == 0:
            return self._probe(limits)
        self._idle_steps = 0
        if len(states) == 1:  # best_k is its own
            return [min(best_k, limit) for limit in limits]
        worth = self._token_seconds(len(states), best_k) * best
        return [_trim(rate, min(best_k, limit), worth) for rate, limit in zip(rates, limits, strict=True)]

    def _rate(self, state: SequenceState) -> float:
        own = state.acceptance.get(self.name)
        prior = self._overall.rate(0.5)
        return own.rate(prior) if own is not None else prior

    def _goodput(self, rates: Sequence[float], limits: Sequence[int], k: int) -> float:
        lengths = [min(k, limit) for limit in limits]
        tokens = sum(expected_tokens(rate, length) for rate, length in zip(rates, lengths, strict=True))
        seconds = self.target_cost.estimate(len(rates) + sum(lengths))
        if self.draft_cost is not None:
            seconds += k * self.draft_cost.estimate(len(rates))
        return tokens / max(seconds, 1e-9)

    def _token_seconds(self, batch: int, k: int) -> float:
        """What verifying one token more, or less, costs in a batch that drafts k tokens each."""
        more = self.target_cost.estimate(batch * (k + 1)) - self.target_cost.estimate(batch * k)
        return max(more, 0.0) / batch

    def _probe(self, limits: Sequence[int]) -> list[int]:
        """Mostly nothing; now and then one token each, to notice that drafting has become worth while."""
        self._idle_steps += 1
        if self._idle_steps < self._probe_after:
            return [0] * len(limits)
        self._idle_steps = 0
        self._probe_after = min(2 * self._probe_after, _LAST_PROBE)
        return [min(1, limit) for limit in limits]


def _trim(rate: float, k: int, worth: float) -> int:
    """Drop the last tokens of a sequence whose chance to be accepted is less than the tokens that others get done in
    the time of their verification."""
    while k > 1 and rate**k < worth:
        k -= 1
    return k
