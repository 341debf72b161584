"""What the engine and the RPC layer report to :class:`redraft.telemetry.metrics.ServerMetrics`.

Plain values only, so that the reporting code needs no Prometheus and a test can compare with `==`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class SequenceStep(NamedTuple):
    """One sequence's part of one verify step.

    The version is per sequence, not per step: with an n-gram proposer in front of the draft model, or with
    two draft versions live during a rollout, one batch holds the work of different proposers.
    """

    draft_version: str
    """Version of the draft (or name of the proposer, e.g. `ngram`) that made the proposal."""
    drafted: int
    """Tokens proposed; 0 for a sequence that only decoded, which then counts as no draft at all."""
    accepted: int
    """Tokens accepted, `0 <= accepted <= drafted`; the recovered or bonus token is not counted."""
    expected_acceptance_sum: float = 0.0
    """Sum over the counted positions of Σ_v min(p_v, q_v), each in [0, 1]."""
    expected_acceptance_positions: int = 0
    """Number of positions in that sum."""


@dataclass(frozen=True, slots=True)
class StepObservation:
    """One engine step: propose, then one target forward, then accept."""

    sequences: tuple[SequenceStep, ...]
    """The sequences that decoded in this step (prefill-only sequences need not be listed)."""
    verify_seconds: float
    """Wall time of the target forward with sampling and acceptance."""
    num_sequences: int
    """Sequences in the batch, prefill and decode together."""
    num_tokens: int
    """Positions in the target forward."""
    draft_seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall time of drafting per draft version; a version that drafted nothing in this step is left out."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Sequences that decoded without a draft, by reason (`SKIP_REASONS` in `metrics`)."""
    inter_token_seconds: Sequence[float] = ()
    """For each sequence that emitted, and not for the first time: the time since it last did. One gap per
    delivery, however many tokens it brought."""


@dataclass(frozen=True, slots=True)
class DraftDescription:
    """A draft in memory, as the rollout knows it."""

    role: str
    """`active`, `candidate` (loaded, serves nobody), `canary`, `previous`, or `leaving`."""
    share: float
    """Of new requests, 0 to 1."""
    created_unix_s: float | None = None
    """When it was made; None for a draft that no registry knows, as are the next two."""
    promised: float | None = None
    """Expected acceptance measured before it was published."""
    baseline: float | None = None
    """That of the draft it was compared with."""


@dataclass(frozen=True, slots=True)
class RequestObservation:
    """One request that reached its end, successfully or not.

    Times that the request never reached are `None` (a request refused at admission has no queue time).
    """

    method: str
    """RPC method name without its service, e.g. `StreamGenerate`."""
    code: str
    """gRPC status name, e.g. `OK`."""
    finish_reason: str
    """Finish reason of the first sample; empty when generation never started."""
    duration_seconds: float
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    """From leaving the queue to the first token."""
    time_to_first_token_seconds: float | None = None
    """From arrival to the first token: queue and prefill together."""
    decode_seconds: float | None = None
    """From the first to the last token."""
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache."""
    generation_tokens: int = 0
    """Output tokens, all samples together."""
    num_samples: int = 1
    """Samples that the request asked for; they decode side by side."""
