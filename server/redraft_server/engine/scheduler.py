"""Which sequences run in the next step, with how many tokens, in which blocks.

There are no phases. Every sequence's target KV catches up with its tokens: by one token a step in steady decoding,
by up to the whole budget while a prompt is new. Decoding sequences come first, so a long prompt takes what they
leave of the step and never stalls them longer than one step of `max_batch_tokens`. What they draft is limited to an
equal share of the budget, so that neither the last of them nor the prompt is left with nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from redraft.models.block_pool import ROOT_HASH, BlockPool, chain_hash
from redraft.speculation.state import SequenceState
from redraft.speculation.step import Work
from redraft_server.engine.admission import WaitingQueue
from redraft_server.engine.request import Completion, Status


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_running: int  # sequences in a step
    max_batch_tokens: int  # target tokens in a step, drafts included
    max_model_len: int  # positions of a sequence
    num_speculative_tokens: int
    teacher_top_n: int = 0


@dataclass(frozen=True, slots=True)
class Scheduled:
    completion: Completion
    work: Work


class Scheduler:
    """Owns the waiting queue, the running list and the sequences' blocks. Not thread-safe: engine thread only."""

    def __init__(self, pool: BlockPool, limits: SchedulerLimits) -> None:
        self.pool = pool
        self.limits = limits
        self.waiting = WaitingQueue()
        self.running: list[Completion] = []  # in order of admission
        self.draft_epoch = 0  # of the draft in service: prefix blocks of another epoch have no draft KV
        self.epoch_of: Callable[[SequenceState], int] = lambda state: self.draft_epoch  # where several drafts serve
        self.num_preemptions = 0
        self._refused: tuple[Completion, int] | None = None  # who did not fit, and into how many free blocks

    def add(self, completion: Completion) -> None:
        self.waiting.push(completion)

    def schedule(self) -> list[Scheduled]:
        """Choose the next step's work. Preempts the youngest sequences when blocks run out."""
        self._admit()
        budget = self.limits.max_batch_tokens
        plan: dict[Completion, Work] = {}
        order = sorted(self.running, key=lambda c: c.state.num_pending > 1)  # stable: decoding first
        for index, completion in enumerate(order):
            if completion.status is not Status.RUNNING or budget <= 0:
                continue  # preempted by one before it, or left for the next step
            self._adopt_draft_kv(completion.state)
            share = max(1, budget // (len(order) - index))
            work = self._work_for(completion, share if completion.state.num_pending == 1 else budget)
            if self._reserve(completion, work, plan):
                plan[completion] = work
            elif work.max_draft and self._reserve(completion, without_draft := self._work_for(completion, 1), plan):
                plan[completion] = without_draft
            elif not self._reserve_by_preemption(completion, plan):
                continue
            work = plan[completion]
            budget -= work.num_tokens + work.max_draft
        return [Scheduled(completion, work) for completion, work in plan.items()]

    def settle(self, completion: Completion) -> None:
        """After a step: make blocks that have become full and final findable by their prefix."""
        state = completion.state
        size = self.pool.block_size
        while (state.num_registered_blocks + 1) * size <= state.num_computed:
            index = state.num_registered_blocks
            state.prefix_hash = chain_hash(state.prefix_hash, state.token_ids[index * size : (index + 1) * size])
            self.pool.register(state.block_ids[index], state.prefix_hash)
            state.num_registered_blocks += 1
        filled = state.num_draft_computed // size
        for index in range(min(state.num_draft_marked_blocks, filled), filled):
            self.pool.mark_draft(state.block_ids[index], state.draft_epoch)
        state.num_draft_marked_blocks = filled

    def remove(self, completion: Completion) -> None:
        """Take a completion out for good, wherever it is, and give its blocks back."""
        if completion.status is Status.RUNNING:
            self.running.remove(completion)
        elif completion.status is Status.WAITING and completion in self.waiting:
            self.waiting.remove(completion)
        if self._refused is not None and self._refused[0] is completion:
            self._refused = None  # or it would be kept alive until the next refusal
        self._release(completion.state)
        completion.status = Status.FINISHED

    def check_integrity(self) -> None:
        """Assert the invariants; cheap enough for tests to call after every operation."""
        self.pool.check_integrity([c.state.block_ids for c in self.running])
        assert len(self.running) <= self.limits.max_running
        assert all(c.status is Status.RUNNING for c in self.running)
        for completion in self.waiting:
            assert completion.status is Status.WAITING
            assert not completion.state.block_ids
        for completion in self.running:
            state = completion.state
            assert 0 <= state.num_computed < len(state.token_ids)
            assert 0 <= state.num_draft_computed <= len(state.token_ids)
            assert len(state.block_ids) * self.pool.block_size >= state.num_computed

    def _admit(self) -> None:
        """Move completions from waiting to running while there is a place and room for their whole prompt."""
        while len(self.running) < self.limits.max_running and (completion := self.waiting.peek()) is not None:
            if self._refused is not None and self._refused[0] is completion and self.pool.num_free <= self._refused[1]:
                return  # nothing was given back: spare it hashing its prompt in every step
            state = completion.state
            reuse = completion.request.spec.prompt_logprobs is None  # their logits are needed, so is their forward
            found, prefix_hash = self.pool.acquire_prefix(state.token_ids) if reuse else ([], ROOT_HASH)
            own = self.pool.allocate(self.pool.blocks_for(len(state.token_ids)) - len(found))
            if own is None:
                self.pool.release(found)
                self._refused = completion, self.pool.num_free
                return
            self.waiting.pop()
            self.running.append(completion)
            completion.status = Status.RUNNING
            state.block_ids = found + own
            state.num_registered_blocks = len(found)
            state.prefix_hash = prefix_hash
            state.num_computed = len(found) * self.pool.block_size
            state.draft_epoch = self.epoch_of(state)
            state.num_draft_marked_blocks = state.num_draft_computed = 0
            # what the target need not compute again, the draft should not either: if it must, it is another draft now
            state.draft_rebuild_end = state.num_computed
            state.num_admissions += 1
            if completion.index == 0 and completion.request.first_scheduled is None:
                completion.request.cached_prompt_tokens = state.num_computed

    def _adopt_draft_kv(self, state: SequenceState) -> None:
        """Count the draft KV of shared blocks that another sequence has filled, before the prefix hit or since.

        Since: all of a request's samples find the prompt's blocks before the first of them has drafted.
        """
        epoch = self.epoch_of(state)
        if state.draft_epoch != epoch:
            return
        size = self.pool.block_size
        while (index := state.num_draft_computed // size) < state.num_registered_blocks:
            if self.pool.draft_epoch(state.block_ids[index]) != epoch:
                return
            state.num_draft_computed = (index + 1) * size

    def _work_for(self, completion: Completion, budget: int) -> Work:
        state = completion.state
        spec = completion.request.spec
        num_tokens = min(state.num_pending, budget)
        max_draft = 0
        if spec.speculation and state.num_pending == 1:
            own_limit = self.limits.num_speculative_tokens
            if spec.max_draft_tokens is not None:
                own_limit = min(own_limit, spec.max_draft_tokens)
            room = self.limits.max_model_len - len(state.token_ids) - 1
            # the step emits one token more than it accepts
            max_draft = max(0, min(own_limit, completion.num_left - 1, room, budget - num_tokens))
        return Work(
            state,
            num_tokens,
            max_draft,
            logprobs=spec.logprobs,
            prompt_logprobs=spec.prompt_logprobs if completion.index == 0 else None,
            teacher_top_n=self.limits.teacher_top_n if spec.log_traffic else 0,
        )

    def _reserve(self, completion: Completion, work: Work, plan: dict[Completion, Work]) -> bool:
        """Give the sequence blocks for every position the step may write."""
        state = completion.state
        positions = state.num_computed + work.num_tokens + work.max_draft
        missing = self.pool.blocks_for(positions) - len(state.block_ids)
        if missing > 0:
            blocks = self.pool.allocate(missing)
            if blocks is None:
                return False
            state.block_ids.extend(blocks)
        plan[completion] = work
        return True

    def _reserve_by_preemption(self, completion: Completion, plan: dict[Completion, Work]) -> bool:
        """Evict the youngest until the sequence's next token fits; give up if it is the youngest itself."""
        while True:
            victim = self.running[-1]
            self._preempt(victim, plan)
            if victim is completion:
                return False
            if self._reserve(completion, self._work_for(completion, 1), plan):
                return True

    def _preempt(self, completion: Completion, plan: dict[Completion, Work]) -> None:
        """Back to waiting without blocks; its tokens are kept and recomputed (mostly from the prefix cache) later."""
        plan.pop(completion, None)
        self.running.remove(completion)
        self._release(completion.state)
        completion.status = Status.WAITING
        self.waiting.push_front(completion)
        self.num_preemptions += 1

    def _release(self, state: SequenceState) -> None:
        self.pool.release(state.block_ids)
        state.block_ids = []
        state.num_computed = state.num_draft_computed = 0
        state.num_registered_blocks = state.num_draft_marked_blocks = 0
        state.prefix_hash = ROOT_HASH
