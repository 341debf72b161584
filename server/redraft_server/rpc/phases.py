"""A finished request as spans below its RPC: queue, prefill, decode."""

from __future__ import annotations

from redraft.telemetry.tracing import Attributes, RpcSpan
from redraft_server.engine.api import RequestFinished


def add_phases(span: RpcSpan, admitted_ns: int, end: RequestFinished, finish_reason: str) -> None:
    """Add what the request went through; `admitted_ns` is Unix time. A phase that it did not reach is left out."""
    queued = admitted_ns + _ns(end.queue_s)
    span.add_phase("queue", admitted_ns, queued, {})
    if end.prefill_s <= 0.0:
        return
    prefilled = queued + _ns(end.prefill_s)
    prompt: Attributes = {
        "gen_ai.usage.input_tokens": end.prompt_tokens,
        "redraft.cached_prompt_tokens": end.cached_prompt_tokens,
    }
    span.add_phase("prefill", queued, prefilled, prompt)
    if end.time_to_first_token_s is None:
        return
    counts = end.speculation
    completion: Attributes = {
        "gen_ai.usage.output_tokens": end.completion_tokens,
        "redraft.finish_reason": finish_reason,
        "redraft.verify_steps": counts.verify_steps,
        "redraft.draft_tokens": counts.draft_tokens,
        "redraft.accepted_tokens": counts.accepted_tokens,
        "redraft.draft_version": counts.draft_version,
    }
    span.add_phase("decode", prefilled, prefilled + _ns(end.decode_s), completion)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
