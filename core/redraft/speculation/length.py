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

from redraft.speculation.confidence import Confidence
from redraft.speculation.cost import StepCost
from redraft.speculation.state import SequenceState

PENDING = 2  # tokens that a draft has not seen after a usual step, at most

_FORGET = 0.9  # weight of a step's acceptance after one more step
_PRIOR_WEIGHT = 4.0  # tested positions that the batch-wide acceptance counts for in a young sequence
_HYSTERESIS = 1.02  # a different k must promise this much more goodput
_LEAST_REACH = 2  # drafted tokens per sequence over which the price of one is taken
_FIRST_PROBE, _LAST_PROBE = 32, 512  # steps in which nothing was verified before one token is tried again
_PROBE_SHARE = 0.01  # of the time of those steps, for the draft to read what it has not seen
_TRIAL_STRIDE = 8  # tokens of a sequence in which one is drafted at least, while its draft is on trial
_REFUSAL = 8  # steps that a decision not to draft stands for: where a pass is short, deciding is 2 % of it
_LEAST_AHEAD = 16  # tokens that an answer is taken to go on for, besides as many as it has
_LEAST_READ = 32  # tokens at once that tell how fast the draft reads
_READING_RATE = 0.2  # of the moving average of that


@dataclass(slots=True)
class Acceptance:
    """Decayed counts of draft tokens tested and accepted."""

    accepted: float = 0.0
    tested: float = 0.0
    last_at: int | None = None  # output tokens that a sequence had when tokens of its draft were last verified

    def observe(self, num_accepted: int, num_drafted: int) -> None:
        self._add(num_accepted, min(num_accepted + 1, num_drafted), _FORGET)

    def expect(self, chance: float, weight: float, *, is_first: bool) -> None:
        """A token that was not drafted, taken for what would have become of it on average; `is_first` of its step."""
        kept = _FORGET if is_first else 1.0  # the step's drafted tokens will be observed
        self._add(weight * chance, weight, kept)

    def _add(self, accepted: float, tested: float, kept: float) -> None:
        self.accepted = kept * self.accepted + accepted
        self.tested = kept * self.tested + tested

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
        self.confidence = Confidence()
        self._around_passes = StepCost()  # seconds of a proposal that are in none of its passes, by number of sequences
        self._overall = Acceptance()
        self._last_k = 1
        self._promised = 0.0  # tokens a second that the last choice promised
        self._saving = 0.0  # share of the time of plain decoding that it saves
        self._token_seconds = 0.0  # what verifying one token more costs
        self._reading_seconds = 0.0  # of a token that the draft has not seen; 0: not known yet
        self._idle_steps = 0
        self._idle_seconds = 0.0
        self._probe_after = _FIRST_PROBE
        self._refused_steps = 0  # for which nothing will be drafted, whatever
        self._refused_for: tuple[int, ...] = ()  # the sequences, by identity
        self.is_on_trial = False  # two drafts are being compared: both must be measured, whether it pays or not

    def observe(self, state: SequenceState, num_accepted: int, num_drafted: int) -> None:
        self._idle_steps, self._idle_seconds = 0, 0.0
        for acceptance in self._acceptances(state):
            acceptance.observe(num_accepted, num_drafted)
        state.acceptance[self.name].last_at = state.num_output_tokens

    def observe_dropped(self, state: SequenceState, chance: float, survival: float, *, is_first: bool) -> None:
        """A token that was not worth its price: `chance` to be accepted if those before it are, which has probability
        `survival`. Without it, rates would be those of the tokens that the draft is sure of, and promise too much."""
        for acceptance in self._acceptances(state):
            acceptance.expect(chance, survival, is_first=is_first)

    def observe_proposal(self, num_sequences: int, num_passes: int, seconds: float) -> None:
        """What a proposal took as a whole. Where a pass is short, what lies around it decides whether drafting pays."""
        if self.draft_cost is not None:
            passes = num_passes * self.draft_cost.estimate(num_sequences)
            self._around_passes.observe(num_sequences, max(seconds - passes, 1e-6))

    def observe_reading(self, num_tokens: int, seconds: float) -> None:
        """What the draft took for tokens that it had not seen."""
        if num_tokens >= _LEAST_READ:
            before = self._reading_seconds or seconds / num_tokens
            self._reading_seconds = before + _READING_RATE * (seconds / num_tokens - before)

    def choose(self, states: Sequence[SequenceState], limits: Sequence[int]) -> list[int]:
        """k per sequence, at most limits[i]."""
        if not any(limits):
            return [0] * len(limits)
        rates = [self.rate(state) for state in states]
        best_k = self._best(rates, limits)
        if best_k == 0:
            return self._tried(states, limits, [0] * len(limits)) or self._probe(limits)
        self._probe_after = _FIRST_PROBE
        if len(states) == 1:  # best_k is its own
            return [min(best_k, limit) for limit in limits]
        worth = self.token_price
        chosen = [_trim(rate, min(best_k, limit), worth) for rate, limit in zip(rates, limits, strict=True)]
        return self._tried(states, limits, chosen) or chosen

    def allow(self, states: Sequence[SequenceState], limits: Sequence[int], missing: Sequence[int]) -> list[int]:
        """The same for a proposer that decides at every token whether it goes on (`token_price`, `pass_price`): the
        limit where drafting pays. The price of time is what the batch gets done in it otherwise, as in Dinkelbach's
        method for ratios (1967).

        Where that decision has left nothing to verify for long, it is probed too: what it goes by is learnt from
        verification, so it would never turn out to have become wrong.

        `missing[i]` tokens of a sequence must be read before it is drafted for. That must be worth it for a sequence
        that goes on for as long as it has lasted and a little longer; a probe waits until idle steps have earned it.
        While two drafts are compared, each is measured in every sequence, whether that pays or not.
        """
        if not any(limits):
            return [0] * len(limits)
        batch_seconds = self.target_cost.estimate(len(states))
        identities = tuple(map(id, states))
        if self._is_still_refused(identities):
            self._refused_steps -= 1
            self._idle_seconds += batch_seconds
            return self._probe(limits)  # which is not due
        self._refused_steps = 0
        rates = [self.rate(state) for state in states]
        saving = self._saving if self._best(rates, limits) > 0 else self._saving_by_picking(len(states))
        worth = [
            limit if self._is_worth_reading(state, num_missing, saving, len(states)) else 0
            for state, limit, num_missing in zip(states, limits, missing, strict=True)
        ]
        if (tried := self._tried(states, limits, worth)) is not None:
            self._token_seconds = 0.0
            return tried
        is_on = any(worth)
        if is_on and self._idle_steps + 1 < self._probe_after:
            self._idle_steps += 1
            self._probe_after = _FIRST_PROBE
            return worth
        self._idle_seconds += batch_seconds
        asked = sum(num_missing for num_missing, limit in zip(missing, limits, strict=True) if limit > 0)
        is_earned = is_on or self._reading(asked) <= _PROBE_SHARE * self._idle_seconds
        probe = self._probe(limits, is_earned=is_earned)
        if not is_on and not any(probe):
            self._refused_steps, self._refused_for = _REFUSAL - 1, identities
        return probe

    def _is_still_refused(self, identities: tuple[int, ...]) -> bool:
        """Whether the last decision not to draft stands: for the same sequences, and if no probe is due."""
        stands = self._refused_steps > 0 and self._refused_for == identities
        return stands and not self.is_on_trial and self._idle_steps + 1 < self._probe_after

    def _saving_by_picking(self, num_sequences: int) -> float:
        """Share of the time of plain decoding that a pass saves of which only the tokens are verified that are worth
        it, where any fixed k loses. 0 if this loses too."""
        around = self._tokens_in(self._around_passes.estimate(num_sequences)) / num_sequences
        gain = max(self.confidence.surplus(self.token_price) - self.pass_price(num_sequences) - around, 0.0)
        return gain / (1.0 + gain)

    def _tried(self, states: Sequence[SequenceState], limits: Sequence[int], chosen: Sequence[int]) -> list[int] | None:
        """While two drafts are compared: what was chosen, but a token at least for who is due; None if nobody is."""
        if not self.is_on_trial or not any(due := [self._is_due(state) for state in states]):
            return None
        return [max(k, min(1, limit)) if is_due else k for k, limit, is_due in zip(chosen, limits, due, strict=True)]

    def _is_due(self, state: SequenceState) -> bool:
        """Whether the sequence has gone on for long without a word of its draft being verified."""
        own = state.acceptance.get(self.name)
        return own is None or own.last_at is None or state.num_output_tokens >= own.last_at + _TRIAL_STRIDE

    def _is_worth_reading(self, state: SequenceState, num_missing: int, saving: float, num_sequences: int) -> bool:
        """Whether drafting saves more on what is ahead of a sequence than the draft takes to read what it has not seen
        of it. How long an answer will be nobody knows: as long again as it is by now, as a rule."""
        if saving <= 0.0 or num_missing <= PENDING or self.is_on_trial:
            return saving > 0.0
        ahead = _LEAST_AHEAD + state.num_output_tokens
        return self._reading(num_missing) < saving * ahead * self.target_cost.estimate(num_sequences) / num_sequences

    def _reading(self, num_tokens: int) -> float:
        """Seconds that the draft takes for so many tokens that it has not seen."""
        if self.draft_cost is None:
            return 0.0
        return num_tokens * (self._reading_seconds or self.draft_cost.estimate(_LEAST_READ) / _LEAST_READ)

    @property
    def token_price(self) -> float:
        """Tokens that the batch would emit in the time of verifying one drafted token: the least chance to be accepted
        that is worth it. Of the last choice's batch."""
        return self._tokens_in(self._token_seconds)

    def pass_price(self, num_sequences: int) -> float:
        """Tokens per sequence that the batch would emit in the time of a draft pass over so many sequences."""
        if self.draft_cost is None:
            return 0.0
        return self._tokens_in(self.draft_cost.estimate(num_sequences)) / num_sequences

    def _tokens_in(self, seconds: float) -> float:
        """What the batch of the last choice emits in that time: the price of it."""
        return self._promised * seconds

    def _acceptances(self, state: SequenceState) -> tuple[Acceptance, Acceptance]:
        """The sequence's own, and everybody's."""
        return state.acceptance.setdefault(self.name, Acceptance()), self._overall

    def _best(self, rates: Sequence[float], limits: Sequence[int]) -> int:
        """The k that promises most, 0 if drafting loses; some limit is above 0."""
        longest = max(limits)
        goodputs = [self._goodput(rates, limits, k) for k in range(longest + 1)]
        best_k = max(range(longest + 1), key=goodputs.__getitem__)
        stay = min(self._last_k, longest)
        if goodputs[best_k] <= _HYSTERESIS * goodputs[stay]:
            best_k = stay
        self._last_k, self._promised = best_k, goodputs[best_k]
        self._saving = 1.0 - goodputs[0] / max(goodputs[best_k], 1e-9)
        # over some range: between neighbouring sizes it is a difference of nearly equal, noisy numbers
        batch, reach = len(rates), min(max(best_k, _LEAST_REACH), longest)
        more = self.target_cost.estimate(batch * (reach + 1)) - self.target_cost.estimate(batch)
        self._token_seconds = max(more, 0.0) / (batch * reach)
        return best_k

    def rate(self, state: SequenceState) -> float:
        """Acceptance of the sequence's drafted tokens, leaning on everybody's while it is young."""
        own = state.acceptance.get(self.name)
        prior = self._overall.rate(0.5)
        return own.rate(prior) if own is not None else prior

    def _goodput(self, rates: Sequence[float], limits: Sequence[int], k: int) -> float:
        lengths = [min(k, limit) for limit in limits]
        tokens = sum(expected_tokens(rate, length) for rate, length in zip(rates, lengths, strict=True))
        seconds = self.target_cost.estimate(len(rates) + sum(lengths))
        if self.draft_cost is not None and k > 0:
            seconds += k * self.draft_cost.estimate(len(rates)) + self._around_passes.estimate(len(rates))
        return tokens / max(seconds, 1e-9)

    def _probe(self, limits: Sequence[int], *, is_earned: bool = True) -> list[int]:
        """Mostly nothing; now and then one token each, at no price, to notice that drafting has become worth while."""
        self._idle_steps += 1
        if self._idle_steps < self._probe_after or not is_earned:
            return [0] * len(limits)
        self._idle_steps, self._idle_seconds = 0, 0.0
        self._probe_after = min(2 * self._probe_after, _LAST_PROBE)
        self._token_seconds = 0.0
        return [min(1, limit) for limit in limits]


def _trim(rate: float, k: int, worth: float) -> int:
    """Drop the last tokens of a sequence whose chance to be accepted is less than the tokens that others get done in
    the time of their verification."""
    while k > 1 and rate**k < worth:
        k -= 1
    return k
