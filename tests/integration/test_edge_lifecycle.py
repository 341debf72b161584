"""From bind to drain: health, reflection, metrics, signals, TLS."""

from __future__ import annotations

import asyncio
import os
import signal
import urllib.error
import urllib.request
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry

from redraft.errors import ConfigError, ModelNotFound
from redraft.telemetry.metrics import ServerMetrics
from redraft.v1 import generation_pb2 as pb
from redraft.v1 import generation_pb2_grpc
from redraft_server import __main__, app
from redraft_server.app import App, running_server, serve
from redraft_server.banner import show_banner
from redraft_server.config import DrainConfig, GrpcConfig, MetricsConfig, ServerConfig, TrafficLogConfig
from redraft_server.engine.api import FinishReason
from redraft_server.rpc import lifecycle
from redraft_server.rpc.lifecycle import GENERATION_SERVICE
from tests.edge import Edge, details_of, edge_config, limited, running_edge
from tests.fake_engine import FakeEngine
from tests.log_lines import untouched_loggers

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def with_grace(seconds: float) -> ServerConfig:
    return edge_config(drain=DrainConfig(grace_s=seconds))


async def held_stream(edge: Edge) -> Any:
    """A running stream, in which nothing happens while the engine's gate is shut."""
    edge.engine.gate.clear()
    call = edge.stream(limited(5, request_id="held"))
    await call.initial_metadata()
    return call


async def read_all(call: Any) -> tuple[str, int]:
    """Text and finish reason of a stream that completes."""
    text, reason = "", 0
    async for reply in call:
        for delta in reply.deltas:
            text += delta.text
            reason = delta.finish_reason
    assert reply.HasField("completion")
    return text, reason


async def test_health_follows_the_engine() -> None:
    async with running_edge() as edge:
        stub: Any = health_pb2_grpc.HealthStub(edge.channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=GENERATION_SERVICE))
        assert (await watch.read()).status == SERVING
        edge.engine.ready = False
        assert (await watch.read()).status == NOT_SERVING
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == SERVING
        edge.engine.ready = True
        assert (await watch.read()).status == SERVING
        watch.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="unknown"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_drain_lets_streams_finish_and_refuses_new_ones() -> None:
    async with running_edge(config=with_grace(60.0)) as edge:
        stub: Any = health_pb2_grpc.HealthStub(edge.channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(service=name)) for name in ("", GENERATION_SERVICE)]
        for watch in watches:
            assert (await watch.read()).status == SERVING
        call = await held_stream(edge)
        draining = asyncio.create_task(edge.app.drain())
        for watch in watches:
            assert (await watch.read()).status == NOT_SERVING
        await asyncio.to_thread(edge.engine.wait_for, lambda: not edge.engine.is_ready)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await edge.generate(limited(1))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert details_of(caught.value)["ErrorInfo"].reason == "SERVER_DRAINING"
        edge.engine.gate.set()
        assert await read_all(call) == ("abcde", pb.FINISH_REASON_LENGTH)
        await draining
        assert edge.engine.stops == 1


async def test_what_is_left_at_the_end_of_the_grace_ends_with_shutdown() -> None:
    async with running_edge(config=with_grace(1.0)) as edge:
        call = await held_stream(edge)
        reading = asyncio.create_task(read_all(call))
        await edge.app.drain()
        assert await reading == ("", pb.FINISH_REASON_SHUTDOWN)
        assert edge.engine.ended == {"held": FinishReason.SHUTDOWN}


async def test_hurrying_ends_a_long_grace() -> None:
    async with running_edge(config=edge_config(drain=DrainConfig(grace_s=600.0, delay_s=600.0))) as edge:
        await held_stream(edge)
        hurry = asyncio.Event()
        draining = asyncio.create_task(edge.app.drain(hurry))
        hurry.set()
        await asyncio.wait_for(draining, 30)
        assert edge.engine.ended == {"held": FinishReason.SHUTDOWN}


async def test_a_client_that_never_reads_cannot_hold_up_a_drain() -> None:
    engine = FakeEngine(emit=lambda position: (1, "x" * 8192))
    async with running_edge(engine, with_grace(1.0)) as edge:
        slow = edge.stream(limited(4000, request_id="slow"))
        await slow.initial_metadata()
        await asyncio.to_thread(engine.wait_for, lambda: "slow" in engine.ended)
        await asyncio.wait_for(edge.app.drain(), 30)
        assert engine.num_unfinished() == 0


async def test_an_old_connection_is_made_anew_and_its_calls_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that balances looks up its servers only when it connects."""
    monkeypatch.setattr(lifecycle, "CONNECTION_AGE_S", 0.5)
    engine = FakeEngine()
    async with running_edge(engine) as edge:
        call = await held_stream(edge)
        ready = grpc.ChannelConnectivity.READY
        assert edge.channel.get_state() is ready
        async with asyncio.timeout(30):
            await edge.channel.wait_for_state_change(ready)  # the server has said goodbye
        engine.gate.set()
        text, _ = await read_all(call)
        assert text
        await edge.assert_serves()


async def test_reflection_lists_the_services() -> None:
    async with running_edge() as edge:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(edge.channel)
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        reply = await call.read()
        names = {service.name for service in reply.list_services_response.service}
        ours = ("GenerationService", "TokenizerService", "ModelService", "DraftService")
        assert names == {
            *(f"redraft.v1.{name}" for name in ours),
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        symbol = reflection_pb2.ServerReflectionRequest(file_containing_symbol="redraft.v1.GenerationService")
        await call.write(symbol)
        assert (await call.read()).file_descriptor_response.file_descriptor_proto
        await call.done_writing()


async def fetch(address: str | None, path: str) -> tuple[int, str]:
    def get() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return await asyncio.to_thread(get)


async def test_metrics_and_probes() -> None:
    config = edge_config(metrics=MetricsConfig(port=0), drain=DrainConfig(grace_s=60.0))
    async with running_edge(config=config) as edge:
        await edge.assert_serves()
        address = edge.app.metrics_address
        status, page = await fetch(address, "/metrics")
        assert status == 200
        assert 'redraft_requests_total{code="OK",finish_reason="length",method="Generate",model="fake"} 1.0' in page
        assert (await fetch(address, "/readyz"))[0] == 200
        call = await held_stream(edge)
        draining = asyncio.create_task(edge.app.drain())
        await asyncio.to_thread(edge.engine.wait_for, lambda: not edge.engine.is_ready)
        assert (await fetch(address, "/readyz"))[0] == 503
        assert (await fetch(address, "/livez"))[0] == 200
        edge.engine.gate.set()
        await read_all(call)
        await draining


async def test_a_taken_port_is_a_config_error_and_the_engine_ends() -> None:
    async with running_edge() as edge:
        port = int(edge.app.address.rpartition(":")[2])
        engine = FakeEngine()
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            async with running_server(edge_config(grpc=GrpcConfig(port=port)), engine):
                pass
        assert engine.stops == 1
        metrics = MetricsConfig(port=port)
        with pytest.raises(ConfigError, match=r"metrics\.port"):
            async with running_server(edge_config(metrics=metrics), FakeEngine()):
                pass


async def test_running_server_gives_an_address() -> None:
    engine = FakeEngine()
    async with running_server(edge_config(), engine) as address, grpc.aio.insecure_channel(address) as channel:
        stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        reply = await stub.Generate(pb.GenerateRequest(generation=limited(2)))
        assert reply.choices[0].text == "ab"
    assert engine.stops == 1


def new_app(config: ServerConfig, engine: FakeEngine) -> App:
    registry = CollectorRegistry()
    return App(config, engine, ServerMetrics(registry, "fake"), registry)


async def test_sigterm_drains_and_a_second_signal_hurries() -> None:
    engine = FakeEngine()
    started: asyncio.Future[App] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve(new_app(with_grace(600.0), engine), started.set_result))
    running = await started
    async with grpc.aio.insecure_channel(running.address) as channel:
        edge = Edge(running, engine, channel, CollectorRegistry())
        await held_stream(edge)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.to_thread(engine.wait_for, lambda: not engine.is_ready)
        assert engine.num_unfinished() == 1
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.wait_for(serving, 30)
        assert engine.ended == {"held": FinishReason.SHUTDOWN}


async def test_the_banner_says_what_is_served(capsys: pytest.CaptureFixture[str]) -> None:
    log = TrafficLogConfig(url="shards", sample_rate=0.5)
    config = edge_config(traffic_log=log, metrics=MetricsConfig(port=0))
    async with running_edge(config=config) as edge:
        show_banner(edge.app, __import__("sys").stdout)
        text = capsys.readouterr().out
        for word in (edge.app.address, edge.app.metrics_address, "fake @ r1", "fake-draft @ d1", "4096 tokens"):
            assert str(word) in text
        assert "ON: prompts and completions of 50.0% of requests are stored in shards for 30 days" in text


@pytest.mark.parametrize(
    ("error", "status"), [(ModelNotFound("no model\nnope"), 3), (ConfigError("grpc.port: taken"), 2)]
)
def test_a_server_that_cannot_start_ends_with_one_line(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(config: ServerConfig) -> App:
        raise error

    monkeypatch.setattr(app, "build", refuse)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with untouched_loggers():
        assert __main__.main(["--model.target", "nope"]) == status
    written = capsys.readouterr().err
    assert written == f"redraft-server: {' '.join(str(error).split())}\n"
