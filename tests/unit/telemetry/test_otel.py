"""Spans on their way to a real OTLP receiver: they arrive; and when it is away, nothing waits for it."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from redraft.telemetry.otel import OtelTracer, otlp_exporter

QUEUE = 2048
"""The SDK's bound on waiting spans."""


class Spans:
    """Counts what became of spans."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._changed = threading.Condition()

    def observe_spans(self, result: str, count: int) -> None:
        with self._changed:
            self.counts[result] += count
            self._changed.notify_all()

    def wait_for(self, result: str, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.counts[result] >= count, 30.0), self.counts


@contextmanager
def receiver(status: int = 200) -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """An OTLP/HTTP receiver: its URL, and what it was sent."""
    received: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces"
            assert self.headers["content-type"] == "application/x-protobuf"
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_spans(tracer: OtelTracer, count: int) -> None:
    for _ in range(count):
        tracer.start_rpc("redraft.v1.S", "M", None).end("OK", {})


def test_spans_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    spans = Spans()
    with receiver() as (url, received):
        tracer = OtelTracer(otlp_exporter(url), 1.0, spans)
        rpc = tracer.start_rpc("redraft.v1.GenerationService", "Generate", None)
        rpc.add_phase("decode", 10**18, 10**18 + 5, {"redraft.draft_version": "d1", "redraft.draft_tokens": 3})
        rpc.end("INTERNAL", {"redraft.request_id": "r1"})
        tracer.close(10.0)
    (resource,) = [part for request in received for part in request.resource_spans]
    about = {item.key: item.value.string_value for item in resource.resource.attributes}
    assert about["service.name"] == "redraft-server"
    assert about["deployment.environment"] == "test"
    assert about["telemetry.sdk.language"] == "python"
    decode, server = resource.scope_spans[0].spans
    assert (server.name, server.status.code) == ("redraft.v1.GenerationService/Generate", 2)
    assert (decode.name, decode.parent_span_id, decode.trace_id) == ("decode", server.span_id, server.trace_id)
    assert (decode.start_time_unix_nano, decode.end_time_unix_nano) == (10**18, 10**18 + 5)
    assert server.trace_id.hex() == rpc.trace_id
    assert spans.counts == {"ended": 2, "exported": 2}


class Stuck(SpanExporter):
    """A collector that takes a batch and does not answer until told to."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.release = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.asked.set()
        assert self.release.wait(30.0)
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self.release.set()


def test_a_stuck_collector_costs_spans_beyond_the_queue_and_no_waiting() -> None:
    spans, stuck = Spans(), Stuck()
    tracer = OtelTracer(stuck, 1.0, spans)
    make_spans(tracer, 512)  # a batch
    assert stuck.asked.wait(30.0)
    make_spans(tracer, 2 * QUEUE)  # ends, though nothing is taken from the queue
    assert spans.counts == {"ended": 512 + 2 * QUEUE}
    stuck.release.set()
    tracer.close(30.0)
    assert spans.counts["exported"] == 512 + QUEUE


def test_closing_does_not_wait_for_a_stuck_collector() -> None:
    spans, stuck = Spans(), Stuck()
    tracer = OtelTracer(stuck, 1.0, spans)
    make_spans(tracer, 512)
    assert stuck.asked.wait(30.0)
    make_spans(tracer, 600)
    tracer.close(0.0)
    assert stuck.release.is_set()
    spans.wait_for("exported", 512)
    spans.wait_for("failed", 600)


def test_without_a_collector_spans_are_lost_and_counted() -> None:
    spans = Spans()
    tracer = OtelTracer(otlp_exporter(f"http://127.0.0.1:{unused_port()}/v1/traces"), 1.0, spans)
    make_spans(tracer, 3)
    tracer.close(0.0)
    spans.wait_for("failed", 3)
    assert spans.counts == {"ended": 3, "failed": 3}


def test_a_collector_that_refuses_is_a_failure() -> None:
    spans = Spans()
    with receiver(status=401) as (url, received):
        tracer = OtelTracer(otlp_exporter(url), 1.0, spans)
        make_spans(tracer, 3)
        tracer.close(10.0)
    assert len(received) == 1
    assert spans.counts == {"ended": 3, "failed": 3}


def test_a_server_without_a_collector_imports_no_opentelemetry() -> None:
    code = (
        "import sys, redraft_server.app, redraft_server.rpc.generation;"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
