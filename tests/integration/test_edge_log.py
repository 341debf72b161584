"""What an RPC leaves behind: log lines and trailers with its ids, and spans."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from redraft.telemetry.metrics import ServerMetrics
from redraft.telemetry.otel import OtelTracer
from redraft.v1 import generation_pb2 as pb
from redraft.v1 import model_pb2, model_pb2_grpc
from redraft_server.app import App
from tests.edge import Edge, edge_config, limited, running_edge
from tests.fake_engine import FakeEngine
from tests.log_lines import json_log

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = (("traceparent", f"00-{TRACE_ID}-{SPAN_ID}-01"),)


async def test_every_rpc_is_counted_and_logged_without_text() -> None:
    with json_log() as log:
        async with running_edge() as edge:
            await edge.generate(limited(1, request_id="r9"))
            with pytest.raises(grpc.aio.AioRpcError):
                await edge.generate(pb.Generation(text="PRIVATE", model="other", request_id="r10"))
            with pytest.raises(grpc.aio.AioRpcError) as unusable:
                await edge.generate(pb.Generation(text="PRIVATE", request_id="PRIVATE\n"))
    lines = log.of("redraft.rpc")
    named = dict(unusable.value.trailing_metadata() or ())["x-request-id"]
    assert [(line["code"], line["request_id"]) for line in lines] == [
        ("OK", "r9"),
        ("NOT_FOUND", "r10"),
        ("INVALID_ARGUMENT", named),
    ]
    assert "PRIVATE" not in log.text
    labels = {"grpc_service": "redraft.v1.GenerationService", "grpc_method": "Generate"}
    for code in ("OK", "NOT_FOUND", "INVALID_ARGUMENT"):
        assert edge.metric("grpc_server_handled_total", grpc_code=code, **labels) == 1


async def test_trailers_name_the_request_and_the_trace() -> None:
    """Of an answer, a stream and a refusal: each is found in the log by either id."""
    with json_log() as log:
        async with running_edge() as edge:
            call = edge.generation.Generate(pb.GenerateRequest(generation=limited(1)))
            reply = await call
            stream = edge.stream(limited(1, request_id="mine"), metadata=SAMPLED)
            assert [part async for part in stream]
            models: Any = model_pb2_grpc.ModelServiceStub(edge.channel)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await models.GetModel(model_pb2.GetModelRequest(model="other"))
            trailers = [
                dict(await call.trailing_metadata()),
                dict(await stream.trailing_metadata()),
                dict(refused.value.trailing_metadata() or ()),
            ]
    ids = [(found["x-request-id"], found["x-trace-id"]) for found in trailers]
    assert ids[0][0] == reply.request_id
    assert ids[1] == ("mine", TRACE_ID)
    assert [(line["request_id"], line["trace_id"]) for line in log.of("redraft.rpc")] == ids
    assert len(set(ids)) == 3
    assert all(len(trace_id) == 32 for _, trace_id in ids)


async def test_a_bad_traceparent_is_no_error_and_begins_a_new_trace() -> None:
    async with running_edge() as edge:
        call = edge.generation.Generate(
            pb.GenerateRequest(generation=limited(1)), metadata=(("traceparent", f"00-{TRACE_ID}-{SPAN_ID}"),)
        )
        assert (await call).choices[0].text == "a"
        assert dict(await call.trailing_metadata())["x-trace-id"] != TRACE_ID


@asynccontextmanager
async def traced_edge(engine: FakeEngine, ratio: float = 1.0) -> AsyncIterator[tuple[Edge, InMemorySpanExporter]]:
    registry = CollectorRegistry()
    metrics = ServerMetrics(registry, "fake")
    memory = InMemorySpanExporter()
    app = App(edge_config(), engine, metrics, registry, tracer=OtelTracer(memory, ratio, metrics))
    async with app, grpc.aio.insecure_channel(app.address) as channel:
        yield Edge(app, engine, channel, registry), memory


def by_name(spans: tuple[ReadableSpan, ...]) -> dict[str, ReadableSpan]:
    named = {span.name: span for span in spans}
    assert len(named) == len(spans)
    return named


async def test_spans_of_a_request() -> None:
    async with traced_edge(FakeEngine()) as (edge, memory):
        await edge.generate(limited(3, request_id="r1"), metadata=SAMPLED)
    spans = by_name(memory.get_finished_spans())  # leaving has flushed
    rpc = spans.pop("redraft.v1.GenerationService/Generate")
    assert rpc.parent is not None
    assert (f"{rpc.parent.trace_id:032x}", f"{rpc.parent.span_id:016x}") == (TRACE_ID, SPAN_ID)
    assert rpc.attributes is not None
    assert rpc.attributes["redraft.request_id"] == "r1"
    assert rpc.attributes["rpc.grpc.status_code"] == 0
    assert list(spans) == ["queue", "prefill", "decode"]
    assert [span.parent for span in spans.values()] == [rpc.context] * 3
    assert spans["prefill"].attributes == {"gen_ai.usage.input_tokens": 2, "redraft.cached_prompt_tokens": 0}
    assert spans["decode"].attributes == {
        "gen_ai.usage.output_tokens": 3,
        "redraft.finish_reason": "length",
        "redraft.verify_steps": 3,
        "redraft.draft_tokens": 0,
        "redraft.accepted_tokens": 0,
        "redraft.draft_version": "d1",
    }
    ends = [(span.start_time, span.end_time) for span in spans.values()]
    assert [after[0] for after in ends[1:]] == [before[1] for before in ends[:-1]]
    assert edge.metric("redraft_trace_spans_total", result="ended") == 4
    assert edge.metric("redraft_trace_spans_total", result="exported") == 4


async def test_spans_of_requests_that_fail() -> None:
    async with traced_edge(FakeEngine(fail_at=2)) as (edge, memory):
        with pytest.raises(grpc.aio.AioRpcError):
            await edge.generate(limited(1, model="other"))
        with pytest.raises(grpc.aio.AioRpcError):
            await edge.generate(limited(5))
    refused, *phases, failed = memory.get_finished_spans()
    assert refused.attributes is not None
    assert refused.attributes["rpc.grpc.status_code"] == grpc.StatusCode.NOT_FOUND.value[0]
    assert refused.status.is_unset  # the caller's mistake
    assert [span.name for span in phases] == ["queue", "prefill", "decode"]
    assert not failed.status.is_unset
    assert phases[-1].attributes is not None
    assert phases[-1].attributes["redraft.finish_reason"] == "error"


async def test_a_request_that_its_client_gives_up_has_no_decode() -> None:
    engine = FakeEngine()
    async with traced_edge(engine) as (edge, memory):
        engine.gate.clear()
        call = edge.stream(limited(5))
        await call.initial_metadata()
        call.cancel()
        assert (await call.code()) is grpc.StatusCode.CANCELLED
    names = [span.name for span in memory.get_finished_spans()]
    assert sorted(names) == ["prefill", "queue", "redraft.v1.GenerationService/StreamGenerate"]


async def test_the_caller_decides_about_its_trace_and_the_ratio_about_ours() -> None:
    async with traced_edge(FakeEngine(), ratio=0.0) as (edge, memory):
        await edge.generate(limited(1))
        await edge.generate(limited(1), metadata=(("traceparent", f"00-{TRACE_ID}-{SPAN_ID}-00"),))
        await edge.generate(limited(1), metadata=SAMPLED)
    contexts = [span.context for span in memory.get_finished_spans()]
    assert len(contexts) == 4
    assert {f"{context.trace_id:032x}" for context in contexts if context is not None} == {TRACE_ID}
