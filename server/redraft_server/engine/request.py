"""A request inside the engine, and the n completions it asked for."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field
from enum import Enum

from redraft.sampling.logprobs import TeacherRow, TokenLogprob
from redraft.sampling.randomness import sequence_key
from redraft.speculation.draft_model import DraftModelProposer
from redraft.speculation.proposer import SequenceProposal
from redraft.speculation.state import SequenceState
from redraft.speculation.step import StepOutput
from redraft_server.engine.api import EngineRequest, FinishReason, Sink, SpeculationStats
from redraft_server.engine.output import CompletionOutput


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class VerifiedStep:
    """A verified step as the traffic log wants it."""

    start: int  # output index of the first drafted position
    proposal: SequenceProposal
    num_accepted: int
    teacher: tuple[TeacherRow, ...]


@dataclass(slots=True)
class DraftPart:
    """What a draft model did for a completion since it has been its draft: the sample that drafts are judged by."""

    version: str
    expected_sum: float = 0.0
    expected_positions: int = 0


@dataclass(slots=True)
class Counters:
    """Speculation statistics of one completion; see `SpeculationStats` for the identity they keep."""

    draft_version: str = ""
    verify_steps: int = 0
    spec_steps: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    truncated_tokens: int = 0
    histogram: list[int] = field(default_factory=list)
    expected_sum: float = 0.0
    expected_positions: int = 0
    model_part: DraftPart | None = None

    def observe(self, output: StepOutput) -> None:
        self.verify_steps += 1
        drafted = len(output.proposal.token_ids)
        if not drafted:
            return
        self.draft_version = output.proposal.draft_version
        self.spec_steps += 1
        self.draft_tokens += drafted
        self.accepted_tokens += output.num_accepted
        self.histogram.extend([0] * (drafted + 1 - len(self.histogram)))
        self.histogram[output.num_accepted] += 1
        self.expected_sum += sum(output.expected_acceptance)
        self.expected_positions += len(output.expected_acceptance)
        if output.proposal.proposer == DraftModelProposer.name:
            if self.model_part is None or self.model_part.version != output.proposal.draft_version:
                self.model_part = DraftPart(output.proposal.draft_version)
            self.model_part.expected_sum += sum(output.expected_acceptance)
            self.model_part.expected_positions += len(output.expected_acceptance)


@dataclass(slots=True, eq=False)
class Completion:
    """One of a request's n completions."""

    request: Request
    index: int
    state: SequenceState
    output: CompletionOutput
    max_new_tokens: int
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    counters: Counters = field(default_factory=Counters)
    steps: list[VerifiedStep] = field(default_factory=list)
    num_final_tokens: int = 0  # output tokens before the end; the state may hold more
    last_delivery: float | None = None

    @property
    def num_left(self) -> int:
        return self.max_new_tokens - self.state.num_output_tokens

    def note_delivery(self, now: float) -> float | None:
        """Tokens were delivered: seconds since the ones before, None for the first."""
        gap = None if self.last_delivery is None else now - self.last_delivery
        self.last_delivery = now
        return gap


@dataclass(slots=True, eq=False)
class Request:
    spec: EngineRequest
    sink: Sink
    arrived: float  # monotonic seconds, as are all times here
    completions: list[Completion] = field(default_factory=list)
    first_scheduled: float | None = None
    first_token: float | None = None
    cached_prompt_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    error: str | None = None
    seed: int = 0
    route: int = 0

    def __post_init__(self) -> None:
        digest = hashlib.blake2b(self.spec.request_id.encode(), digest_size=8).digest()
        self.route = int.from_bytes(digest)
        given = self.spec.sampling.seed
        # reported back: with it (and the coupling set) an unseeded completion can be had again
        self.seed = secrets.randbits(64) if given is None else given

    @property
    def is_finished(self) -> bool:
        return all(completion.status is Status.FINISHED for completion in self.completions)

    def new_state(self, index: int, end_token_ids: tuple[int, ...]) -> SequenceState:
        prompt = self.spec.prompt_token_ids
        return SequenceState(
            token_ids=list(prompt),
            num_prompt_tokens=len(prompt),
            params=self.spec.sampling,
            key=sequence_key(self.seed, index),
            min_new_tokens=self.spec.stopping.min_new_tokens,
            end_token_ids=end_token_ids,
            route=self.route,
        )

    def speculation_stats(self, max_draft_tokens: int) -> SpeculationStats:
        """Sums over the completions."""
        parts = [completion.counters for completion in self.completions]
        histogram = [0] * max((len(part.histogram) for part in parts), default=0)
        for part in parts:
            for accepted, count in enumerate(part.histogram):
                histogram[accepted] += count
        return SpeculationStats(
            draft_version=next((part.draft_version for part in reversed(parts) if part.draft_version), ""),
            verify_steps=sum(part.verify_steps for part in parts),
            spec_steps=sum(part.spec_steps for part in parts),
            draft_tokens=sum(part.draft_tokens for part in parts),
            accepted_tokens=sum(part.accepted_tokens for part in parts),
            truncated_tokens=sum(part.truncated_tokens for part in parts),
            acceptance_histogram=tuple(histogram),
            max_draft_tokens=max_draft_tokens,
            expected_acceptance_sum=sum(part.expected_sum for part in parts),
            expected_acceptance_positions=sum(part.expected_positions for part in parts),
        )
