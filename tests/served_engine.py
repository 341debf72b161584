"""A real engine on tiny models behind a real gRPC server on loopback, and the public client connected to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from redraft.telemetry.metrics import ServerMetrics
from redraft_client.aio import AsyncClient
from redraft_server.app import App
from redraft_server.config import GrpcConfig, MetricsConfig, ServerConfig
from redraft_server.engine.api import EngineEvent, EngineRequest, RequestFinished, Sink
from redraft_server.engine.engine import Engine
from tests.engine_harness import EngineSpec, running_engine


class ObservedEngine:
    """The engine, with every request's last event kept, also of requests whose client has gone."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.num_submitted = 0
        self.finished: list[RequestFinished] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        def observed(events: list[EngineEvent]) -> None:
            self.finished.extend(event for event in events if isinstance(event, RequestFinished))
            sink(events)

        self._engine.submit(request, observed)
        self.num_submitted += 1


@dataclass(frozen=True)
class Served:
    engine: Engine
    client: AsyncClient
    registry: CollectorRegistry
    address: str
    metrics_address: str
    observed: ObservedEngine
    app: App

    @property
    def finished(self) -> list[RequestFinished]:
        """The last event of every request that has ended."""
        return self.observed.finished

    def metric(self, name: str) -> float:
        """Sum of a metric's samples over all its labels."""
        return sum(
            sample.value for family in self.registry.collect() for sample in family.samples if sample.name == name
        )

    async def idle(self) -> None:
        """Wait until every admitted request has had its last event and has been counted."""
        async with asyncio.timeout(60):
            while len(self.finished) < self.observed.num_submitted:
                await asyncio.wrap_future(self.engine.between_steps(lambda: None))
            while self._num_counted() < self.observed.num_submitted:
                await asyncio.sleep(0)

    def _num_counted(self) -> float:
        """Admitted requests that the server has done with; one that was refused has no finish reason."""
        return sum(
            sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == "redraft_requests_total" and sample.labels["finish_reason"]
        )


@asynccontextmanager
async def served_engine(spec: EngineSpec, grpc: GrpcConfig | None = None) -> AsyncIterator[Served]:
    """`grpc` may turn TLS on; then `client`, which speaks plain text, is of no use."""
    registry = CollectorRegistry()
    config = ServerConfig(grpc=grpc or GrpcConfig(port=0), metrics=MetricsConfig(port=0))
    with running_engine(spec, registry=registry) as engine:
        observed = ObservedEngine(engine)
        metrics = engine._parts.metrics
        assert isinstance(metrics, ServerMetrics)
        async with App(config, observed, metrics, registry) as app, AsyncClient(app.address) as client:  # type: ignore[arg-type]
            assert app.metrics_address is not None
            yield Served(engine, client, registry, app.address, app.metrics_address, observed, app)
