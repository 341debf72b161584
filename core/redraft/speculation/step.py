"""One step of decoding for a batch of sequences: propose -> verify -> accept -> settle.

The same function serves, and evaluates a draft offline. With nothing proposed it is plain decoding; with pending
prompt tokens it is (chunked) prefill; there is no other path.

Worked example, k = 3: a sequence holds tokens [.., t], KV of all but t. The draft proposes d0 d1 d2. The target runs
t d0 d1 d2 and gives p0..p3. If d0 is accepted and d1 is not, d0 and a recovered token r (drawn at p1) are emitted;
the sequence is [.., t, d0, r] with KV of all but r: the KV of d1 and d2 is overwritten when those positions come again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from redraft.models.runner import Chunk, ModelRunner
from redraft.sampling.logprobs import TeacherRow, TokenLogprob, token_logprobs
from redraft.speculation.ahead import verify_ahead
from redraft.speculation.proposer import NOTHING, Proposal, Proposer, SequenceProposal, nothing_proposed
from redraft.speculation.state import SequenceState
from redraft.speculation.verify import SequenceVerdict, verify
from redraft.transfer import Stopwatch


@dataclass(frozen=True, slots=True)
class Work:
    """What a step shall do for one sequence.

    Attributes:
        num_tokens: pending tokens to run through the target now. If these are all that is pending, a token is
            emitted; otherwise this is a chunk of a longer prefill.
        max_draft: tokens to draft at most; 0 unless the step emits.
        logprobs: None, or how many alternatives to report beside each emitted token.
        prompt_logprobs: the same for prompt tokens computed in this step.
        teacher_top_n: keep this many of the target's largest logits at every verified position; 0: none. Where a step
            is asked for several numbers, the largest holds.
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


def speculative_step(
    work: Sequence[Work], target: ModelRunner, proposer: Proposer | None, observer: StepObserver | None = None
) -> StepResult:
    """Advance every sequence by one step and update its state (tokens appended, KV reach moved)."""
    return begin_step(work, target, proposer, observer).finish()


@torch.inference_mode()
def begin_step(
    work: Sequence[Work], target: ModelRunner, proposer: Proposer | None, observer: StepObserver | None = None
) -> StepUnderWay:
    """Give the device all of a step's work. Where `target.runs_ahead`, nothing of it need be done on return."""
    states = [w.state for w in work]
    watch = Stopwatch(target.device)
    watch.mark()
    if proposer is not None and any(w.max_draft for w in work):
        proposal = proposer.propose(states, [w.max_draft if w.emits else 0 for w in work])
    else:
        proposal = nothing_proposed(len(work))
    if not target.runs_ahead:
        proposal = proposal.on_host()
    watch.mark()

    chunks = [_chunk(w, p) for w, p in zip(work, proposal.sequences, strict=True)]
    logits = target.forward(chunks, proposal.drawn)
    ends = list(accumulate(chunk.num_logits for chunk in chunks))
    emitting = [i for i, w in enumerate(work) if w.emits]
    judge = verify_ahead if target.runs_ahead else _verify_at_once
    collect = judge(
        states,
        proposal,
        emitting,
        _verified(proposal, emitting, logits, ends),
        num_top=max((work[i].teacher_top_n for i in emitting), default=0),
        with_probs=observer is not None,
    )
    watch.mark()  # what is left is the host's
    return StepUnderWay(work, proposer, observer, chunks, logits, ends, collect, watch)


@dataclass(frozen=True, slots=True)
class StepUnderWay:
    """A step whose verdicts have not been looked at; no state has changed but the reach of the draft's KV."""

    work: Sequence[Work]
    proposer: Proposer | None
    observer: StepObserver | None
    chunks: Sequence[Chunk]
    logits: Tensor
    ends: Sequence[int]  # of each sequence's rows among the logits
    collect: Callable[[], tuple[dict[int, SequenceVerdict], Proposal]]
    watch: Stopwatch

    @torch.inference_mode()
    def finish(self) -> StepResult:
        """Wait for the verdicts and apply them."""
        verdicts, proposal = self.collect()
        outputs: list[StepOutput] = []
        verified_now: list[Verified] = []
        rows = zip(self.work, proposal.sequences, self.chunks, self.ends, strict=True)
        for i, (w, p, chunk, end) in enumerate(rows):
            prompt_scores = _prompt_logprobs(w, self.logits, end - chunk.num_logits)
            verdict = verdicts.get(i)
            if verdict is None:
                w.state.num_computed += w.num_tokens
                outputs.append(StepOutput(prompt_logprobs=prompt_scores))
                continue
            if not verdict.finite:
                outputs.append(StepOutput(failed=True))
                continue
            emitted = (*p.token_ids[: verdict.num_accepted], verdict.final_token)
            outputs.append(
                StepOutput(
                    emitted,
                    p,
                    verdict.num_accepted,
                    verdict.expected,
                    _logprobs(w, self.logits, end - len(p.token_ids) - 1, emitted),
                    prompt_scores,
                    verdict.labels if w.teacher_top_n else (),
                )
            )
            if p.token_ids and self.proposer is not None:
                self.proposer.settle(w.state, verdict.num_accepted, p)
            w.state.num_computed = len(w.state.token_ids) + verdict.num_accepted
            w.state.token_ids.extend(emitted)
            if verdict.probs is not None:
                verified_now.append(Verified(w.state, verdict.probs, p, verdict.expected))
        draft_seconds, verify_seconds = self.watch.laps()
        if self.observer is not None and verified_now:
            self.observer.observe(verified_now)
        num_target_tokens = sum(len(chunk.token_ids) for chunk in self.chunks)
        return StepResult(tuple(outputs), draft_seconds, verify_seconds, num_target_tokens)


def _verify_at_once(
    states: Sequence[SequenceState], proposal: Proposal, members: Sequence[int], logits: Tensor, **options: Any
) -> Callable[[], tuple[dict[int, SequenceVerdict], Proposal]]:
    """`verify` in the form of `verify_ahead`."""
    verdicts = verify(states, proposal, members, logits, **options)
    return lambda: (verdicts, proposal)


def _chunk(work: Work, proposal: SequenceProposal) -> Chunk:
    """The target's input for one sequence: its pending tokens, then what was drafted."""
    state = work.state
    pending = state.token_ids[state.num_computed : state.num_computed + work.num_tokens]
    tokens = [*pending, *proposal.token_ids]
    num_logits = len(proposal.token_ids) + 1 if work.emits else 0
    if work.prompt_logprobs is not None and state.num_computed < state.num_prompt_tokens:
        num_logits = len(tokens)
    return Chunk(tokens, state.num_computed, state.block_ids, num_logits)


# Rows are sliced only where they are needed: a view is an operation of torch's, and a pass has just emptied the caches.


def _logprobs(work: Work, logits: Tensor, first: int, emitted: Sequence[int]) -> tuple[TokenLogprob, ...]:
    """Scores of the emitted tokens, if wanted, by the rows from `first` on."""
    if work.logprobs is None:
        return ()
    return token_logprobs(logits[first : first + len(emitted)], list(emitted), work.logprobs)


def _prompt_logprobs(work: Work, logits: Tensor, first_row: int) -> tuple[TokenLogprob, ...]:
    """Scores of the prompt tokens that follow the positions computed in this step (the prompt's first has none), by the
    rows from `first_row` on."""
    state = work.state
    if work.prompt_logprobs is None or state.num_computed >= state.num_prompt_tokens:
        return ()
    first = state.num_computed + 1
    scored = state.token_ids[first : min(first + work.num_tokens, state.num_prompt_tokens)]
    if not scored:
        return ()
    return token_logprobs(logits[first_row : first_row + len(scored)], scored, work.prompt_logprobs)


def _verified(proposal: Proposal, members: Sequence[int], logits: Tensor, ends: Sequence[int]) -> Tensor:
    """The rows that test these sequences' drafted tokens and the one after, in order; no copy if they are all. `ends`:
    where each sequence's rows end."""
    counts = [len(proposal.sequences[i].token_ids) + 1 for i in members]
    if sum(counts) == len(logits):
        return logits
    return torch.cat([logits[:0], *(logits[ends[i] - n : ends[i]] for i, n in zip(members, counts, strict=True))])
