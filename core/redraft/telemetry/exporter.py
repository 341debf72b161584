"""A small HTTP server for Prometheus and for probes: `/metrics`, `/livez` and `/readyz`.

It runs on its own threads, so that it answers during a long step and while the RPC side drains.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

_MAX_CONNECTIONS = 32
_SOCKET_TIMEOUT_S = 10.0
_TEXT = "text/plain; charset=utf-8"


class MetricsExporter:
    """Serves one registry until `close`. `/livez` is 200 while the process lives, `/readyz` 200 or 503.

    `is_ready` is called on an HTTP thread for each `/readyz` and must return at once; if it raises, the
    answer is 503. Port 0 takes a free port: see `port`. Raises OSError when the address cannot be bound.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int, is_ready: Callable[[], bool]) -> None:
        self._server = _Server(registry, host, port, is_ready)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.1},
            name="metrics-exporter",
            daemon=True,
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening and release the port. May be called twice."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = _MAX_CONNECTIONS  # the default of 5 makes a burst of probes wait for a SYN retry
    block_on_close = False  # an idle client must not delay the end of the process

    def __init__(self, registry: CollectorRegistry, host: str, port: int, is_ready: Callable[[], bool]) -> None:
        self.registry, self.is_ready = registry, is_ready
        self._slots = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        host = host.strip("[]")
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no event of ours; the default would print a traceback."""

    def respond(self, path: str, accept: str) -> tuple[int, str, bytes]:
        """Status, content type and body for a path without its query."""
        if path == "/metrics":
            encode, content_type = choose_encoder(accept)
            return 200, content_type, encode(self.registry)
        if path == "/livez":
            return 200, _TEXT, b"alive\n"
        if path == "/readyz":
            return (200, _TEXT, b"ready\n") if self._ready() else (503, _TEXT, b"not ready\n")
        return 404, _TEXT, b"not found\n"

    def _ready(self) -> bool:
        try:
            return self.is_ready()
        except Exception:
            return False


class _Handler(BaseHTTPRequestHandler):
    timeout = _SOCKET_TIMEOUT_S
    server_version = "redraft"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        status, content_type, body = cast(_Server, self.server).respond(path, self.headers.get("Accept", ""))
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes and probes are not worth a line each."""
