"""Writes traffic records to Parquet shards on a thread of its own; serving never waits for it.

    engine thread ── offer ──→ bounded queue ──→ writer thread: redact → encode → gather → shard ──→ store

Memory is bounded by the queue (`max_queue_records` and `max_queue_bytes`) plus the shard being gathered
(`roll_bytes`, held a few times over while it is compressed). Whatever does not fit or cannot be stored is
dropped and counted, by one of the reasons in `DROP_REASONS`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import pyarrow as pa

from redraft.traffic.layout import new_shard_name
from redraft.traffic.record import ARROW_SCHEMA, TrafficRecord
from redraft.traffic.redaction import Redactor
from redraft.traffic.shard import ROWS_PER_GROUP, encode_shard
from redraft.traffic.store import DirectStore, ShardStore

logger = logging.getLogger(__name__)

DROP_REASONS = (
    "queue_full",  # the writer or the store is slower than the traffic
    "too_large",  # larger than the whole queue may be
    "redaction_error",  # the redactor raised: fails closed
    "invalid_record",  # does not fit the schema, e.g. an id beyond 32 bits
    "write_error",  # the disk (or a store without a spool) refused a shard, after retries
    "spool_full",  # the object store was away for longer than the spool lasts: the oldest went
    "spool_damaged",  # a shard in the spool could not be read; counts as one, as nobody knows how many it had
    "closed",  # offered after close, or still queued when close ran out of time
)

_RETRY_DELAYS_S = (0.5, 2.0)
_WARN_INTERVAL_S = 60.0


class TrafficObserver(Protocol):
    """Counts what becomes of records; called on the engine's and the writer's thread, so never slow."""

    def observe_traffic_records(self, result: str, count: int) -> None:
        """`result` is `written`, `dropped`, or what kept it out on purpose: `sampled_out`, `excluded` or `redacted`."""

    def observe_traffic_dropped(self, reason: str, count: int) -> None:
        """`reason` is one of `DROP_REASONS`."""

    def observe_traffic_redacted(self, pattern: str, count: int) -> None:
        """Records withheld because of what is in their text, by the name of the pattern that found it."""

    def observe_traffic_flush(self, num_bytes: int, seconds: float, unix_s: float) -> None:
        """A shard of `num_bytes` reached the store at `unix_s`, in `seconds`."""


class TrafficWriter:
    """Owns the queue and the writing thread, from construction to `close`.

    `store` is a directory or any fsspec URL to write to, or a `redraft.traffic.spool.Spool` on the way to an object
    store; the caller closes a spool, after the writer. `sample_rate` in [0, 1] keeps that share of requests, chosen
    by a hash of the request id: all samples of a request share their fate, on every replica and every retry. `clock`
    gives Unix seconds and names the shards. Raises ValueError for a bad URL or rate, ImportError when
    the URL's protocol needs a package that is not installed; a store that cannot be reached is no error here,
    only a cause of drops.
    """

    def __init__(
        self,
        store: str | ShardStore,
        observer: TrafficObserver,
        *,
        max_queue_records: int = 1024,
        max_queue_bytes: int = 256 * 2**20,
        roll_bytes: int = 64 * 2**20,
        roll_seconds: float = 300.0,
        sample_rate: float = 1.0,
        redact: Redactor | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not 0.0 <= sample_rate <= 1.0:
            raise ValueError(f"sample_rate must be in [0, 1], not {sample_rate}")
        self._store = DirectStore(store) if isinstance(store, str) else store
        self._observer = observer
        self._max_queue_records, self._max_queue_bytes = max_queue_records, max_queue_bytes
        self._roll_bytes, self._roll_seconds = roll_bytes, roll_seconds
        self._sample_rate = sample_rate
        self._redact = redact
        self._clock = clock

        self._changed = threading.Condition()  # guards the next five
        self._queue: deque[tuple[TrafficRecord, int]] = deque()
        self._queue_bytes = 0
        self._num_queued = 0  # ever put into the queue
        self._num_settled = 0  # of those: written or dropped
        self._flush_until = 0  # settle this many as soon as possible
        self._closing = threading.Event()

        self._shard = _Shard()  # only the writer's thread touches it and the next
        self._num_shards = 0
        self._next_warning: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run, name="traffic-writer", daemon=True)
        self._thread.start()

    def offer(self, record: TrafficRecord) -> bool:
        """Queue a record; False if it was sampled out or dropped. Never waits for the store, never raises."""
        try:
            if not self._is_sampled(record.request_id):
                self._observer.observe_traffic_records("sampled_out", 1)
                return False
            num_bytes = record.memory_bytes()
            with self._changed:
                reason = self._refusal(num_bytes)
                if reason is None:
                    self._queue.append((record, num_bytes))
                    self._queue_bytes += num_bytes
                    self._num_queued += 1
                    self._changed.notify_all()
            if reason is not None:
                self._count_dropped(reason, 1)
            return reason is None
        except Exception as error:
            # The engine's step must go on, whatever is wrong with a record or with counting it.
            self._warn("traffic record not queued", type(error).__name__)
            with suppress(Exception):
                self._count_dropped("invalid_record", 1)
            return False

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was offered is stored or dropped; False if `timeout` seconds ran out."""
        with self._changed:
            target = self._num_queued
            self._flush_until = max(self._flush_until, target)
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._num_settled >= target, timeout)

    def close(self, timeout: float | None = None) -> bool:
        """Take no more, store what is queued, end the thread; False if `timeout` seconds ran out.

        Then the rest of the queue is dropped (reason `closed`) and the shard in hand may still be written.
        """
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        self._thread.join(timeout)
        with self._changed:
            num_left = len(self._queue)
            self._queue.clear()
            self._queue_bytes = 0
        if num_left:
            self._count_dropped("closed", num_left)
            self._settle(num_left)
        return not self._thread.is_alive()

    def _is_sampled(self, request_id: str) -> bool:
        digest = hashlib.blake2b(request_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self._sample_rate * 2**64

    def _refusal(self, num_bytes: int) -> str | None:
        if self._closing.is_set():
            return "closed"
        if num_bytes > self._max_queue_bytes:
            return "too_large"
        if len(self._queue) >= self._max_queue_records or self._queue_bytes + num_bytes > self._max_queue_bytes:
            return "queue_full"
        return None

    # From here to `_drop_one`: on the writer's thread only.

    def _run(self) -> None:
        while True:
            record = self._next_record()
            try:
                if record is not None:
                    self._gather(record)
                if self._is_due():
                    self._write_shard()
                elif record is None and self._closing.is_set():
                    return
            except Exception as error:
                # Only an observer that raises leads here. The thread outlives it: no log ends silently.
                self._warn("traffic writer failed", type(error).__name__)

    def _next_record(self) -> TrafficRecord | None:
        """The oldest queued record, or None when a shard is due or closing leaves nothing to wait for."""
        with self._changed:
            while not self._queue:
                if self._is_due() or self._closing.is_set():
                    return None
                self._changed.wait(self._roll_seconds - self._shard.age() if self._shard.num_records else None)
            record, num_bytes = self._queue.popleft()
            self._queue_bytes -= num_bytes
            return record

    def _is_due(self) -> bool:
        shard = self._shard
        if not shard.num_records:
            return False
        if shard.num_bytes >= self._roll_bytes or shard.age() >= self._roll_seconds:
            return True
        with self._changed:
            is_flush = self._num_settled < self._flush_until <= self._num_settled + shard.num_records
            return is_flush or (self._closing.is_set() and not self._queue)

    def _gather(self, record: TrafficRecord) -> None:
        """Redact, encode and add to the shard in hand: encoded, a record takes a tenth of the memory."""
        try:
            pattern = None if self._redact is None else self._redact(record)
        except Exception as error:
            self._warn("traffic redactor failed", type(error).__name__)
            self._drop_one("redaction_error")
            return
        if pattern is not None:
            self._withhold(pattern)
            return
        try:
            batch = pa.RecordBatch.from_pylist([record.to_row()], schema=ARROW_SCHEMA)
        except Exception as error:
            self._warn("traffic record does not fit the schema", type(error).__name__)
            self._drop_one("invalid_record")
            return
        self._shard.append(batch, record.created_unix_s)

    def _write_shard(self) -> None:
        shard, self._shard = self._shard, _Shard()
        started = time.monotonic()
        try:
            num_bytes = self._put(shard)
            if num_bytes is None:
                self._count_dropped("write_error", shard.num_records)
            elif not self._store.delivers_later:
                self._observer.observe_traffic_records("written", shard.num_records)
                self._observer.observe_traffic_flush(num_bytes, time.monotonic() - started, self._clock())
        finally:
            self._settle(shard.num_records)

    def _put(self, shard: _Shard) -> int | None:
        """The size of the file, or None when the last try failed too."""
        # A clock may be set back; no record may be younger than the shard's name says
        written = max(self._clock(), shard.newest_unix_s)
        name = new_shard_name(written, self._num_shards, socket.gethostname(), os.getpid())
        self._num_shards += 1
        for delay in (*_RETRY_DELAYS_S, None):
            try:
                data = shard.to_parquet()
                self._store.put(name, data, shard.num_records)
                return len(data)
            except Exception as error:  # every store raises its own kinds
                self._warn("traffic shard not stored", f"{type(error).__name__}: {error}")
            if delay is not None:
                self._closing.wait(delay)  # returns at once when closing: the last tries are not spread out
        return None

    def _withhold(self, pattern: str) -> None:
        try:
            self._observer.observe_traffic_records("redacted", 1)
            self._observer.observe_traffic_redacted(pattern, 1)
        finally:
            self._settle(1)

    def _drop_one(self, reason: str) -> None:
        try:
            self._count_dropped(reason, 1)
        finally:
            self._settle(1)

    def _count_dropped(self, reason: str, count: int) -> None:
        self._observer.observe_traffic_records("dropped", count)
        self._observer.observe_traffic_dropped(reason, count)

    def _settle(self, count: int) -> None:
        with self._changed:
            self._num_settled += count
            self._changed.notify_all()

    def _warn(self, message: str, cause: str) -> None:
        """Log a failure, each kind at most once a minute: a full disk fails every shard.

        `cause` is the name of an exception, with its text only where that cannot quote a record.
        """
        now = time.monotonic()
        if now >= self._next_warning.get(message, now):
            self._next_warning[message] = now + _WARN_INTERVAL_S
            logger.warning("%s (%s)", message, cause, extra={"path": self._store.place})


class _Shard:
    """The records gathered for the next file, encoded."""

    def __init__(self) -> None:
        self.num_records = 0
        self.num_bytes = 0
        """Arrow's size, before compression."""
        self.newest_unix_s = 0.0
        """When the youngest record was made."""
        self._since = time.monotonic()
        self._merged: list[pa.RecordBatch] = []
        self._single: list[pa.RecordBatch] = []

    def age(self) -> float:
        """Seconds since the first record."""
        return time.monotonic() - self._since

    def append(self, batch: pa.RecordBatch, created_unix_s: float) -> None:
        """Add a batch of one record."""
        if not self.num_records:
            self._since = time.monotonic()
        self.num_records += 1
        self.newest_unix_s = max(self.newest_unix_s, created_unix_s)
        self.num_bytes += batch.nbytes
        self._single.append(batch)
        if len(self._single) == ROWS_PER_GROUP:
            # A batch of one row holds dozens of tiny buffers, more overhead than data for a short record.
            self._merged += pa.Table.from_batches(self._single).combine_chunks().to_batches()
            self._single = []

    def to_parquet(self) -> bytes:
        return encode_shard(pa.Table.from_batches(self._merged + self._single, schema=ARROW_SCHEMA))
