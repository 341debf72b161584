"""Helpers of the edge tests: a server around a `FakeEngine` on loopback, and a client's view of a failed call."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from prometheus_client import CollectorRegistry

from redraft.telemetry.metrics import ServerMetrics
from redraft.v1 import generation_pb2 as pb
from redraft.v1 import generation_pb2_grpc
from redraft_server.app import App
from redraft_server.config import GrpcConfig, MetricsConfig, ServerConfig
from tests.fake_engine import FakeEngine


def edge_config(**groups: Any) -> ServerConfig:
    """Free ports on loopback; groups override."""
    values: dict[str, Any] = {"grpc": GrpcConfig(port=0), "metrics": MetricsConfig(enabled=False)}
    return ServerConfig(**(values | groups))


class Edge:
    """A running App, its engine, and a channel to it."""

    def __init__(self, app: App, engine: FakeEngine, channel: grpc.aio.Channel, registry: CollectorRegistry) -> None:
        self.app = app
        self.engine = engine
        self.channel = channel
        self.registry = registry
        self.generation: Any = generation_pb2_grpc.GenerationServiceStub(channel)

    async def generate(self, generation: pb.Generation, **options: Any) -> pb.GenerateResponse:
        reply: pb.GenerateResponse = await self.generation.Generate(
            pb.GenerateRequest(generation=generation), **options
        )
        return reply

    def stream(self, generation: pb.Generation, **options: Any) -> Any:
        return self.generation.StreamGenerate(pb.StreamGenerateRequest(generation=generation), **options)

    async def assert_serves(self) -> None:
        """The server still answers as if nothing had happened."""
        reply = await self.generate(pb.Generation(text="hi", stopping=pb.StoppingParams(max_new_tokens=3)))
        assert reply.choices[0].text == "abc"

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def running_edge(
    engine: FakeEngine | None = None, config: ServerConfig | None = None, **channel_options: Any
) -> AsyncIterator[Edge]:
    engine = engine or FakeEngine()
    registry = CollectorRegistry()
    app = App(config or edge_config(), engine, ServerMetrics(registry, "fake"), registry)
    async with app, grpc.aio.insecure_channel(app.address, options=list(channel_options.items())) as channel:
        yield Edge(app, engine, channel, registry)


def limited(tokens: int, **parts: Any) -> pb.Generation:
    return pb.Generation(text="hi", stopping=pb.StoppingParams(max_new_tokens=tokens), **parts)


def details_of(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """The google.rpc details of a failed call, by message name."""
    trailers = dict(error.trailing_metadata() or ())
    packed = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert packed.code == error.code().value[0]
    found = {}
    for detail in packed.details:
        name = detail.TypeName().rpartition(".")[2]
        found[name] = getattr(error_details_pb2, name)()
        assert detail.Unpack(found[name])
    return found


def fields_of(error: grpc.aio.AioRpcError) -> list[str]:
    return [violation.field for violation in details_of(error)["BadRequest"].field_violations]
