"""One step of decoding for a batch of sequences: propose -> verify -> accept -> settle.

The same function serves, and evaluates a draft offline. With nothing proposed it is plain decoding; with pending
prompt tokens it is (chunked) prefill; there is no other path.

Worked example, k = 3: a sequence holds tokens [.., t], KV of all but t. The draft proposes d0 d1 d2. The target runs
t d0 d1 d2 and gives p0..p3. If d0 is accepted and d1 is not, d0 and a recovered token r (drawn at p1) are emitted;
the sequence is [.., t, d0, r] with KV of all but r: the KV of d1 and d2 is overwritten when those positions come again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from redraft.models.runner import Chunk, ModelRunner
from redraft.sampling.coupling import (
    DraftedTokens,
    Layout,
    Verdict,
    accept_choice,
    accept_maximal,
    expected_acceptance,
    keyed_race,
)
from redraft.sampling.logprobs import TeacherRow, TokenLogprob, teacher_rows, token_logprobs
from redraft.sampling.params import Coupling
from redraft.sampling.processors import SamplingRow, adjusted_logits, peaks, probabilities
from redraft.sampling.randomness import Purpose, as_key_tensor, uniforms
from redraft.speculation.proposer import NOTHING, Proposal, Proposer, SequenceProposal, nothing_proposed
from redraft.speculation.state import SequenceState


@dataclass(frozen=True, slots=True)
class Work:
    """What a step shall do for one sequence.

    Attributes:
        num_tokens: pending tokens to run through the target now. If these are all that is pending, a token is
            emitted; otherwise this is a chunk of a longer prefill.
        max_draft: tokens to draft at most; 0 unless the step emits.
        logprobs: None, or how many alternatives to report beside each emitted token.
        prompt_logprobs: the same for prompt tokens computed in this step.
        teacher_top_n: keep this many of the target's largest logits at every verified position; 0: none.
    """

    state: SequenceState
    num_tokens: int
    max_draft: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    teacher_top_n: int = 0

    @property
    def emits(self) -> bool:
        return self.num_tokens == self.state.num_pending


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step did for one sequence. `emitted` is empty while a prefill goes on.

    `failed`: the target's logits are not finite where a token was due. The sequence's state is of no use any more; its
    neighbours are not affected.
    """

    emitted: tuple[int, ...] = ()
    proposal: SequenceProposal = NOTHING
    num_accepted: int = 0
    expected_acceptance: tuple[float, ...] = ()  # at each position whose draft token was reached
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    teacher: tuple[TeacherRow, ...] = ()  # one per verified position: after each drafted token, and before the first
    failed: bool = False


@dataclass(frozen=True, slots=True)
class StepResult:
    outputs: tuple[StepOutput, ...]  # in the order of the work
    draft_seconds: float
    verify_seconds: float  # target forward, sampling and acceptance
    num_target_tokens: int

    @property
    def only_decodes(self) -> bool:
        """Whether every sequence had one token pending, besides what was drafted."""
        return self.num_target_tokens == sum(1 + len(output.proposal.token_ids) for output in self.outputs)


@dataclass(frozen=True, slots=True)
class Verified:
    """What verification said of one sequence's newest tokens, for who wants to score another draft on them.

    Attributes:
        state: after the step; its last `len(probs)` tokens are the emitted ones.
        probs: p of every emitted token, at the request's own sampling parameters, [emitted, vocab_size] float32. Only
            lent: valid during the call.
        proposal, expected_acceptance: what served, and its Σ_v min(p, q) at the first positions of `probs`.
    """

    state: SequenceState
    probs: Tensor
    proposal: SequenceProposal
    expected_acceptance: tuple[float, ...]


class StepObserver(Protocol):
    """Looks at verified positions. It must not change a state."""

    def observe(self, verified: Sequence[Verified]) -> None:
        """Called once at the end of a step that emitted anything."""


@dataclass(frozen=True, slots=True)
class _Accepted:
    """Verdict of one sequence, on the host."""

    num_accepted: int
    final_token: int
    expected: tuple[float, ...]
    finite: bool  # every row the verdict rests on
    probs: Tensor | None  # of the emitted tokens, [num_accepted + 1, vocab_size]; None: nobody needed them


@torch.inference_mode()
def speculative_step(
    work: Sequence[Work], target: ModelRunner, proposer: Proposer | None, observer: StepObserver | None = None
) -> StepResult:
    """Advance every sequence by one step and update its state (tokens appended, KV reach moved)."""
    states = [w.state for w in work]
    started = time.perf_counter()
    if proposer is not None and any(w.max_draft for w in work):
        proposal = proposer.propose(states, [w.max_draft if w.emits else 0 for w in work])
    else:
        proposal = nothing_proposed(len(work), target.vocab_size, target.device)
    proposed = time.perf_counter()

    chunks = [_chunk(w, p) for w, p in zip(work, proposal.sequences, strict=True)]
    logits = target.forward(chunks)
    rows = logits.split_with_sizes([c.num_logits for c in chunks])
    accepted = _accept(work, proposal, logits, rows, with_probs=observer is not None)
    teacher = _teacher(work, proposal, logits, rows, accepted)

    outputs: list[StepOutput] = []
    verified_now: list[Verified] = []
    for w, p, own_rows, verdict, labels in zip(work, proposal.sequences, rows, accepted, teacher, strict=True):
        prompt_scores = _prompt_logprobs(w, own_rows)
        if verdict is None:
            w.state.num_computed += w.num_tokens
            outputs.append(StepOutput(prompt_logprobs=prompt_scores))
            continue
        if not verdict.finite:
            outputs.append(StepOutput(failed=True))
            continue
        emitted = (*p.token_ids[: verdict.num_accepted], verdict.final_token)
        verified = own_rows[-(len(p.token_ids) + 1) :]
        outputs.append(
            StepOutput(
                emitted,
                p,
                verdict.num_accepted,
                verdict.expected,
                () if w.logprobs is None else token_logprobs(verified[: len(emitted)], list(emitted), w.logprobs),
                prompt_scores,
                labels,
            )
        )
        if p.token_ids and proposer is not None:
            proposer.settle(w.state, verdict.num_accepted, p)
        w.state.num_computed = len(w.state.token_ids) + verdict.num_accepted
        w.state.token_ids.extend(emitted)
        if verdict.probs is not None:
            verified_now.append(Verified(w.state, verdict.probs, p, verdict.expected))
    finished = time.perf_counter()
    if observer is not None and verified_now:
        observer.observe(verified_now)
    num_target_tokens = sum(len(chunk.token_ids) for chunk in chunks)
    return StepResult(tuple(outputs), proposed - started, finished - proposed, num_target_tokens)


def _chunk(work: Work, proposal: SequenceProposal) -> Chunk:
    """The target's input for one sequence: its pending tokens, then what was drafted."""
    state = work.state
    pending = state.token_ids[state.num_computed : state.num_computed + work.num_tokens]
    tokens = [*pending, *proposal.token_ids]
    num_logits = len(proposal.token_ids) + 1 if work.emits else 0
    if work.prompt_logprobs is not None and state.num_computed < state.num_prompt_tokens:
        num_logits = len(tokens)
    return Chunk(tokens, state.num_computed, state.block_ids, num_logits)


def _prompt_logprobs(work: Work, rows: Tensor) -> tuple[TokenLogprob, ...]:
    """Scores of the prompt tokens that follow the positions computed in this step (the prompt's first has none)."""
    state = work.state
    if work.prompt_logprobs is None or state.num_computed >= state.num_prompt_tokens:
        return ()
    first = state.num_computed + 1
    scored = state.token_ids[first : min(first + work.num_tokens, state.num_prompt_tokens)]
    return token_logprobs(rows[: len(scored)], scored, work.prompt_logprobs) if scored else ()


def _teacher(
    work: Sequence[Work],
    proposal: Proposal,
    logits: Tensor,
    rows: Sequence[Tensor],
    accepted: Sequence[_Accepted | None],
) -> list[tuple[TeacherRow, ...]]:
    """Per sequence, labels of the position before each drafted token and of the one after the last, if wanted."""
    result: list[tuple[TeacherRow, ...]] = [()] * len(work)
    wanted: dict[int, list[int]] = {}
    for i, (w, verdict) in enumerate(zip(work, accepted, strict=True)):
        if w.teacher_top_n and verdict is not None and verdict.finite:
            wanted.setdefault(w.teacher_top_n, []).append(i)
    for num_top, members in wanted.items():
        verified = _verified(members, proposal, logits, rows)
        labels = iter(teacher_rows(verified, num_top, _sampling_rows(work, proposal, members)))
        for i in members:
            result[i] = tuple(islice(labels, len(proposal.sequences[i].token_ids) + 1))
    return result


def _verified(members: Sequence[int], proposal: Proposal, logits: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """The rows that test these sequences' drafted tokens and the one after, in order; no copy if they are all."""
    counts = [len(proposal.sequences[i].token_ids) + 1 for i in members]
    if sum(counts) == len(logits):
        return logits
    return torch.cat([rows[i][-count:] for i, count in zip(members, counts, strict=True)])


def _sampling_rows(work: Sequence[Work], proposal: Proposal, members: Sequence[int]) -> list[SamplingRow]:
    """What the rows of `_verified` are processed with."""
    return [
        work[i].state.sampling_row(proposal.sequences[i].token_ids[:j])
        for i in members
        for j in range(len(proposal.sequences[i].token_ids) + 1)
    ]


def _accept(
    work: Sequence[Work], proposal: Proposal, logits: Tensor, rows: Sequence[Tensor], *, with_probs: bool
) -> list[_Accepted | None]:
    """Sample or verify every emitting sequence; None for those in the middle of a prefill."""
    result: list[_Accepted | None] = [None] * len(work)
    # what a rule costs is in passes over [rows, vocab_size]; at temperature 0 one is enough
    rules: dict[Coupling | None, list[int]] = {}
    for i, w in enumerate(work):
        if w.emits:
            rules.setdefault(None if w.state.params.is_greedy else w.state.coupling, []).append(i)
    for coupling, members in rules.items():
        drafts = [proposal.sequences[i].token_ids for i in members]
        verified = _verified(members, proposal, logits, rows)
        sampling_rows = _sampling_rows(work, proposal, members)
        largest, choice = peaks(verified)
        probs: Tensor | None = None
        if coupling is None:
            adjusted = adjusted_logits(verified, sampling_rows)
            if adjusted is not verified:
                _, choice = peaks(adjusted)
            verdict = accept_choice(choice.tolist(), drafts)
            alphas = _greedy_acceptance(choice, proposal, members, drafts)
            if with_probs:
                probs = torch.zeros_like(verified, dtype=torch.float32).scatter_(1, choice.unsqueeze(1), 1.0)
        else:
            probs = probabilities(verified, sampling_rows)
            layout = Layout.of([len(d) for d in drafts], logits.device)
            drafted = proposal.drafted_tokens(members, logits.device)
            verdict = _couple(coupling, probs, drafted, layout, [work[i] for i in members], drafts)
            alphas = expected_acceptance(probs, drafted, layout).tolist()
        finite = [math.isfinite(value) for value in largest.tolist()]
        draft_start = row_start = 0
        for i, d, count, token in zip(members, drafts, verdict.num_accepted, verdict.final_token, strict=True):
            reached = min(count + 1, len(d))
            result[i] = _Accepted(
                count,
                token,
                tuple(alphas[draft_start : draft_start + reached]),
                all(finite[row_start : row_start + count + 1]),
                None if probs is None else probs[row_start : row_start + count + 1],
            )
            draft_start += len(d)
            row_start += len(d) + 1
    return result


def _greedy_acceptance(
    choice: Tensor, proposal: Proposal, members: Sequence[int], drafts: Sequence[tuple[int, ...]]
) -> list[float]:
    """Expected acceptance at every drafted token of these sequences where p is one-hot: q of the target's pick."""
    if not any(drafts):
        return []
    tested = Layout.of([len(d) for d in drafts], choice.device).draft_rows
    alphas: list[float] = proposal.drafted_tokens(members, choice.device).probability_of(choice[tested]).tolist()
    return alphas


def _couple(
    coupling: Coupling,
    probs: Tensor,
    drafted: DraftedTokens,
    layout: Layout,
    work: Sequence[Work],
    drafts: Sequence[tuple[int, ...]],
) -> Verdict:
    """Apply one coupling with each sequence's own randomness; row j of a sequence is output position n + j."""
    row_keys: list[int] = []
    row_positions: list[int] = []
    for w, draft in zip(work, drafts, strict=True):
        row_keys += [w.state.key] * (len(draft) + 1)
        row_positions += range(w.state.num_output_tokens, w.state.num_output_tokens + len(draft) + 1)
    keys, positions = as_key_tensor(row_keys, probs.device), torch.tensor(row_positions, device=probs.device)
    if coupling is Coupling.DRAFTER_INVARIANT:
        return accept_choice(keyed_race(probs, keys, positions).tolist(), drafts)
    accept = uniforms(keys, positions, Purpose.ACCEPT)[layout.draft_rows]
    # keyed by the row the token ends up on, which is known only after acceptance: give every row its own number
    return accept_maximal(probs, drafted, layout, accept, uniforms(keys, positions, Purpose.RECOVER))
