"""The one place where the server is put together: engine, tokenizer, RPCs, metrics, and how they start and end."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from prometheus_client import CollectorRegistry, ProcessCollector

from redraft.errors import ConfigError
from redraft.telemetry.exporter import MetricsExporter
from redraft.telemetry.metrics import ServerMetrics
from redraft.telemetry.tracing import TraceIdsOnly, Tracer
from redraft.v1 import draft_pb2_grpc, generation_pb2_grpc, model_pb2_grpc, tokenizer_pb2_grpc
from redraft_server.config import ServerConfig, TracingConfig
from redraft_server.engine.api import EngineClient
from redraft_server.rpc import lifecycle
from redraft_server.rpc.draft_service import DraftServicer
from redraft_server.rpc.generation import GenerationServicer
from redraft_server.rpc.interceptors import RpcInterceptor
from redraft_server.rpc.model_service import ModelServicer
from redraft_server.rpc.text import TextService, TextTokenizer
from redraft_server.rpc.tokenizer_service import TokenizerServicer
from redraft_server.security.access import AccessControl
from redraft_server.security.certificates import server_credentials
from redraft_server.security.credentials import Credentials, load_credentials
from redraft_server.security.reloaded import Follower
from redraft_server.traffic_log import TrafficLog

if TYPE_CHECKING:  # it brings torch
    from redraft_server.rollout.manager import Rollout

ROLLOUT_STOP_S = 5.0
"""Longest wait for a draft that is just being loaded."""

TRACER_CLOSE_S = 2.0
"""Longest wait for the last spans to be sent."""

_END_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_log = logging.getLogger("redraft.app")


class TextEngine(EngineClient, Protocol):
    """An engine together with its target's tokenizer."""

    @property
    def tokenizer(self) -> TextTokenizer: ...


class App:
    """A server around an engine that runs. Use as `async with`: entering serves, leaving ends at once.

    Leaving stops the engine too. For a graceful end, await `drain` before leaving.
    """

    def __init__(
        self,
        config: ServerConfig,
        engine: TextEngine,
        metrics: ServerMetrics,
        registry: CollectorRegistry,
        traffic_log: TrafficLog | None = None,
        rollout: Rollout | None = None,
        tracer: Tracer | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.address = ""
        self.metrics_address: str | None = None
        self._metrics = metrics
        self._registry = registry
        self._traffic_log = traffic_log
        self._rollout = rollout
        self._text = TextService(engine.tokenizer, engine.info.context_length)
        if traffic_log is not None:
            traffic_log.read_with(partial(engine.tokenizer.decode, skip_special_tokens=False))
        self._health = lifecycle.HealthReporter(engine)
        self._tracer = tracer or TraceIdsOnly()
        self._credentials = credentials or load_credentials(config)
        keys = self._credentials.keys
        self._access = None if keys is None else AccessControl(keys, metrics.security)
        self._follower = Follower(self._credentials.files, metrics.security, self._use_credentials)
        self._rpcs = RpcInterceptor(metrics, self._tracer, self._access)
        self._exporter: MetricsExporter | None = None
        self._draining = False

    async def __aenter__(self) -> Self:
        self._server = lifecycle.create_server(self.config.grpc, self._rpcs)
        try:
            await self._start()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._end()

    async def drain(self, hurry: asyncio.Event | None = None) -> None:
        """End gracefully, see `lifecycle.drain`. Setting `hurry` ends the waiting."""
        self._draining = True
        if self._rollout is not None:  # no new draft any more; those in service serve to the end
            await asyncio.to_thread(self._rollout.stop, ROLLOUT_STOP_S)
        await lifecycle.drain(
            self._server, self.engine, self._health, self._rpcs, self.config.drain, hurry or asyncio.Event()
        )

    async def _start(self) -> None:
        config, engine, server = self.config, self.engine, self._server
        generation = GenerationServicer(engine, self._text, config.limits, config.traffic_log, self._metrics)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(generation, server)
        tokenizer = TokenizerServicer(engine, self._text)
        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(tokenizer, server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(engine, self._text), server)
        draft_pb2_grpc.add_DraftServiceServicer_to_server(DraftServicer(engine, self._rollout), server)
        lifecycle.add_reflection(server)
        await self._health.start(server)
        certificates = self._credentials.certificates
        secured = None if certificates is None else server_credentials(certificates)
        port = lifecycle.bind(server, config.grpc, secured)
        self._use_credentials()
        self._follower.start()
        self.address = f"{config.grpc.host}:{port}"
        if config.metrics.enabled:
            self._exporter = self._start_exporter()
            self.metrics_address = f"{config.metrics.host}:{self._exporter.port}"
        await server.start()
        if self._traffic_log is not None:
            self._traffic_log.start_retention()
        if self._rollout is not None:
            self._rollout.start()

    def _start_exporter(self) -> MetricsExporter:
        config = self.config.metrics
        try:
            return MetricsExporter(self._registry, config.host, config.port, self._is_ready)
        except OSError as error:
            address = f"{config.host}:{config.port}"
            raise ConfigError(
                f"metrics.host, metrics.port: cannot listen on {address}: {error.strerror}; "
                "take another port, or set metrics.enabled to false"
            ) from None

    def _use_credentials(self) -> None:
        """They are as of now: keys and certificates take effect by themselves, what depends on them does here."""
        if self._access is not None:
            self._access.keys_changed()
        if self._credentials.certificates is not None:
            for certificate, unix_s in self._credentials.certificates.value.expiry.items():
                self._metrics.security.set_certificate_expiry(certificate, unix_s)

    def _is_ready(self) -> bool:
        return self.engine.is_ready and not self._draining

    async def _end(self) -> None:
        """Stop whatever is still up. Harmless after `drain`."""
        self._draining = True
        if self._rollout is not None:
            await asyncio.to_thread(self._rollout.stop, ROLLOUT_STOP_S)
        await asyncio.to_thread(self.engine.stop, 1.0)
        await self._server.stop(None)
        await self._follower.close()
        if self._traffic_log is not None:
            await self._traffic_log.close()
        await self._health.close()
        self._text.close()
        if self._exporter is not None:
            await asyncio.to_thread(self._exporter.close)
        await asyncio.to_thread(self._tracer.close, TRACER_CLOSE_S)


def build(config: ServerConfig) -> App:
    """Load the models and start the engine. Blocks for as long as that takes.

    Raises:
        RedraftError: if a model cannot be used or a setting does not fit it.
    """
    # Imported here because it brings torch, for which `__main__` has to set the environment first.
    from redraft.models.ref import ModelRef
    from redraft.models.source import resolve_source
    from redraft_server.engine.build import build_engine
    from redraft_server.rollout.start import DraftSupply, configured_draft

    credentials = load_credentials(config)
    target = resolve_source(ModelRef.parse(config.model.target), cache_dir=config.model.cache_dir)
    registry, metrics = _create_metrics(config, target.name)
    tracer = _create_tracer(config.tracing, metrics)
    url = config.traffic_log.url
    traffic_log = None if url is None else TrafficLog(url, config.traffic_log, metrics)
    writer = None if traffic_log is None else traffic_log.writer
    if config.registry.url is None:
        built = build_engine(config, metrics, writer, first_draft=partial(configured_draft, config))
        return App(config, built.engine, metrics, registry, traffic_log, tracer=tracer, credentials=credentials)
    supply = DraftSupply(config, metrics)
    built = build_engine(config, metrics, writer, first_draft=supply.first, monitor=supply.monitor)
    rollout = supply.rollout(built.engine, built.host, built.draft)
    return App(config, built.engine, metrics, registry, traffic_log, rollout, tracer, credentials)


async def serve(app: App, on_started: Callable[[App], None]) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the draining."""
    loop = asyncio.get_running_loop()
    asked_to_end, hurry = asyncio.Event(), asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        _log.info("signal", extra={"signal": number.name})
        (hurry if asked_to_end.is_set() else asked_to_end).set()

    for number in _END_SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        async with app:
            on_started(app)
            await asked_to_end.wait()
            await app.drain(hurry)
    finally:
        for number in _END_SIGNALS:
            loop.remove_signal_handler(number)


@asynccontextmanager
async def running_server(config: ServerConfig, engine: TextEngine) -> AsyncIterator[str]:
    """A server around a given engine, for tests and embedding; yields its address. Leaving ends it at once."""
    registry, metrics = _create_metrics(config, engine.info.model)
    async with App(config, engine, metrics, registry) as app:
        yield app.address


def _create_metrics(config: ServerConfig, model: str) -> tuple[CollectorRegistry, ServerMetrics]:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    longest_draft = max(1, config.speculation.num_speculative_tokens)
    return registry, ServerMetrics(registry, model, max_draft_tokens=longest_draft)


def _create_tracer(config: TracingConfig, metrics: ServerMetrics) -> Tracer:
    if config.endpoint is None:
        return TraceIdsOnly()
    try:
        from redraft.telemetry.otel import OtelTracer, otlp_exporter
    except ImportError:
        raise ConfigError("tracing.endpoint needs OpenTelemetry: pip install 'redraft[otel]'") from None
    return OtelTracer(otlp_exporter(config.endpoint), config.sample_ratio, metrics)
