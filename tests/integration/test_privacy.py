"""Through the whole server: of what must not be recorded, nothing comes as far as the disk."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
from prometheus_client import CollectorRegistry

from redraft.telemetry.metrics import ServerMetrics
from redraft.traffic.record import TrafficRecord
from redraft_client.aio import AsyncClient
from redraft_server.app import App
from redraft_server.config import TrafficLogConfig
from redraft_server.traffic_log import TrafficLog
from tests.edge import edge_config
from tests.engine_harness import EngineSpec, running_engine

SPEC = EngineSpec(vocab_size=98, k=3, teacher_top_n=4)  # every id below 98 is a character of its own


async def serve(root: Path, **settings: Any) -> tuple[list[str], Counter[str], CollectorRegistry]:
    """Requests of several kinds; the ids on disk, the ids that were ever offered to the log, and the metrics."""
    config = TrafficLogConfig(url=str(root), **settings)
    registry = CollectorRegistry()
    offered: Counter[str] = Counter()

    def offer(record: TrafficRecord) -> bool:
        offered[record.request_id] += 1
        return log.writer.offer(record)

    with running_engine(SPEC, sink=SimpleNamespace(offer=offer), registry=registry) as engine:
        metrics = engine._parts.metrics
        assert isinstance(metrics, ServerMetrics)
        log = TrafficLog(str(root), config, metrics)
        async with App(edge_config(traffic_log=config), engine, metrics, registry, log) as app:
            await talk(app.address)
    tables = [pq.read_table(path) for path in root.rglob("*.parquet")]
    return [name for table in tables for name in table["request_id"].to_pylist()], offered, registry


async def talk(address: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "seed": 1}
    async with AsyncClient(address) as client:
        await client.generate("plain words", request_id="plain", **options)
        await client.generate("not for you", request_id="opted out", exclude_from_traffic_log=True, n=2, **options)
        async for _ in client.stream("nor this", request_id="streamed", exclude_from_traffic_log=True, **options):
            pass
        await client.generate("write to bob@example.com", request_id="mail", n=2, **options)
        await client.generate("pay with 4111 1111 1111 1111", request_id="card", **options)
        await client.generate("Project X", request_id="project", **options)
    for tenant in ("acme", "umbrella"):
        async with AsyncClient(address, tenant=tenant) as client:
            await client.generate("plain words", request_id=tenant, **options)


def results(registry: CollectorRegistry) -> dict[str, float]:
    names = ("written", "redacted", "excluded", "dropped", "sampled_out")
    values = {name: registry.get_sample_value("redraft_traffic_log_records_total", {"result": name}) for name in names}
    return {name: value for name, value in values.items() if value}


def redacted(registry: CollectorRegistry, pattern: str) -> float | None:
    return registry.get_sample_value("redraft_traffic_log_redacted_total", {"pattern": pattern})


async def test_opted_out_requests_are_never_offered(tmp_path: Path) -> None:
    stored, offered, registry = await serve(tmp_path / "log")
    assert sorted(stored) == ["acme", "card", "mail", "mail", "plain", "project", "umbrella"]
    assert offered == Counter(stored)
    assert results(registry) == {"written": 7, "excluded": 3}


async def test_tenants_are_recorded_as_the_lists_say(tmp_path: Path) -> None:
    stored, offered, registry = await serve(tmp_path / "deny", exclude_tenants=("acme",))
    assert {"umbrella", "plain"} <= set(stored)
    assert "acme" not in offered
    assert results(registry) == {"written": 6, "excluded": 4}
    stored, offered, registry = await serve(tmp_path / "allow", tenants=("umbrella", "acme"), exclude_tenants=("acme",))
    assert (stored, set(offered)) == (["umbrella"], {"umbrella"})
    assert results(registry) == {"written": 1, "excluded": 9}


async def test_records_with_personal_data_are_withheld(tmp_path: Path) -> None:
    stored, _, registry = await serve(tmp_path / "log", redact=("email", "card"), redact_patterns=("(?i)project x",))
    assert sorted(stored) == ["acme", "plain", "umbrella"]
    assert results(registry) == {"written": 3, "redacted": 4, "excluded": 3}
    assert [redacted(registry, name) for name in ("email", "card", "custom_1")] == [2, 1, 1]
