"""An engine of this process behind gRPC, and a client process that streams from it."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.engine.grpc_client import Target
from benchmarks.peers.worker_process import WorkerProcess
from redraft_server.app import running_server
from redraft_server.config import GrpcConfig, MetricsConfig, ServerConfig
from redraft_server.engine.api import EngineEvent, EngineRequest, Sink
from redraft_server.engine.engine import Engine

_LOG = Path("build", "bench", "client.log")


@dataclass(frozen=True)
class Served:
    """A server and its client. `thread` runs the server's event loop."""

    client: WorkerProcess
    thread: threading.Thread

    def loop_seconds(self) -> float:
        """CPU seconds of the event loop so far."""
        assert self.thread.ident is not None
        return time.clock_gettime(time.pthread_getcpuclockid(self.thread.ident))


class WatchedEngine:
    """An engine whose events, by request id, `on_events` sees on the engine's thread before their reader does."""

    def __init__(self, engine: Engine, on_events: Callable[[str, list[EngineEvent]], None]) -> None:
        self._engine = engine
        self._on_events = on_events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        def watched(events: list[EngineEvent]) -> None:
            self._on_events(request.request_id, events)
            sink(events)

        self._engine.submit(request, watched)


@contextmanager
def served(engine: Any) -> Iterator[Served]:
    """Serve until the block ends, which stops the engine too. Raises PeerUnavailable if the client fails."""
    address: Future[str] = Future()
    end: Future[Callable[[], object]] = Future()
    thread = threading.Thread(target=lambda: uvloop.run(_serve(engine, address, end)), name="benchmark-server")
    thread.start()
    _LOG.parent.mkdir(parents=True, exist_ok=True)
    try:
        with WorkerProcess(
            Path(sys.executable), "benchmarks.engine.grpc_client", Target(address.result()), _LOG, {}
        ) as client:
            yield Served(client, thread)
    finally:
        end.result()()
        thread.join()


async def _serve(engine: Any, address: Future[str], end: Future[Callable[[], object]]) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    end.set_result(lambda: loop.call_soon_threadsafe(ended.set))
    config = ServerConfig(grpc=GrpcConfig(port=0), metrics=MetricsConfig(enabled=False))
    try:
        async with running_server(config, engine) as bound:
            address.set_result(bound)
            await ended.wait()
    except BaseException as error:
        if not address.done():
            address.set_exception(error)
        raise
