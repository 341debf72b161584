"""Whose trace a call belongs to."""

from __future__ import annotations

import pytest

from redraft.telemetry.tracing import TraceContext, TraceIdsOnly, parse_traceparent

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("value", "sampled"),
    [
        (f"00-{TRACE_ID}-{SPAN_ID}-01", True),
        (f"00-{TRACE_ID}-{SPAN_ID}-00", False),
        (f"00-{TRACE_ID}-{SPAN_ID}-ff", True),
        (f"00-{TRACE_ID}-{SPAN_ID}-fe", False),
        (f"01-{TRACE_ID}-{SPAN_ID}-03", True),
        (f"cc-{TRACE_ID}-{SPAN_ID}-01-what-the-future-will-be", True),
    ],
)
def test_valid(value: str, sampled: bool) -> None:
    assert parse_traceparent([value]) == TraceContext(TRACE_ID, SPAN_ID, sampled)


@pytest.mark.parametrize(
    "value",
    [
        "",
        TRACE_ID,
        f"00-{TRACE_ID}-{SPAN_ID}",
        f"00-{TRACE_ID}-{SPAN_ID}-1",
        f"00-{TRACE_ID}-{SPAN_ID}-01-",
        f"00-{TRACE_ID}-{SPAN_ID}-01-more",
        f"cc-{TRACE_ID}-{SPAN_ID}-01.more",
        f"ff-{TRACE_ID}-{SPAN_ID}-01",
        f"0-{TRACE_ID}-{SPAN_ID}-01",
        f"00-{TRACE_ID.upper()}-{SPAN_ID}-01",
        f"00-{TRACE_ID[:-1]}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{SPAN_ID}0-01",
        f"00-{'0' * 32}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        f"00-{TRACE_ID[:-1]}g-{SPAN_ID}-01",
        f"00-{TRACE_ID[:-1]}\u0661-{SPAN_ID}-01",
        f"00_{TRACE_ID}_{SPAN_ID}_01",
        f" 00-{TRACE_ID}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{SPAN_ID}-01\n",
    ],
)
def test_invalid_is_as_good_as_none(value: str) -> None:
    assert parse_traceparent([value]) is None


def test_none_and_two_are_no_context() -> None:
    value = f"00-{TRACE_ID}-{SPAN_ID}-01"
    assert parse_traceparent([]) is None
    assert parse_traceparent([value, value]) is None


def test_without_a_collector_there_are_ids_all_the_same() -> None:
    tracer = TraceIdsOnly()
    own = {tracer.start_rpc("s", "m", None).trace_id for _ in range(3)}
    assert len(own) == 3
    assert all(parse_traceparent([f"00-{trace_id}-{SPAN_ID}-01"]) for trace_id in own)
    assert tracer.start_rpc("s", "m", TraceContext(TRACE_ID, SPAN_ID, sampled=False)).trace_id == TRACE_ID
