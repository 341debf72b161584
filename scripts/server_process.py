"""A `redraft-server` process on free loopback ports, for the demo, the benchmarks and the end-to-end tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_SERVICE = "redraft.v1.GenerationService"


class ServerProcess:
    """Starts on enter and waits until the engine is ready; ends with SIGTERM on exit.

    Args:
        flags: of `redraft-server`, without ports.
        environment: added to that of this process.
        credentials: for a server with TLS, whose certificate must be for localhost.
        start_timeout_s, stop_timeout_s: how long either may take.

    Raises:
        RuntimeError: with the end of the server's output, if it does not become ready.
    """

    def __init__(
        self,
        flags: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        start_timeout_s: float = 180.0,
        stop_timeout_s: float = 60.0,
    ) -> None:
        self._start_timeout_s, self._stop_timeout_s = start_timeout_s, stop_timeout_s
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
        self._credentials = credentials
        port, metrics_port = free_ports(2)
        self.address = f"127.0.0.1:{port}"
        self.metrics_address = f"127.0.0.1:{metrics_port}"
        ports = ["--grpc.port", str(port), "--metrics.port", str(metrics_port)]
        self._command = [sys.executable, "-m", "redraft_server", *flags, *ports]
        self._process: subprocess.Popen[bytes] | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdout=self._output, stderr=subprocess.STDOUT, env=self._environment, cwd=Path.cwd()
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.terminate()
        self._output.close()

    def terminate(self) -> int:
        """SIGTERM, then wait for the drain; SIGKILL if that takes too long. Returns the exit status."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(self._stop_timeout_s)
            self._process.kill()
        return self._process.wait()

    def kill(self) -> None:
        """SIGKILL: no drain, nothing flushed."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def output(self) -> str:
        """What the server has printed so far."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace")

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._start_timeout_s
        with self._channel() as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while time.monotonic() < deadline:
                if self._process.poll() is not None:
                    raise RuntimeError(
                        f"redraft-server ended with {self._process.returncode}:\n{self.output()[-4000:]}"
                    )
                with contextlib.suppress(grpc.RpcError):
                    # waits for the connection on its own; the timeout bounds one try
                    reply = stub.Check(
                        health_pb2.HealthCheckRequest(service=_SERVICE), wait_for_ready=True, timeout=1.0
                    )
                    if reply.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                    time.sleep(0.1)
        raise RuntimeError(f"redraft-server was not ready after {self._start_timeout_s:g} s:\n{self.output()[-4000:]}")

    def _channel(self) -> grpc.Channel:
        if self._credentials is None:
            return grpc.insecure_channel(self.address)
        return grpc.secure_channel(self.address, self._credentials, [("grpc.ssl_target_name_override", "localhost")])


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on. Held open together, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
