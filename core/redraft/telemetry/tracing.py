"""Traces: the caller's trace context (W3C `traceparent`), and spans of the requests.

Every RPC belongs to a trace, its caller's or a new one, whose id is on the RPC's log lines. Spans are made and sent
only if a collector is configured: `redraft.telemetry.otel`, which alone imports OpenTelemetry. The spans of a request::

    redraft.v1.GenerationService/StreamGenerate      the RPC, a child of the caller's span
    ├── queue        admission to the first step
    ├── prefill      first step to first token: prompt_tokens, cached_prompt_tokens
    └── decode       first token to last: tokens, drafted, accepted, draft version

A span holds ids, counts, enumerations and times; never text, and nothing of the tenant.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

TRACEPARENT = "traceparent"
"""The metadata key that a caller's trace context comes under."""

Attributes = Mapping[str, str | int | float]

# https://www.w3.org/TR/trace-context/: a later version may append fields after another dash, version 00 may not
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_SAMPLED = 0x01


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A span as others refer to it: 32 and 16 lower-case hex digits, neither all zero, and whether it is recorded."""

    trace_id: str
    span_id: str
    sampled: bool


def parse_traceparent(values: Sequence[str]) -> TraceContext | None:
    """The context in the `traceparent` values of a call; None unless there is exactly one and it is valid."""
    if len(values) != 1:
        return None
    match = _TRACEPARENT.fullmatch(values[0])
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more is not None):
        return None
    if set(trace_id) == {"0"} or set(span_id) == {"0"}:
        return None
    return TraceContext(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))


def new_trace_id() -> str:
    return f"{secrets.randbits(128) or 1:032x}"


class RpcSpan(Protocol):
    """One RPC under way. Its methods never block and never raise; times are Unix nanoseconds."""

    @property
    def trace_id(self) -> str: ...

    def add_phase(self, name: str, start_ns: int, end_ns: int, attributes: Attributes) -> None:
        """Add a part of the RPC as a span below it; also after `end`."""

    def end(self, code: str, attributes: Attributes) -> None:
        """The RPC is over, with the gRPC status `code` (`OK`)."""


class Tracer(Protocol):
    """Where spans begin."""

    def start_rpc(self, service: str, method: str, parent: TraceContext | None) -> RpcSpan:
        """An RPC begins now; `parent` is the caller's context, if it sent one."""

    def close(self, timeout_s: float) -> None:
        """Send what is left, for at most that long."""


class TraceIdsOnly:
    """The `Tracer` of a server without a collector: RPCs have trace ids for the log, but no spans are made."""

    def start_rpc(self, service: str, method: str, parent: TraceContext | None) -> RpcSpan:
        return _IdOnly(parent.trace_id if parent is not None else new_trace_id())

    def close(self, timeout_s: float) -> None:
        """There is nothing to send."""


@dataclass(frozen=True, slots=True)
class _IdOnly:
    trace_id: str

    def add_phase(self, name: str, start_ns: int, end_ns: int, attributes: Attributes) -> None:
        """Not recorded."""

    def end(self, code: str, attributes: Attributes) -> None:
        """Not recorded."""
