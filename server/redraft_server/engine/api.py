"""What crosses the border between the gRPC edge and the engine: plain frozen data, and one protocol.

The edge never sees a tensor, the engine never sees protobuf. Requests go in by `EngineClient.submit`; everything that
comes back goes through the request's `sink`, which the engine calls on its own thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from redraft.sampling.logprobs import TokenLogprob
from redraft.sampling.params import SamplingParams, StoppingParams

__all__ = [
    "AdmissionError",
    "ChoiceDelta",
    "DuplicateRequestId",
    "EngineClient",
    "EngineEvent",
    "EngineInfo",
    "EngineRequest",
    "EngineUnavailable",
    "FinishReason",
    "QueueFull",
    "RequestFinished",
    "RequestTooLarge",
    "Sink",
    "SpeculationStats",
    "TokenLogprob",
]


class FinishReason(Enum):
    EOS = "eos"
    STOP_SEQUENCE = "stop_sequence"  # a stop string or a stop token id, see `ChoiceDelta.matched_stop`
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    SHUTDOWN = "shutdown"
    ERROR = "error"


class AdmissionError(Exception):
    """The engine does not take the request; nothing was started."""


class QueueFull(AdmissionError):
    """Try again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestTooLarge(AdmissionError):
    """Prompt + max_new_tokens can never fit. `field` names what to shorten."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class DuplicateRequestId(AdmissionError):
    """A live request has this id."""


class EngineUnavailable(AdmissionError):
    """Draining, stopped, or dead. `reason` is an upper-case word for ErrorInfo (SERVER_DRAINING, ENGINE_DEAD)."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One validated request. Ids are within the vocabulary, the prompt is not empty."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stopping: StoppingParams = field(default_factory=StoppingParams)
    n: int = 1
    logprobs: int | None = None  # None: none; 0: only the emitted token; k: with the k best alternatives
    prompt_logprobs: int | None = None
    speculation: bool = True
    max_draft_tokens: int | None = None  # None: the server's limit
    deadline: float | None = None  # time.monotonic() seconds
    tenant: str = ""
    domain: str = ""  # the application's word for this kind of traffic
    log_traffic: bool = True


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one step added to one of a request's n choices. `finish_reason` only in the choice's last delta."""

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    matched_stop: str | int | None = None


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """Sums over a request's choices. Identity: completion tokens = accepted_tokens + verify_steps - truncated_tokens.

    `verify_steps` counts every target step that emitted (also with no draft, also the one that ends the prefill);
    `spec_steps` those with at least one drafted token. `truncated_tokens` were verified but cut off by a stop.
    """

    draft_version: str = ""
    verify_steps: int = 0
    spec_steps: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    truncated_tokens: int = 0
    acceptance_histogram: tuple[int, ...] = ()  # index j: spec_steps that accepted exactly j
    max_draft_tokens: int = 0
    expected_acceptance_sum: float = 0.0
    expected_acceptance_positions: int = 0


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """Last event of a request, after every choice has had its finish_reason. Times in seconds."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int
    seed: int  # the request's, or the one the engine drew
    speculation: SpeculationStats
    queue_s: float
    time_to_first_token_s: float | None  # None: no token was produced
    prefill_s: float
    decode_s: float
    total_s: float
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # first entry None, as nothing precedes it
    error: str | None = None  # set with FinishReason.ERROR: an internal fault, safe to show (no prompt text)


EngineEvent = ChoiceDelta | RequestFinished
Sink = Callable[[list[EngineEvent]], None]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Constant facts the edge reports in ModelService and in the banner."""

    model: str
    model_revision: str
    vocab_size: int
    context_length: int
    max_prompt_tokens: int
    max_new_tokens_limit: int
    eos_token_ids: frozenset[int]
    target_fingerprint: str
    tokenizer_fingerprint: str
    proposer: str
    num_speculative_tokens: int
    draft_name: str | None
    draft_version: str
    kv_block_size: int
    kv_num_blocks: int
    kv_bytes: int
    weight_bytes: int
    dtype: str
    device: str


class EngineClient(Protocol):
    """The engine as the edge sees it. Every method may be called from any thread and never waits for a step."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def is_ready(self) -> bool: ...

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        """Admit a request or raise AdmissionError. `sink` is called on the engine thread with non-empty lists."""

    def cancel(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Stop a request at the next step boundary; its sink still gets RequestFinished. Unknown ids are ignored."""

    def estimated_queue_delay_s(self) -> float:
        """How long a request submitted now would wait before its first step, roughly."""

    def drain(self) -> None:
        """Refuse new requests with EngineUnavailable("SERVER_DRAINING"); running ones go on."""

    def num_unfinished(self) -> int: ...

    def stop(self, timeout_s: float) -> None:
        """End what is left with FinishReason.SHUTDOWN and join the engine thread."""
