"""The traffic log of a server: its writer, and the deletion of what has become too old."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from redraft.errors import ConfigError
from redraft.traffic.retention import apply_retention
from redraft.traffic.writer import TrafficObserver, TrafficWriter
from redraft_server.config import TrafficLogConfig

RETENTION_INTERVAL_S = 3600.0
CLOSE_TIMEOUT_S = 10.0
_DAY_S = 86_400.0

_log = logging.getLogger("redraft.traffic_log")


class TrafficLog:
    """Open from construction to `close`. `writer` takes the records.

    Raises:
        ConfigError: on construction, if there can be no log at the configured URL.
    """

    def __init__(self, url: str, config: TrafficLogConfig, observer: TrafficObserver) -> None:
        self._url = url
        self._retention_days = config.retention_days
        self._task: asyncio.Task[None] | None = None
        try:
            self.writer = TrafficWriter(
                url,
                observer,
                max_queue_records=config.max_queue_records,
                roll_bytes=config.roll_bytes,
                roll_seconds=config.roll_seconds,
                sample_rate=config.sample_rate,
            )
        except (ValueError, ImportError) as error:
            raise ConfigError(f"traffic_log.url: {error}") from None

    def start_retention(self) -> None:
        """Delete old shards now and every hour, if a retention is configured. Call on the event loop."""
        if self._retention_days is not None:
            self._task = asyncio.create_task(self._retain(self._retention_days * _DAY_S), name="retention")

    async def close(self) -> None:
        """Store what is queued (for at most `CLOSE_TIMEOUT_S`) and stop."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if not await asyncio.to_thread(self.writer.close, CLOSE_TIMEOUT_S):
            _log.warning("the store is too slow: the last shard may be lost")

    async def _retain(self, max_age_s: float) -> None:
        while True:
            try:
                report = await asyncio.to_thread(apply_retention, self._url, max_age_s, None, time.time())
                if report.deleted_shards:
                    _log.info("deleted old shards", extra={"count": len(report.deleted_shards)})
            except Exception:
                # Every store raises its own kinds; the next run may fare better.
                _log.exception("retention failed")
            await asyncio.sleep(RETENTION_INTERVAL_S)
