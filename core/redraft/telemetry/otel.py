"""Spans to an OpenTelemetry collector, over OTLP/HTTP. Needs `redraft[otel]`; imported only if a collector is set.

Spans wait in a bounded queue for a thread of their own, which sends them in batches. Ending a span is an append to that
queue: a slow or absent collector costs spans, which are counted, and never a request's time.

The SDK reads what is not a setting of ours from its own environment variables: `OTEL_EXPORTER_OTLP_HEADERS` (a key for
the collector), `OTEL_EXPORTER_OTLP_CERTIFICATE`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_SERVICE_NAME`, `OTEL_BSP_*` (sizes
of the queue and the batches).
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from importlib.metadata import version
from typing import Protocol

from grpc import StatusCode as GrpcCode
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    format_trace_id,
    set_span_in_context,
)
from opentelemetry.trace import Tracer as SdkTracer

from redraft.telemetry.tracing import Attributes, RpcSpan, TraceContext

EXPORT_TIMEOUT_S = 10.0
"""Longest time for one batch, its retries included; then it is given up and counted as failed."""

_SERVICE_NAME = "redraft-server"
# Those of a server that are its own fault, by OpenTelemetry's conventions for RPCs
_SERVER_ERRORS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})


class SpanObserver(Protocol):
    """Counts spans. Called from any thread."""

    def observe_spans(self, result: str, count: int) -> None:
        """Spans that have `ended`; of these, `exported` ones and those whose batch has `failed`. The rest waits in
        the queue, or was dropped because that was full."""


class OtelTracer:
    """Implements `redraft.telemetry.tracing.Tracer`.

    Args:
        exporter: where batches go, see `otlp_exporter`.
        sample_ratio: fraction of the traces begun here that are recorded, by their id. A caller's own decision holds
            for the traces that it began.
        observer: counts the spans.
    """

    def __init__(self, exporter: SpanExporter, sample_ratio: float, observer: SpanObserver) -> None:
        self._exporter = _CountingExporter(exporter, observer)
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)), resource=_resource(), shutdown_on_exit=False
        )
        self._provider.add_span_processor(_Counter(observer))
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("redraft")

    def start_rpc(self, service: str, method: str, parent: TraceContext | None) -> RpcSpan:
        context = None if parent is None else set_span_in_context(NonRecordingSpan(_span_context(parent)))
        span = self._tracer.start_span(
            f"{service}/{method}",
            context=context,
            kind=SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
        )
        return _OtelSpan(span, self._tracer)

    def close(self, timeout_s: float) -> None:
        """Send what is left, for at most `timeout_s`; what a collector has not taken by then is lost."""
        # The SDK would wait for half a minute while the collector is away
        flush = threading.Thread(target=self._provider.shutdown, name="trace-flush", daemon=True)
        flush.start()
        flush.join(timeout_s)
        self._exporter.shutdown()


def otlp_exporter(endpoint: str) -> SpanExporter:
    """An exporter to the OTLP/HTTP receiver at `endpoint`, path included (`http://collector:4318/v1/traces`)."""
    return OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)


class _OtelSpan:
    """Implements `RpcSpan`."""

    def __init__(self, span: Span, tracer: SdkTracer) -> None:
        self._span = span
        self._tracer = tracer

    @property
    def trace_id(self) -> str:
        return format_trace_id(self._span.get_span_context().trace_id)

    def add_phase(self, name: str, start_ns: int, end_ns: int, attributes: Attributes) -> None:
        below = set_span_in_context(self._span)
        self._tracer.start_span(name, context=below, start_time=start_ns, attributes=attributes).end(end_ns)

    def end(self, code: str, attributes: Attributes) -> None:
        self._span.set_attributes({"rpc.grpc.status_code": GrpcCode[code].value[0], **attributes})
        if code in _SERVER_ERRORS:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class _Counter(SpanProcessor):
    def __init__(self, observer: SpanObserver) -> None:
        self._observer = observer

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is not None and span.context.trace_flags.sampled:
            self._observer.observe_spans("ended", 1)


class _CountingExporter(SpanExporter):
    def __init__(self, inner: SpanExporter, observer: SpanObserver) -> None:
        self._inner = inner
        self._observer = observer
        self._lock = threading.Lock()
        self._closed = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            if not self._closed:  # the SDK would log each further batch
                result = self._inner.export(spans)
        finally:
            name = "exported" if result is SpanExportResult.SUCCESS else "failed"
            self._observer.observe_spans(name, len(spans))
        return result

    def shutdown(self) -> None:
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            self._inner.shutdown()


def _resource() -> Resource:
    """Who the spans are of; the environment may say otherwise."""
    own = {"service.name": _SERVICE_NAME, "service.version": version("redraft")}
    own["service.instance.id"] = socket.gethostname()
    return Resource.create({**own, **OTELResourceDetector().detect().attributes})


def _span_context(parent: TraceContext) -> SpanContext:
    flags = TraceFlags(TraceFlags.SAMPLED if parent.sampled else TraceFlags.DEFAULT)
    return SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True, trace_flags=flags)
