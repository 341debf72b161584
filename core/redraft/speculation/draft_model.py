"""A small language model that drafts, one token a forward pass, for all sequences at once."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from redraft.models.runner import Chunk, ModelRunner
from redraft.sampling.processors import adjusted_logits, peaks, probabilities, sure_peaks
from redraft.speculation.ahead import draft_ahead, sample
from redraft.speculation.length import PENDING, LengthController
from redraft.speculation.proposer import (
    CERTAIN,
    NO_PROBS,
    NOTHING,
    Proposal,
    SequenceProposal,
    joined,
    nothing_proposed,
)
from redraft.speculation.state import SequenceState
from redraft.transfer import select_rows


class DraftModelProposer:
    """Drafts with a model of its own KV, addressed by the sequences' shared block tables.

    The draft's KV is filled when it is needed, never on a schedule of its own: whatever is missing before a proposal
    (a prompt, a prefix whose draft half was lost, the tokens of a time without speculation, everything after a swap)
    is caught up in one ragged pass, at most `max_catch_up` tokens a step so that no step grows long. Of what a change
    of draft has cost, at most `max_rebuild` tokens: it hits all running sequences at once, none of which is new.

    Args:
        runner: the draft.
        version: goes into every proposal.
        max_rebuild: None: as `max_catch_up`.
        epoch: changes with every draft put into service; KV of another epoch counts as missing.
        length: says whether to draft, and what a token and a pass must be worth; None: as many as allowed.
    """

    name = "draft_model"

    def __init__(
        self,
        runner: ModelRunner,
        *,
        version: str,
        epoch: int = 0,
        max_catch_up: int = 512,
        max_rebuild: int | None = None,
        length: LengthController | None = None,
    ) -> None:
        self.runner = runner
        self.version = version
        self.epoch = epoch
        self.max_catch_up = max_catch_up
        self.max_rebuild = max_catch_up if max_rebuild is None else max_rebuild
        self.length = length

    def propose(self, states: Sequence[SequenceState], limits: Sequence[int]) -> Proposal:
        begun = time.perf_counter()
        missing = [self._num_missing(state) for state in states]
        runs_ahead = self.runner.runs_ahead and not any(state.params.has_penalties for state in states)
        if self.length is not None:
            # how sure the draft is of a token is not known in time where the host runs ahead
            decide = self.length.choose if runs_ahead else functools.partial(self.length.allow, missing=missing)
            limits = decide(states, limits)
        ready = self._catch_up(states, limits, missing)
        if not ready:
            return nothing_proposed(len(states))
        are_all = sum(map(bool, limits)) == len(ready)
        # prompts and the like would say nothing of the next step
        is_usual = are_all and all(missing[i] <= PENDING for i in ready)
        drafts = {index: Draft(states[index], limits[index]) for index in ready}
        active = list(drafts.values())
        probs: list[Tensor] = []
        num_rows, num_passes = 0, 1
        logits = self._ingest_pending([draft.state for draft in active])
        if runs_ahead:
            probs, drawn = draft_ahead(self.runner, active, logits)
            return Proposal(self._in_order(drafts, len(states)), joined(probs), drawn)
        if self.length is not None and are_all:
            self.length.observe_reading(sum(missing[i] for i in ready), time.perf_counter() - begun)
        started: float | None = None  # of a pass of one token each, which is what lengths are chosen by
        while True:
            found = _draw(logits, active, self._is_worth_a_token)
            if started is not None and self.length is not None and self.length.draft_cost is not None:
                self.length.draft_cost.observe(len(active), time.perf_counter() - started)
            active = found.drafts
            for draft, token in zip(active, found.tokens, strict=True):
                num_rows = draft.take(token, num_rows)
            probs.append(found.q)
            count = len(active)
            active = [d for d in active if len(d.tokens) < d.limit and self._is_worth_a_pass(d, count)]
            if not active:
                break
            started = time.perf_counter()
            num_passes += 1
            logits = self.runner.forward([draft.next_chunk() for draft in active])
        if self.length is not None and is_usual:
            self.length.observe_proposal(len(ready), num_passes, time.perf_counter() - begun)
        return Proposal(self._in_order(drafts, len(states)), joined(probs))

    def _in_order(self, drafts: Mapping[int, Draft], count: int) -> tuple[SequenceProposal, ...]:
        """A proposal for each of `count` sequences, NOTHING for those without a draft."""
        return tuple(drafts[i].proposal(self) if i in drafts else NOTHING for i in range(count))

    def _is_worth_a_token(self, draft: Draft, sureness: float) -> bool:
        """Whether the next token's chance, known before it is drawn, pays for its verification."""
        if self.length is None:
            return True
        self.length.confidence.see(sureness, greedy=draft.is_greedy)
        chance = self.length.confidence.rate(sureness, greedy=draft.is_greedy)
        if draft.survival * chance < self.length.token_price:
            self.length.observe_dropped(draft.state, chance, draft.survival, is_first=not draft.tokens)
            return False
        draft.survival *= chance
        draft.sureness.append(sureness)
        return True

    def _is_worth_a_pass(self, draft: Draft, num_active: int) -> bool:
        """Whether one more token may be expected to pay for its share of a pass and its verification."""
        if self.length is None:
            return True
        price = self.length.token_price + self.length.pass_price(num_active)
        return draft.survival * self.length.rate(draft.state) >= price

    def settle(self, state: SequenceState, num_accepted: int, proposal: SequenceProposal) -> None:
        """Keep the draft's KV of what was accepted. The last drafted token was never run through the draft."""
        state.num_draft_computed = len(state.token_ids) + min(num_accepted, len(proposal.token_ids) - 1)
        if self.length is not None:
            self.length.observe(state, num_accepted, len(proposal.token_ids))
            self.length.confidence.observe(proposal.sureness, num_accepted, greedy=state.params.is_greedy)

    def _catch_up(self, states: Sequence[SequenceState], limits: Sequence[int], missing: Sequence[int]) -> list[int]:
        """Indices of the sequences that can draft in this step; ingests part of what others lack."""
        ready: list[int] = []
        chunks: list[Chunk] = []
        budget, rebuild_budget = self.max_catch_up, self.max_rebuild
        asked = [index for index, limit in enumerate(limits) if limit > 0]
        for state in (states[index] for index in asked):
            if state.draft_epoch != self.epoch:
                state.num_draft_computed, state.draft_epoch = 0, self.epoch
                state.num_draft_marked_blocks = 0  # they are marked as another draft's
                state.draft_rebuild_end = len(state.token_ids)
        # the least behind first, so that one long prompt does not keep everybody else from drafting
        for index in sorted(asked, key=missing.__getitem__):
            state = states[index]
            rebuilds = state.num_draft_computed < state.draft_rebuild_end
            taken = min(missing[index], budget, rebuild_budget) if rebuilds else min(missing[index], budget)
            budget -= taken
            rebuild_budget -= taken if rebuilds else 0
            if taken == missing[index]:
                ready.append(index)
            elif taken > 0:
                start = state.num_draft_computed
                chunks.append(Chunk(state.token_ids[start : start + taken], start, state.block_ids, 0))
                state.num_draft_computed += taken
        if chunks:
            self.runner.forward(chunks)
        return ready

    def _num_missing(self, state: SequenceState) -> int:
        """Tokens whose KV of this draft is missing; at least 1."""
        return len(state.token_ids) - (state.num_draft_computed if state.draft_epoch == self.epoch else 0)

    def _ingest_pending(self, states: Sequence[SequenceState]) -> Tensor:
        """Run every token the draft has not seen; logits after the last one, [sequences, vocab_size]."""
        logits = self.runner.forward(
            [Chunk(s.token_ids[s.num_draft_computed :], s.num_draft_computed, s.block_ids) for s in states]
        )
        for state in states:
            state.num_draft_computed = len(state.token_ids)
        return logits


@dataclass(slots=True)
class Draft:
    """What is being drafted for one sequence."""

    state: SequenceState
    limit: int
    tokens: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    sureness: list[float] = field(default_factory=list)
    survival: float = 1.0  # chance that all of it is accepted

    @property
    def is_greedy(self) -> bool:
        return self.state.params.is_greedy

    def take(self, token: int, row: int) -> int:
        """Add a token, drawn from row `row` of the probabilities unless it is certain; returns the next free row."""
        self.tokens.append(token)
        self.rows.append(CERTAIN if self.is_greedy else row)
        return row if self.is_greedy else row + 1

    def next_chunk(self) -> Chunk:
        """The last token, for the pass that gives the next."""
        return Chunk(self.tokens[-1:], len(self.state.token_ids) + len(self.tokens) - 1, self.state.block_ids)

    def proposal(self, proposer: DraftModelProposer) -> SequenceProposal:
        if not self.tokens:
            return NOTHING
        parts = (tuple(self.tokens), tuple(self.rows), proposer.name, proposer.version, tuple(self.sureness))
        return SequenceProposal(*parts)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """The drafts that got a token, the tokens, and the q of those that were not greedy, [sampled, vocab_size]."""

    drafts: list[Draft]
    tokens: list[int]
    q: Tensor


def _draw(logits: Tensor, drafts: Sequence[Draft], is_worth: Callable[[Draft, float], bool]) -> _Drawn:
    """A token per row of logits [drafts, vocab_size], for the drafts that are `is_worth` one at their row's largest
    probability. At temperature 0 the token is certain, which saves all passes over q."""
    rows = [draft.state.sampling_row(draft.tokens) for draft in drafts]
    greedy = [i for i, draft in enumerate(drafts) if draft.is_greedy]
    sampled = [i for i, draft in enumerate(drafts) if not draft.is_greedy]
    sureness = [0.0] * len(drafts)
    choice: dict[int, int] = {}
    q = NO_PROBS
    if greedy:
        scores = adjusted_logits(select_rows(logits, greedy), [rows[i] for i in greedy])
        for i, sure, token in zip(greedy, *sure_peaks(scores), strict=True):
            sureness[i], choice[i] = 0.0 if math.isnan(sure) else sure, token
    if sampled:
        q = probabilities(select_rows(logits, sampled), [rows[i] for i in sampled])
        for at, (i, sure) in enumerate(zip(sampled, peaks(q)[0], strict=True)):
            sureness[i] = sure
            if math.isnan(sure):
                # a draft whose logits overflow must cost acceptance, not correctness: its token is drawn uniformly
                q[at] = sureness[i] = 1.0 / q.shape[1]
    kept = [i for i, draft in enumerate(drafts) if is_worth(draft, sureness[i])]
    if sampled:
        among = [at for at, i in enumerate(sampled) if i in kept]
        q = select_rows(q, among)
        drawing = [drafts[sampled[at]] for at in among]
        if drawing:
            choice |= {sampled[at]: token for at, token in zip(among, sample(q, drawing).tolist(), strict=True)}
    return _Drawn([drafts[i] for i in kept], [choice[i] for i in kept], q)
