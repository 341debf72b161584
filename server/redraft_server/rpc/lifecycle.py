"""The gRPC server from bind to drain.

Health (`grpc.health.v1`): `""` is the process, SERVING until the server drains, for liveness;
`redraft.v1.GenerationService` follows the engine, for readiness.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from redraft.errors import ConfigError
from redraft.v1 import draft_pb2, generation_pb2, model_pb2, tokenizer_pb2
from redraft_server.config import DrainConfig, GrpcConfig
from redraft_server.engine.api import EngineClient
from redraft_server.rpc.interceptors import RpcInterceptor

GENERATION_SERVICE = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
READINESS_INTERVAL_S = 0.25
CONNECTION_AGE_S = 600.0
"""About when a client is asked to connect anew, its running calls aside: a client that balances looks its servers up
only then, and would never hear of one that was added."""

# Near the end of the grace period the engine is told to finish; the rest is for the last messages to leave.
_LAST_MESSAGES_SHARE = 0.2
_LAST_MESSAGES_MAX_S = 2.0
# For the statuses of RPCs that have just ended to reach the socket.
_FLUSH_S = 0.2

_log = logging.getLogger("redraft.lifecycle")


def create_server(config: GrpcConfig, rpcs: RpcInterceptor) -> grpc.aio.Server:
    """A server with our limits and `rpcs` around its RPCs; nothing is bound yet."""
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.max_concurrent_streams", config.max_concurrent_streams),
        # A second server on the same port must fail, not share it silently.
        ("grpc.so_reuseport", 0),
        # During a long prefill no data flows; clients that ping then are not abusive. The option's other
        # spelling, min_recv_ping_interval_..., has no effect.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_connection_age_ms", round(CONNECTION_AGE_S * 1000)),
    ]
    return grpc.aio.server(interceptors=[rpcs], options=options)


def bind(server: grpc.aio.Server, config: GrpcConfig, credentials: grpc.ServerCredentials | None) -> int:
    """Listen on the configured address, in plain text without `credentials`, and return the real port.

    Raises:
        ConfigError: if the address cannot be had.
    """
    host = f"[{config.host}]" if ":" in config.host and not config.host.startswith("[") else config.host
    address = f"{host}:{config.port}"
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise ConfigError(f"grpc.host, grpc.port: cannot listen on {address}; is the port in use?")
    return port


class HealthReporter:
    """Answers health checks and keeps the readiness entry in step with the engine."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._servicer = health.aio.HealthServicer()
        self._task: asyncio.Task[None] | None = None

    async def start(self, server: grpc.aio.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        await self._report()
        self._task = asyncio.create_task(self._follow(), name="health")

    async def stop_serving(self) -> None:
        """Report NOT_SERVING for everything from now on."""
        await self._servicer.enter_graceful_shutdown()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(READINESS_INTERVAL_S)
            await self._report()

    async def _report(self) -> None:
        Status = health_pb2.HealthCheckResponse
        status = Status.SERVING if self._engine.is_ready else Status.NOT_SERVING
        await self._servicer.set(GENERATION_SERVICE, status)


def add_reflection(server: grpc.aio.Server) -> None:
    """Let tools such as grpcurl discover the API."""
    names = [
        service.full_name
        for file in (generation_pb2, model_pb2, tokenizer_pb2, draft_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
    ]
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)


async def drain(
    server: grpc.aio.Server,
    engine: EngineClient,
    reporter: HealthReporter,
    rpcs: RpcInterceptor,
    config: DrainConfig,
    hurry: asyncio.Event,
) -> None:
    """End the server without losing work: health first, then admission, then what runs, then the rest.

    Takes at most `delay_s + grace_s`, the engine's last step and a moment to flush, whatever clients do. Setting
    `hurry` ends all waiting at once. The engine is stopped when this returns.
    """
    _log.info("draining", extra={"count": engine.num_unfinished()})
    await reporter.stop_serving()
    await _first_of(config.delay_s, hurry.wait())
    engine.drain()
    end = time.monotonic() + config.grace_s
    last_messages = min(config.grace_s * _LAST_MESSAGES_SHARE, _LAST_MESSAGES_MAX_S)
    await _first_of(config.grace_s - last_messages, hurry.wait(), rpcs.wait_idle())
    left = engine.num_unfinished()
    if left:
        _log.warning("ending unfinished requests", extra={"count": left})
    # Leftovers get FINISH_REASON_SHUTDOWN and the time until the grace ends to deliver it.
    await asyncio.to_thread(engine.stop, max(last_messages, 1.0))
    await _first_of(end - time.monotonic(), hurry.wait(), rpcs.wait_idle())
    # `server.stop` comes last and only once: with a grace of its own it would wait for every open health watch,
    # and a second call beside a first one crashes grpc (seen with 1.85).
    await server.stop(_FLUSH_S)


async def _first_of(seconds: float, *events: Coroutine[Any, Any, object]) -> None:
    """Wait until one of the events has happened or the time is over."""
    tasks = [asyncio.ensure_future(event) for event in events]
    await asyncio.wait(tasks, timeout=max(seconds, 0.0), return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
