"""The traffic log's life inside the server: opened from the settings, cleaned by retention, closed at the end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from uuid import uuid4

import pytest
from prometheus_client import CollectorRegistry

from redraft.errors import ConfigError
from redraft.telemetry.metrics import ServerMetrics
from redraft.traffic.retention import RetentionReport
from redraft_server import traffic_log
from redraft_server.app import App
from redraft_server.config import TrafficLogConfig
from redraft_server.traffic_log import TrafficLog
from tests.edge import edge_config
from tests.fake_engine import FakeEngine


def new_metrics() -> tuple[CollectorRegistry, ServerMetrics]:
    registry = CollectorRegistry()
    return registry, ServerMetrics(registry, "fake")


def test_a_url_that_no_store_serves_is_a_config_error() -> None:
    url = "nosuchprotocol://bucket"
    with pytest.raises(ConfigError, match=r"^traffic_log\.url: "):
        TrafficLog(url, TrafficLogConfig(url=url), new_metrics()[1])


async def test_only_an_object_store_has_a_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDRAFT_CACHE_DIR", str(tmp_path / "cache"))
    url = str(tmp_path / "traffic")
    local = TrafficLog(url, TrafficLogConfig(url=url), new_metrics()[1])
    assert local.spool is None
    await local.close()
    assert not (tmp_path / "cache").exists()

    url = f"memory://{uuid4().hex}"
    remote = TrafficLog(url, TrafficLogConfig(url=url), new_metrics()[1])
    assert remote.spool is not None
    assert remote.spool.place == str(tmp_path / "cache" / "traffic-spool")
    with pytest.raises(ConfigError, match=r"traffic_log\.spool_dir"):  # two servers, and neither said where
        TrafficLog(url, TrafficLogConfig(url=url), new_metrics()[1])
    await remote.close()


async def test_old_shards_are_deleted_and_a_store_that_fails_does_not_end_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[tuple[str, float | None, int | None]] = []
    twice = asyncio.Event()
    loop = asyncio.get_running_loop()

    def retain(url: str, max_age_s: float | None, max_bytes: int | None, now: float) -> RetentionReport:
        calls.append((url, max_age_s, max_bytes))
        if len(calls) == 1:
            raise OSError("the store is away")
        loop.call_soon_threadsafe(twice.set)
        return RetentionReport(("old.parquet",), (), (), 0)

    monkeypatch.setattr(traffic_log, "apply_retention", retain)
    monkeypatch.setattr(traffic_log, "RETENTION_INTERVAL_S", 0.0)
    registry, metrics = new_metrics()
    config = TrafficLogConfig(url=str(tmp_path), retention_days=2.0)
    log = TrafficLog(str(tmp_path), config, metrics)
    async with App(edge_config(traffic_log=config), FakeEngine(), metrics, registry, log):
        await twice.wait()
    assert calls[0] == (str(tmp_path), 2 * 86_400.0, None)
    assert "retention failed" in caplog.text
    assert not log.writer._thread.is_alive()


async def test_without_retention_nothing_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic_log, "apply_retention", lambda *_: pytest.fail("nothing may be deleted"))
    registry, metrics = new_metrics()
    log = TrafficLog(str(tmp_path), TrafficLogConfig(url=str(tmp_path), retention_days=None), metrics)
    async with App(edge_config(), FakeEngine(), metrics, registry, log):
        await asyncio.sleep(0)
    assert not log.writer._thread.is_alive()
