"""Held-out prompts generated again through the very `speculative_step` that the server runs: realised acceptance.

Where `scores` asks what a draft would do on the target's text, a replay lets the two work together: the draft sees its
own proposals, steps start where the one before ended. Slower (every token is decoded), so for a bounded sample.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from redraft.models.block_pool import BlockPool
from redraft.models.runner import ModelRunner
from redraft.sampling.randomness import mix64, sequence_key
from redraft.speculation.proposer import Proposer
from redraft.speculation.state import SequenceState
from redraft.speculation.step import StepOutput, Work, speculative_step
from redraft_training.dataset.example import Example
from redraft_training.evaluate.errors import EvaluationError, NothingToScore
from redraft_training.evaluate.progress import batch_progress
from redraft_training.evaluate.scores import bucket_name, position_buckets


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """Attributes:
    num_speculative_tokens: k, at least 1.
    max_requests, max_new_tokens: bounds of the work.
    batch_size: sequences decoded together, as far as the KV cache has room.
    prefill_tokens: prompt tokens of all sequences in one step, at most.
    end_token_ids: end-of-text; generation stops behind it.
    seed: of the requests that have none of their own; the same seed gives the same replay.
    """

    num_speculative_tokens: int = 4
    max_requests: int = 64
    max_new_tokens: int = 64
    batch_size: int = 8
    prefill_tokens: int = 256
    end_token_ids: frozenset[int] = frozenset()
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = (self.num_speculative_tokens, self.max_requests, self.max_new_tokens, self.batch_size)
        if min(*sizes, self.prefill_tokens) < 1:
            raise ValueError("every bound of a replay must be at least 1")


@dataclass(frozen=True, slots=True)
class DraftTally:
    """Drafts that verification reached: how many were accepted, and the sum of their expected acceptance α."""

    tested: int = 0
    accepted: int = 0
    expected_sum: float = 0.0

    @property
    def acceptance(self) -> float:
        """NaN if none was tested."""
        return self.accepted / self.tested if self.tested else float("nan")

    @property
    def expected_acceptance(self) -> float:
        """What `acceptance` converges to under maximal coupling (an upper bound under the drafter-invariant one)."""
        return self.expected_sum / self.tested if self.tested else float("nan")

    def plus(self, accepted: bool, expected: float) -> DraftTally:
        return DraftTally(self.tested + 1, self.accepted + accepted, self.expected_sum + expected)


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """Counts as in the server's statistics: emitted = accepted + verify steps - truncated.

    Attributes:
        num_skipped: prompts that did not fit the KV cache.
        verify_steps: target steps that emitted, those that end a prefill and those without a draft included.
        truncated: verified but behind an end-of-text.
        histogram: [k + 1], steps with a draft that accepted exactly j tokens.
        depths: [k] drafts by their place in the proposal.
        domains, positions: drafts by the request's domain, and by output position (`0`, then doubling buckets).
        draft_seconds, verify_seconds: spent in decoding and prefill steps.
        output_token_ids: what every request got, in the order of the examples replayed.
    """

    num_requests: int
    num_skipped: int
    num_output_tokens: int
    verify_steps: int
    drafted: int
    accepted: int
    truncated: int
    histogram: tuple[int, ...]
    tested: DraftTally
    depths: tuple[DraftTally, ...]
    domains: dict[str, DraftTally]
    positions: dict[str, DraftTally]
    draft_seconds: float
    verify_seconds: float
    output_token_ids: tuple[tuple[int, ...], ...] = field(repr=False)

    @property
    def acceptance_rate(self) -> float:
        """accepted / drafted, as the server reports it: tokens behind a rejected one count as drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        return 1.0 + self.accepted / self.verify_steps


@dataclass(slots=True)
class _Sequence:
    index: int
    domain: str
    state: SequenceState

    def num_left(self, settings: ReplaySettings) -> int:
        return settings.max_new_tokens - self.state.num_output_tokens


def replay(
    examples: Sequence[Example], target: ModelRunner, proposer: Proposer, settings: ReplaySettings
) -> ReplayResult:
    """Generate from the prompts of the first `max_requests` examples, each with its own sampling parameters.

    Uses all KV blocks of the runners, so no engine may run on them at the same time. Raises `NothingToScore` if no
    prompt fits, `EvaluationError` if the target's logits are not finite.
    """
    run = _Replay(target, proposer, settings)
    chosen = [example for example in examples if example.prompt_token_ids][: settings.max_requests]
    waiting = deque(run.sequence(index, example) for index, example in enumerate(chosen) if run.fits(example))
    if not waiting:
        raise NothingToScore("no prompt to replay fits the KV cache")
    num_requests = len(waiting)
    with batch_progress("Replaying", num_requests) as advance:
        running: list[_Sequence] = []
        while waiting or running:
            run.admit(waiting, running)
            run.step(running)
            finished = [sequence for sequence in running if run.is_finished(sequence)]
            for sequence in finished:
                running.remove(sequence)
                run.finish(sequence)
                advance()
    return run.counts.result(num_requests, len(chosen) - num_requests, run.outputs)


class _Replay:
    def __init__(self, target: ModelRunner, proposer: Proposer, settings: ReplaySettings) -> None:
        self.target, self.proposer, self.settings = target, proposer, settings
        self.pool = BlockPool(target.num_blocks, target.block_size, prefix_cache=False)
        self.counts = _Counts(settings.num_speculative_tokens)
        self.outputs: dict[int, tuple[int, ...]] = {}

    def sequence(self, index: int, example: Example) -> _Sequence:
        prompt, params = example.prompt_token_ids, example.params
        own_seed = mix64(self.settings.seed) ^ mix64(index + 1) if params.seed is None else params.seed
        key = sequence_key(own_seed, example.sample_index)
        return _Sequence(index, example.domain, SequenceState(list(prompt), len(prompt), params, key))

    def num_blocks(self, num_prompt: int) -> int:
        return self.pool.blocks_for(num_prompt + self.settings.max_new_tokens + self.settings.num_speculative_tokens)

    def fits(self, example: Example) -> bool:
        num_prompt = len(example.prompt_token_ids)
        context = getattr(self.target.model.config.get_text_config(), "max_position_embeddings", None)
        fits_context = context is None or num_prompt + self.settings.max_new_tokens <= context
        return fits_context and self.num_blocks(num_prompt) <= self.pool.num_blocks

    def admit(self, waiting: deque[_Sequence], running: list[_Sequence]) -> None:
        while waiting and len(running) < self.settings.batch_size:
            state = waiting[0].state
            blocks = self.pool.allocate(self.num_blocks(state.num_prompt_tokens))
            if blocks is None:
                return
            state.block_ids = blocks
            running.append(waiting.popleft())

    def step(self, running: Sequence[_Sequence]) -> None:
        """Decoding sequences draft, as in the server; those with a prompt to compute share the rest."""
        budget = self.settings.prefill_tokens
        members: list[_Sequence] = []
        work: list[Work] = []
        for sequence in running:
            pending = sequence.state.num_pending
            if pending == 1:
                draft = min(self.settings.num_speculative_tokens, sequence.num_left(self.settings) - 1)
                members.append(sequence)
                work.append(Work(sequence.state, 1, max_draft=draft))
            elif budget:
                members.append(sequence)
                work.append(Work(sequence.state, min(pending, budget)))
                budget -= work[-1].num_tokens
        starts = [sequence.state.num_output_tokens for sequence in members]
        result = speculative_step(work, self.target, self.proposer)
        self.counts.draft_seconds += result.draft_seconds
        self.counts.verify_seconds += result.verify_seconds
        for sequence, start, output in zip(members, starts, result.outputs, strict=True):
            if output.failed:
                raise EvaluationError("the target's logits are not finite: check its checkpoint and dtype")
            if output.emitted:
                self.counts.add(sequence.domain, start, output)
                self._truncate(sequence.state, start)

    def is_finished(self, sequence: _Sequence) -> bool:
        ended = sequence.state.num_output_tokens > 0 and sequence.state.token_ids[-1] in self.settings.end_token_ids
        return ended or sequence.num_left(self.settings) <= 0

    def finish(self, sequence: _Sequence) -> None:
        state = sequence.state
        self.outputs[sequence.index] = tuple(state.token_ids[state.num_prompt_tokens :])
        self.pool.release(state.block_ids)
        state.block_ids = []
        self.counts.num_output_tokens += state.num_output_tokens

    def _truncate(self, state: SequenceState, start: int) -> None:
        """Cut off what was emitted behind an end-of-text."""
        first = state.num_prompt_tokens + start
        for at in range(first, len(state.token_ids)):
            if state.token_ids[at] in self.settings.end_token_ids:
                self.counts.truncated += len(state.token_ids) - at - 1
                del state.token_ids[at + 1 :]
                return


class _Counts:
    def __init__(self, k: int) -> None:
        self.num_output_tokens = self.verify_steps = self.drafted = self.accepted = self.truncated = 0
        self.draft_seconds = self.verify_seconds = 0.0
        self.histogram = [0] * (k + 1)
        self.tested = DraftTally()
        self.depths = [DraftTally()] * k
        self.domains: dict[str, DraftTally] = {}
        self.by_position: dict[int, DraftTally] = {}

    def add(self, domain: str, start: int, output: StepOutput) -> None:
        self.verify_steps += 1
        num_drafted = len(output.proposal.token_ids)
        if not num_drafted:
            return
        self.drafted += num_drafted
        self.accepted += output.num_accepted
        self.histogram[output.num_accepted] += 1
        for depth, expected in enumerate(output.expected_acceptance):
            accepted = depth < output.num_accepted
            position = start + depth
            self.tested = self.tested.plus(accepted, expected)
            self.depths[depth] = self.depths[depth].plus(accepted, expected)
            self.domains[domain] = self.domains.get(domain, DraftTally()).plus(accepted, expected)
            self.by_position[position] = self.by_position.get(position, DraftTally()).plus(accepted, expected)

    def result(self, num_requests: int, num_skipped: int, outputs: dict[int, tuple[int, ...]]) -> ReplayResult:
        return ReplayResult(
            num_requests,
            num_skipped,
            self.num_output_tokens,
            self.verify_steps,
            self.drafted,
            self.accepted,
            self.truncated,
            tuple(self.histogram),
            self.tested,
            tuple(self.depths),
            dict(sorted(self.domains.items())),
            self._buckets(),
            self.draft_seconds,
            self.verify_seconds,
            tuple(outputs[index] for index in sorted(outputs)),
        )

    def _buckets(self) -> dict[str, DraftTally]:
        result: dict[str, DraftTally] = {}
        # position 0 is drafted for where the last chunk of a prompt is a single token
        for first, last in [(0, 1), *position_buckets(max(self.by_position, default=0) + 1)]:
            own = [tested for position, tested in self.by_position.items() if first <= position < last]
            if own:
                result[bucket_name(first, last)] = DraftTally(
                    sum(t.tested for t in own), sum(t.accepted for t in own), sum(t.expected_sum for t in own)
                )
        return result
