"""The metric families of the traffic log's spool. Part of :class:`redraft.telemetry.metrics.ServerMetrics`."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge


class SpoolMetrics:
    """What waits for an object store, and for how long; all zero without one. Any thread."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._oldest_unix_s: float | None = None
        self._bytes = Gauge(
            "redraft_traffic_log_spool_bytes", "Bytes of shards that wait for the object store.", registry=registry
        )
        self._age = Gauge(
            "redraft_traffic_log_spool_oldest_seconds",
            "Time that the oldest of them has waited; 0 if none waits.",
            registry=registry,
        )
        self._age.set_function(self._oldest_age)
        self.failures = Counter(
            "redraft_traffic_log_upload_failures_total",
            "Tries to send a shard that the object store did not take.",
            registry=registry,
        )

    def set(self, num_bytes: int, oldest_unix_s: float | None) -> None:
        """State both."""
        self._oldest_unix_s = oldest_unix_s
        self._bytes.set(num_bytes)

    def _oldest_age(self) -> float:
        oldest = self._oldest_unix_s
        return 0.0 if oldest is None else max(0.0, self._clock() - oldest)
