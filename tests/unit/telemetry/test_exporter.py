"""The exporter over real HTTP on loopback."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest
from prometheus_client import CollectorRegistry, Gauge

from redraft.telemetry.exporter import MetricsExporter


class Readiness:
    def __init__(self) -> None:
        self.answer: bool | Exception = True

    def __call__(self) -> bool:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def readiness() -> Readiness:
    return Readiness()


@pytest.fixture
def exporter(readiness: Readiness) -> Iterator[MetricsExporter]:
    registry = CollectorRegistry()
    Gauge("redraft_test", "A test.", registry=registry).set(42)
    exporter = MetricsExporter(registry, "127.0.0.1", 0, readiness)
    yield exporter
    exporter.close()


def ask(exporter: MetricsExporter, path: str, method: str = "GET", accept: str | None = None) -> tuple[int, str, bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", exporter.port, timeout=10)) as connection:
        connection.request(method, path, headers={"Accept": accept} if accept else {})
        response = connection.getresponse()
        return response.status, response.headers["Content-Type"], response.read()


def test_metrics_as_text_and_as_openmetrics(exporter: MetricsExporter) -> None:
    status, content_type, body = ask(exporter, "/metrics")
    assert status == 200
    assert content_type.startswith("text/plain")
    assert b"redraft_test 42.0\n" in body
    assert b"# EOF" not in body

    _, content_type, body = ask(exporter, "/metrics?name=x", accept="application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_readiness_follows_the_callback_and_liveness_does_not(exporter: MetricsExporter, readiness: Readiness) -> None:
    assert ask(exporter, "/readyz")[0] == 200
    for answer in (False, RuntimeError("engine gone")):
        readiness.answer = answer
        assert ask(exporter, "/readyz")[0] == 503
        assert ask(exporter, "/livez")[0] == 200


def test_other_paths_and_methods(exporter: MetricsExporter) -> None:
    assert ask(exporter, "/")[0] == 404
    assert ask(exporter, "/metrics/../livez")[0] == 404
    assert ask(exporter, "/metrics", method="POST")[0] == 501
    assert ask(exporter, "/livez", method="HEAD") == (200, "text/plain; charset=utf-8", b"")


def test_silent_clients_do_not_keep_a_probe_waiting(exporter: MetricsExporter) -> None:
    silent = [socket.create_connection(("127.0.0.1", exporter.port)) for _ in range(8)]
    try:
        assert ask(exporter, "/livez")[0] == 200
    finally:
        for connection in silent:
            connection.close()


def test_close_releases_the_port_and_may_be_repeated(exporter: MetricsExporter, readiness: Readiness) -> None:
    exporter.close()
    exporter.close()
    with pytest.raises(ConnectionRefusedError):
        ask(exporter, "/livez")
    MetricsExporter(CollectorRegistry(), "127.0.0.1", exporter.port, readiness).close()


def test_a_taken_port_is_an_error(exporter: MetricsExporter, readiness: Readiness) -> None:
    with pytest.raises(OSError, match="in use"):
        MetricsExporter(CollectorRegistry(), "127.0.0.1", exporter.port, readiness)
