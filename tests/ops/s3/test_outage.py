"""The store goes away under a whole server with traffic: no request fails, and every record is in the log afterwards.

Waits are short here; `benchmarks.store_outage` is the same for two minutes by the clock, with settings as they come.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from redraft.telemetry.metrics import ServerMetrics
from redraft_client.aio import AsyncClient
from redraft_server import traffic_log
from redraft_server.app import App, build
from redraft_server.config import (
    EngineConfig,
    GrpcConfig,
    MetricsConfig,
    ModelConfig,
    RegistryConfig,
    ServerConfig,
    TrafficLogConfig,
)
from tests.fakes import save_tiny
from tests.ops.charts import ROOT, require
from tests.ops.s3.conftest import Bucket

NEW_TOKENS = 12


class Outage:
    """Tells when the server has noticed that the store does not take shards."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._failed = threading.Semaphore(0)
        count = ServerMetrics.observe_traffic_upload_failure

        def counted(metrics: ServerMetrics) -> None:
            count(metrics)
            self._failed.release()

        monkeypatch.setattr(ServerMetrics, "observe_traffic_upload_failure", counted)

    async def failed(self) -> None:
        """Wait for one more failure."""
        assert await asyncio.to_thread(self._failed.acquire, True, 60)


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> Outage:
    monkeypatch.setattr(traffic_log, "RETRY_WAITS_S", (0.001, 0.01))
    return Outage(monkeypatch)


def server_config(bucket: Bucket, root: Path) -> ServerConfig:
    return ServerConfig(
        model=ModelConfig(target=str(save_tiny(root / "target")), cache_dir=root / "cache", threads=1),
        engine=EngineConfig(kv_cache_tokens=2048, kv_block_size=4, max_batch_tokens=64, max_running_requests=8),
        traffic_log=TrafficLogConfig(url=bucket.url("traffic"), spool_dir=root / "spool", roll_bytes=8192),
        registry=RegistryConfig(url=bucket.url("drafts"), poll_s=0.01),
        grpc=GrpcConfig(port=0),
        metrics=MetricsConfig(enabled=False),
    )


async def generate(client: AsyncClient, *request_ids: str) -> None:
    """All at once; each must end as it should."""
    calls = [
        client.generate(f"a b {index % 4}", request_id=name, max_new_tokens=NEW_TOKENS, ignore_eos=True, seed=index)
        for index, name in enumerate(request_ids)
    ]
    for result in await asyncio.gather(*calls):
        assert result.usage.completion_tokens == NEW_TOKENS


def names(phase: str, count: int = 24) -> list[str]:
    return [f"{phase}-{index:02}" for index in range(count)]


def metric(app: App, name: str, **labels: str) -> float:
    return app._registry.get_sample_value(f"redraft_traffic_log_{name}", labels) or 0.0


async def test_no_request_fails_and_no_record_is_lost(bucket: Bucket, tmp_path: Path, outage: Outage) -> None:
    app = build(server_config(bucket, tmp_path))
    async with app, AsyncClient(app.address) as client:
        await generate(client, *names("before"))
        bucket.proxy.down()
        await generate(client, *names("refused"))
        await outage.failed()
        await generate(client, *names("refused-too"))
        await outage.failed()
        assert metric(app, "spool_bytes") > 0
        assert metric(app, "spool_oldest_seconds") > 0
        bucket.proxy.up()
        await generate(client, *names("after"))
        await app.drain()
    assert metric(app, "records_total", result="written") == 4 * 24
    assert metric(app, "records_total", result="dropped") == 0
    assert metric(app, "upload_failures_total") >= 2
    assert (metric(app, "spool_bytes"), metric(app, "spool_oldest_seconds")) == (0, 0)
    wanted = [name for phase in ("before", "refused", "refused-too", "after") for name in names(phase)]
    assert bucket.logged() == sorted(wanted)


async def test_a_store_that_hangs_delays_nobody(bucket: Bucket, tmp_path: Path) -> None:
    app = build(server_config(bucket, tmp_path))
    async with app, AsyncClient(app.address) as client:
        bucket.proxy.stall()
        await generate(client, *names("hanging"))  # the uploader waits for an answer all the while
        assert bucket.proxy.stalled.is_set()
        bucket.proxy.up()
        await app.drain()
    assert bucket.logged() == names("hanging")


async def test_what_an_outage_outlasts_the_server_leaves_to_the_next(
    bucket: Bucket, tmp_path: Path, outage: Outage
) -> None:
    config = server_config(bucket, tmp_path)
    app = build(config)
    async with app, AsyncClient(app.address) as client:
        bucket.proxy.down()
        await generate(client, *names("first"))
        await outage.failed()
        await app.drain()
    assert metric(app, "records_total", result="written") == 0
    bucket.proxy.up()
    assert bucket.logged() == []
    app = build(config)
    async with app, AsyncClient(app.address) as client:
        await generate(client, *names("second"))
        await app.drain()
    assert bucket.logged() == names("first") + names("second")
    assert metric(app, "records_total", result="written") == 2 * 24


@pytest.mark.slow
def test_two_minutes_by_the_clock(tmp_path: Path) -> None:
    require("moto_server")
    page, target = tmp_path / "page.md", save_tiny(tmp_path / "target")
    command = ["-m", "benchmarks.store_outage", "--target", str(target), "--quiet", "20", "--output", str(page)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr  # no request failed, no record is missing
    assert "no store for 120 s" in page.read_text()
    assert "0 records were dropped" in page.read_text()
