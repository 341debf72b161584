"""A small language model that drafts, one token a forward pass, for all sequences at once."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from redraft.models.runner import Chunk, ModelRunner
from redraft.sampling.coupling import draw, keyed_race
from redraft.sampling.params import Coupling
from redraft.sampling.processors import adjusted_logits, peaks, probabilities
from redraft.sampling.randomness import Purpose, as_key_tensor, uniforms
from redraft.speculation.length import LengthController
from redraft.speculation.proposer import CERTAIN, NOTHING, Proposal, SequenceProposal, nothing_proposed
from redraft.speculation.state import SequenceState


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
        length: chooses how many tokens to draft; None: as many as allowed.
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
        if self.length is not None:
            limits = self.length.choose(states, limits)
        ready = self._catch_up(states, limits)
        if not ready:
            return nothing_proposed(len(states), self.runner.vocab_size, self.runner.device)
        # longest first: at every depth the sequences still drafting are a prefix of the list
        ready.sort(key=lambda index: -limits[index])
        active = [states[index] for index in ready]
        depth = [limits[index] for index in ready]
        drafted: list[list[int]] = [[] for _ in active]
        rows: list[list[int]] = [[] for _ in active]
        probs: list[Tensor] = []
        num_rows = 0
        logits = self._ingest_pending(active)
        started: float | None = None  # of a pass of one token each, which is what lengths are chosen by
        while True:
            tokens, q = _draw_tokens(logits, active, drafted[: len(active)])
            if started is not None and self.length is not None and self.length.draft_cost is not None:
                self.length.draft_cost.observe(len(active), time.perf_counter() - started)
            for index, token in enumerate(tokens):
                drafted[index].append(token)
                rows[index].append(CERTAIN if active[index].params.is_greedy else num_rows)
                num_rows += not active[index].params.is_greedy
            probs.append(q)
            active = [s for s, d, limit in zip(active, drafted, depth, strict=False) if len(d) < limit]
            if not active:
                break
            started = time.perf_counter()
            logits = self.runner.forward(
                [
                    Chunk(d[-1:], len(s.token_ids) + len(d) - 1, s.block_ids)
                    for s, d in zip(active, drafted, strict=False)
                ]
            )
        result = [NOTHING] * len(states)
        for index, tokens_of, rows_of in zip(ready, drafted, rows, strict=True):
            result[index] = SequenceProposal(tuple(tokens_of), tuple(rows_of), self.name, self.version)
        return Proposal(tuple(result), torch.cat(probs))

    def settle(self, state: SequenceState, num_accepted: int, proposal: SequenceProposal) -> None:
        """Keep the draft's KV of what was accepted. The last drafted token was never run through the draft."""
        state.num_draft_computed = len(state.token_ids) + min(num_accepted, len(proposal.token_ids) - 1)
        if self.length is not None:
            self.length.observe(state, num_accepted, len(proposal.token_ids))

    def _catch_up(self, states: Sequence[SequenceState], limits: Sequence[int]) -> list[int]:
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
        for index in sorted(asked, key=lambda i: _num_missing(states[i])):
            state = states[index]
            missing = _num_missing(state)
            rebuilds = state.num_draft_computed < state.draft_rebuild_end
            taken = min(missing, budget, rebuild_budget) if rebuilds else min(missing, budget)
            budget -= taken
            rebuild_budget -= taken if rebuilds else 0
            if taken == missing:
                ready.append(index)
            elif taken > 0:
                start = state.num_draft_computed
                chunks.append(Chunk(state.token_ids[start : start + taken], start, state.block_ids, 0))
                state.num_draft_computed += taken
        if chunks:
            self.runner.forward(chunks)
        return ready

    def _ingest_pending(self, states: Sequence[SequenceState]) -> Tensor:
        """Run every token the draft has not seen; logits after the last one, [sequences, vocab_size]."""
        logits = self.runner.forward(
            [Chunk(s.token_ids[s.num_draft_computed :], s.num_draft_computed, s.block_ids) for s in states]
        )
        for state in states:
            state.num_draft_computed = len(state.token_ids)
        return logits


def _num_missing(state: SequenceState) -> int:
    """Tokens whose draft KV is missing; at least 1."""
    return len(state.token_ids) - state.num_draft_computed


def _draw_tokens(
    logits: Tensor, states: Sequence[SequenceState], drafted: Sequence[Sequence[int]]
) -> tuple[list[int], Tensor]:
    """A token per row of logits [sequences, vocab_size], and the q of those that were drawn, [sampled, vocab_size]: at
    temperature 0 it is certain, which saves all passes over q."""
    rows = [state.sampling_row(tokens) for state, tokens in zip(states, drafted, strict=True)]
    greedy = [i for i, state in enumerate(states) if state.params.is_greedy]
    sampled = [i for i, state in enumerate(states) if not state.params.is_greedy]
    tokens = torch.empty(len(states), dtype=torch.int64, device=logits.device)
    if greedy:
        _, tokens[greedy] = peaks(adjusted_logits(_rows(logits, greedy), [rows[i] for i in greedy]))
    if not sampled:
        return tokens.tolist(), logits[:0].float()
    q = probabilities(_rows(logits, sampled), [rows[i] for i in sampled])
    # a draft whose logits overflow must cost acceptance, not correctness: its token is drawn uniformly
    q.nan_to_num_(nan=1.0 / q.shape[1])
    tokens[sampled] = _sample(q, [states[i] for i in sampled], [len(drafted[i]) for i in sampled])
    return tokens.tolist(), q


def _rows(logits: Tensor, indices: list[int]) -> Tensor:
    """These rows, in ascending order; without a copy if they are all."""
    return logits if len(indices) == len(logits) else logits[indices]


def _sample(q: Tensor, states: Sequence[SequenceState], drafted: Sequence[int]) -> Tensor:
    """Draw one token per row of q [sequences, vocab_size], each by its sequence's coupling -> [sequences]."""
    keys = as_key_tensor([state.key for state in states], q.device)
    positions = torch.tensor(
        [state.num_output_tokens + depth for state, depth in zip(states, drafted, strict=True)],
        device=q.device,
    )
    tokens = torch.empty_like(positions)
    racing = [i for i, s in enumerate(states) if s.coupling is Coupling.DRAFTER_INVARIANT]
    drawing = [i for i, s in enumerate(states) if s.coupling is not Coupling.DRAFTER_INVARIANT]
    if racing:
        tokens[racing] = keyed_race(_rows(q, racing), keys[racing], positions[racing])
    if drawing:
        chances = uniforms(keys[drawing], positions[drawing], Purpose.DRAFT)
        tokens[drawing] = draw(_rows(q, drawing), chances)
    return tokens
