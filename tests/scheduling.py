"""A stand-in for the models: steps that write what each KV slot holds, so that a wrong hit or a stale slot shows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

from redraft.models.block_pool import BlockPool
from redraft.sampling.params import SamplingParams
from redraft.speculation.state import SequenceState
from redraft_server.engine.api import EngineRequest
from redraft_server.engine.request import Completion, Request
from redraft_server.engine.scheduler import Scheduled, Scheduler, SchedulerLimits

_numbers = itertools.count()


def make_request(prompt: Sequence[int], *, max_new_tokens: int = 4, n: int = 1, **changes: Any) -> Request:
    spec = EngineRequest(f"s{next(_numbers)}", tuple(prompt), SamplingParams(), n=n, **changes)
    request = Request(spec, lambda events: None, 0.0)
    for index in range(n):
        request.completions.append(
            Completion(request, index, request.new_state(index, ()), cast(Any, None), max_new_tokens)
        )
    return request


class Simulation:
    """A scheduler with simulated models.

    A slot holds the whole prefix that its key and value depend on; before a sequence is stepped, every slot that it
    counts as computed must hold its own prefix.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 12,
        block_size: int = 2,
        max_running: int = 4,
        max_batch_tokens: int = 8,
        k: int = 3,
        prefix_cache: bool = True,
    ) -> None:
        self.pool = BlockPool(num_blocks, block_size, prefix_cache=prefix_cache)
        self.limits = SchedulerLimits(max_running, max_batch_tokens, num_blocks * block_size, k)
        self.scheduler = Scheduler(self.pool, self.limits)
        self.target: dict[int, tuple[int, ...]] = {}  # slot -> prefix
        self.draft: dict[int, tuple[int, tuple[int, ...]]] = {}  # slot -> epoch, prefix
        self.finished: list[Completion] = []
        self.requests: list[Request] = []

    def add(self, prompt: Sequence[int], **options: Any) -> Completion:
        request = make_request(prompt, **options)
        self.requests.append(request)
        self.scheduler.add(request.completions[0])
        return request.completions[0]

    def step(self, *, drafted: int = 99, accepted: int = 99, token: int = 0) -> list[Scheduled]:
        """Schedule and run one step: every sequence drafts and has accepted at most so many; emits `token`s."""
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        assert sum(s.work.num_tokens + s.work.max_draft for s in plan) <= self.limits.max_batch_tokens
        assert len({id(s.completion) for s in plan}) == len(plan)
        for s in plan:
            self._run(s, drafted, accepted, token)
        self.scheduler.check_integrity()
        return plan

    def cancel(self, completion: Completion) -> None:
        """The whole request, as the engine does."""
        for one in completion.request.completions:
            if one not in self.finished:
                self._finish(one)
        self.scheduler.check_integrity()

    def live(self) -> list[Completion]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    def run_out(self) -> None:
        """Until nothing is left; every request must end, in a number of steps that allows for preemptions."""
        completions = [c for request in self.requests if not request.is_finished for c in request.completions]
        for _ in range(10 * sum(c.state.num_prompt_tokens + c.max_new_tokens for c in completions)):
            if not self.live():
                break
            assert self.step(), "something is left, and nothing was scheduled"
        assert not self.live()
        assert self.pool.num_free == self.pool.num_blocks

    def _finish(self, completion: Completion) -> None:
        self.scheduler.remove(completion)
        self.finished.append(completion)

    def _run(self, s: Scheduled, drafted: int, accepted: int, token: int) -> None:
        state, work = s.work.state, s.work
        self._check_slots(state)
        pending = state.num_pending
        assert 1 <= work.num_tokens <= pending
        assert work.max_draft == 0 or work.num_tokens == pending == 1
        drafted = min(drafted, work.max_draft)
        draft_tokens = (token,) * drafted
        if drafted:
            self._draft(state, draft_tokens)
        end = state.num_computed + work.num_tokens
        tokens = (*state.token_ids, *draft_tokens) if drafted else tuple(state.token_ids)
        self._write(self.target, state, tokens, state.num_computed, end + drafted, lambda prefix: prefix)
        if work.num_tokens < pending:
            state.num_computed = end
            self.scheduler.settle(s.completion)
            return
        accepted = min(accepted, drafted)
        is_first = s.completion.index == 0 and state.num_output_tokens == 0
        if drafted:
            state.num_draft_computed = len(state.token_ids) + min(accepted, drafted - 1)
        state.num_computed = len(state.token_ids) + accepted
        state.token_ids.extend((*draft_tokens[:accepted], 1 - token))
        assert state.num_output_tokens <= s.completion.max_new_tokens
        assert len(state.token_ids) <= self.limits.max_model_len
        self.scheduler.settle(s.completion)
        if s.completion.num_left == 0:
            self._finish(s.completion)
        if is_first:
            for sibling in s.completion.request.completions[:0:-1]:
                self.scheduler.waiting.push_front(sibling)

    def _draft(self, state: SequenceState, draft_tokens: tuple[int, ...]) -> None:
        """As the draft model does: catch up with what is missing, then one token after the other."""
        epoch = self.scheduler.draft_epoch
        if state.draft_epoch != epoch:
            state.num_draft_computed, state.draft_epoch, state.num_draft_marked_blocks = 0, epoch, 0
        tokens = (*state.token_ids, *draft_tokens[:-1])
        self._write(self.draft, state, tokens, state.num_draft_computed, len(tokens), lambda prefix: (epoch, prefix))

    def _write(
        self, slots: dict[int, Any], state: SequenceState, tokens: tuple[int, ...], start: int, end: int, entry: Any
    ) -> None:
        for position in range(start, end):
            slots[self._slot(state, position)] = entry(tokens[: position + 1])

    def _check_slots(self, state: SequenceState) -> None:
        for position in range(state.num_computed):
            assert self.target.get(self._slot(state, position)) == tuple(state.token_ids[: position + 1])
        if state.draft_epoch == self.scheduler.draft_epoch:
            for position in range(state.num_draft_computed):
                expected = (state.draft_epoch, tuple(state.token_ids[: position + 1]))
                assert self.draft.get(self._slot(state, position)) == expected, f"stale draft KV at {position}"

    def _slot(self, state: SequenceState, position: int) -> int:
        size = self.pool.block_size
        return state.block_ids[position // size] * size + position % size
