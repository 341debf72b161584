"""What waits for the object store, as Prometheus sees it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from redraft.telemetry.spool_metrics import SpoolMetrics


def test_age_grows_by_itself_while_something_waits() -> None:
    registry, now = CollectorRegistry(), [1000.0]
    metrics = SpoolMetrics(registry, clock=lambda: now[0])

    def value(name: str) -> float | None:
        return registry.get_sample_value(f"redraft_traffic_log_{name}")

    assert (value("spool_bytes"), value("spool_oldest_seconds"), value("upload_failures_total")) == (0, 0, 0)
    metrics.set(5000, 990.0)
    assert (value("spool_bytes"), value("spool_oldest_seconds")) == (5000, 10.0)
    now[0] += 60.0
    assert value("spool_oldest_seconds") == 70.0
    metrics.set(0, None)
    assert (value("spool_bytes"), value("spool_oldest_seconds")) == (0, 0)
    metrics.set(1, 2000.0)  # by the clock of a machine that was ahead
    assert value("spool_oldest_seconds") == 0.0
