"""The traffic log of a server: its writer, its spool, and the deletion of what has become too old."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from redraft.errors import ConfigError
from redraft.models.cache import cache_directory
from redraft.object_store import explain, is_local, is_misconfigured, upload
from redraft.traffic.layout import PROBE, open_root
from redraft.traffic.patterns import patterns_of
from redraft.traffic.redaction import Decode, WithholdMatching
from redraft.traffic.retention import apply_retention
from redraft.traffic.spool import RETRY_WAITS_S, Spool, SpoolObserver
from redraft.traffic.writer import TrafficWriter
from redraft_server.config import TrafficLogConfig

RETENTION_INTERVAL_S = 3600.0
CLOSE_TIMEOUT_S = 10.0
_DAY_S = 86_400.0

_log = logging.getLogger("redraft.traffic_log")


class TrafficLog:
    """Open from construction to `close`. `writer` takes the records; for an object store, `spool` then has the shards.

    If there are patterns to look for, `read_with` has to be called before the first record comes: without it they
    are all dropped, and counted as `redaction_error`.

    Raises:
        ConfigError: on construction, if there can be no log at the configured URL: no such bucket, no permission, ...
            An object store that cannot be reached is no error.
    """

    def __init__(self, url: str, config: TrafficLogConfig, observer: SpoolObserver) -> None:
        self._url = url
        self._retention_days = config.retention_days
        self._task: asyncio.Task[None] | None = None
        patterns = patterns_of(config.redact, config.redact_patterns)
        self._redact = WithholdMatching(patterns) if patterns else None
        try:
            self.spool = _spool(url, config, observer)
            self.writer = TrafficWriter(
                self.spool or url,
                observer,
                max_queue_records=config.max_queue_records,
                roll_bytes=config.roll_bytes,
                roll_seconds=config.roll_seconds,
                sample_rate=config.sample_rate,
                redact=self._redact,
            )
        except (ValueError, ImportError) as error:
            raise ConfigError(f"traffic_log.url: {error}") from None

    def read_with(self, decode: Decode) -> None:
        """Take the target's way of turning ids into text, special tokens included."""
        if self._redact is not None:
            self._redact.decode = decode

    def start_retention(self) -> None:
        """Delete old shards now and every hour, if a retention is configured. Call on the event loop."""
        if self._retention_days is not None:
            self._task = asyncio.create_task(self._retain(self._retention_days * _DAY_S), name="retention")

    async def close(self) -> None:
        """Store what is queued (for at most `CLOSE_TIMEOUT_S`) and stop. What the spool has left, it keeps."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        if not await asyncio.to_thread(self.writer.close, CLOSE_TIMEOUT_S):
            _log.warning("the store is too slow: the last shard may be lost")
        if self.spool is not None:
            num_left = await asyncio.to_thread(self.spool.close, max(0.0, deadline - time.monotonic()))
            if num_left:
                _log.warning(
                    "traffic shards stay in the spool for the next start",
                    extra={"count": num_left, "path": self.spool.place},
                )

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


def _spool(url: str, config: TrafficLogConfig, observer: SpoolObserver) -> Spool | None:
    """Between this server and an object store; None for a local log. Raises ConfigError, ValueError, ImportError."""
    filesystem, root = open_root(url)
    if is_local(filesystem):
        return None
    spool_dir = config.spool_dir or cache_directory() / "traffic-spool"
    try:
        upload(filesystem, b"", f"{root}/{PROBE}")
    except Exception as error:  # every store raises its own kinds
        if is_misconfigured(error):
            raise ConfigError(f"traffic_log.url: cannot write to {root}: {explain(error)}") from None
        _log.warning("traffic shards will wait in %s: %s", spool_dir, explain(error), extra={"path": root})
    return Spool(spool_dir, url, observer, max_bytes=config.spool_bytes, retry_waits_s=RETRY_WAITS_S)
