"""Values that go into and come out of the clients: frozen, and free of protobuf types."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeAlias, TypedDict


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `role` is "system", "user", "assistant" or one that the template knows."""

    role: str
    content: str


Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or chat messages (rendered with the model's template)."""


class Coupling(enum.StrEnum):
    """How the draft's samples are tied to the target's; both keep the target's distribution exact."""

    MAXIMAL = "maximal"
    DRAFTER_INVARIANT = "drafter_invariant"
    UNKNOWN = "unknown"
    """Only in answers: a coupling of a newer server."""


class GenerateParams(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`.

    Left out or None means the server's default; meaning, unit and limits of each are in
    proto/redraft/v1/generation.proto under the same name.
    """

    request_id: str | None
    model: str | None
    add_generation_prompt: bool | None
    # how a token is drawn
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    logit_bias: Mapping[int, float] | None
    coupling: Coupling | None
    n: int | None
    # when to end
    max_new_tokens: int | None
    min_new_tokens: int | None
    stop_sequences: Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_sequence: bool | None
    ignore_eos: bool | None
    # what the answer contains
    logprobs: int | None
    prompt_logprobs: int | None
    token_ids: bool | None
    truncate_prompt_tokens: int | None
    # speculation and privacy
    speculation: bool | None
    max_draft_tokens: int | None
    exclude_from_traffic_log: bool | None
    domain: str | None


class FinishReason(enum.StrEnum):
    """Why a choice ended. UNKNOWN: a reason of a newer server."""

    EOS = "eos"
    STOP_SEQUENCE = "stop_sequence"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    SHUTDOWN = "shutdown"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the most probable tokens at a position; `logprob` is natural."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the target. `logprob` is None for the first token of a prompt."""

    token_id: int
    text: str
    logprob: float | None
    rank: int
    top: tuple[TopLogprob, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished completion. `matched_stop` is the stop sequence (str) or token id (int) that ended it."""

    index: int
    text: str
    finish_reason: FinishReason
    matched_stop: str | int | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one stream message adds to one choice. `finish_reason` is set in the choice's last delta only."""

    index: int
    text: str
    finish_reason: FinishReason | None = None
    matched_stop: str | int | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request, over all of its choices."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Wall-clock times inside the server, in seconds."""

    queue: float = 0.0
    time_to_first_token: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """What speculation did for a request, over all of its choices; fields as in generation.proto.

    `usage.completion_tokens == accepted_tokens + verify_steps - truncated_tokens` holds for every finished request.
    """

    draft_version: str = ""
    spec_steps: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    acceptance_histogram: tuple[int, ...] = ()
    max_draft_tokens: int = 0
    expected_acceptance_sum: float = 0.0
    expected_acceptance_positions: int = 0
    verify_steps: int = 0
    truncated_tokens: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted tokens, 0 to 1; None if nothing was drafted."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else None

    @property
    def mean_acceptance_length(self) -> float | None:
        """Tokens emitted per speculative step, the target's own included; None without such a step."""
        return 1 + self.accepted_tokens / self.spec_steps if self.spec_steps else None

    @property
    def expected_acceptance(self) -> float | None:
        """Mean of the sum over the vocabulary of min(target, draft) probability; None if not measured."""
        positions = self.expected_acceptance_positions
        return self.expected_acceptance_sum / positions if positions else None


@dataclass(frozen=True, slots=True)
class Completion:
    """Facts of a finished request. `seed` is the one that was used, given or drawn by the server."""

    model: str
    model_revision: str
    usage: Usage
    timings: Timings
    speculation: SpeculationStats
    seed: int
    coupling: Coupling | None


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A finished generation: `choices` ordered by index, and the facts of the request."""

    request_id: str
    choices: tuple[Choice, ...]
    completion: Completion
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def usage(self) -> Usage:
        return self.completion.usage

    @property
    def timings(self) -> Timings:
        return self.completion.timings

    @property
    def speculation(self) -> SpeculationStats:
        return self.completion.speculation


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """One stream message. The last one has no deltas and has `completion` set."""

    request_id: str
    deltas: tuple[ChoiceDelta, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    completion: Completion | None = None

    @property
    def text(self) -> str:
        """New text of choice 0; empty if the message has none."""
        return "".join(delta.text for delta in self.deltas if delta.index == 0)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids, and the text of each if it was asked for."""

    token_ids: tuple[int, ...]
    token_texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenCount:
    """Number of tokens of an input, and how many the model can hold (prompt and completion together)."""

    token_count: int
    context_length: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A loaded target and how it speculates; fields as in model.proto."""

    id: str
    revision: str
    context_length: int
    vocab_size: int
    target_fingerprint: str
    tokenizer_fingerprint: str
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    quantization: str
    proposer: str
    max_draft_tokens: int
    draft_version: str


class DraftState(enum.StrEnum):
    """Where a draft is in its life. UNKNOWN: a state of a newer server."""

    CANDIDATE = "candidate"
    SHADOW = "shadow"
    CANARY = "canary"
    ACTIVE = "active"
    PREVIOUS = "previous"
    REFUSED = "refused"
    RETIRED = "retired"
    ROLLED_BACK = "rolled_back"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft model; acceptances and `share` are 0 to 1, None if not measured."""

    version: str
    parent_version: str
    state: DraftState
    target_fingerprint: str
    tokenizer_fingerprint: str
    create_time: datetime | None
    expected_acceptance: float | None
    realised_acceptance: float | None
    draft_tokens: int
    share: float
    refusal_reason: str


@dataclass(frozen=True, slots=True)
class DraftSwap:
    """Result of an activation or roll-back: the draft that serves now, and the one that served before."""

    active: Draft
    previous: Draft | None
