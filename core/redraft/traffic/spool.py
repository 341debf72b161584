"""Shards on local disk on their way to an object store: while the store is away, nothing waits and nothing is lost.

    writer's thread ── put ──→ directory ── uploader's thread ──→ store

The directory is laid out like the log, so its shards can be read, or copied by hand, with the same tools. A shard
leaves it once the store has confirmed the whole object, or to make room for a newer one. What a server leaves behind,
the next one with the same directory sends. A shard that was sent twice, as the server died in between, is one object.
"""

from __future__ import annotations

import fcntl
import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from tenacity import Retrying, sleep_using_event, stop_when_event_set, wait_random_exponential

from redraft.errors import ConfigError
from redraft.object_store import explain, upload
from redraft.traffic.layout import list_files, open_root, parse_shard_name
from redraft.traffic.store import put_whole
from redraft.traffic.writer import TrafficObserver

logger = logging.getLogger(__name__)

RETRY_WAITS_S = (1.0, 60.0)
"""Between two tries: random, below a bound that doubles from the first of these to the second."""


class SpoolObserver(TrafficObserver, Protocol):
    """Counts what the spool does too; called on its threads."""

    def set_traffic_spool(self, num_bytes: int, oldest_unix_s: float | None) -> None:
        """What waits now: bytes, and when the oldest shard was written."""

    def observe_traffic_upload_failure(self) -> None:
        """The store did not take a shard; it will be tried again."""


@dataclass(slots=True)
class _Waiting:
    written_unix_s: float
    num_bytes: int
    failures: int = 0


class Spool:
    """Owns the directory and the uploading thread, from construction to `close`.

    Args:
        directory: on a local disk; made if it does not exist. One spool at a time may use it.
        url: the log in the object store.
        max_bytes: most that may wait. A shard that finds no room pushes out the oldest ones.
        retry_waits_s: see `RETRY_WAITS_S`.

    Raises ConfigError if the directory is in use or cannot be used, ValueError or ImportError for a bad URL. A store
    that cannot be reached is no error.
    """

    delivers_later = True

    def __init__(
        self,
        directory: Path,
        url: str,
        observer: SpoolObserver,
        *,
        max_bytes: int,
        retry_waits_s: tuple[float, float] = RETRY_WAITS_S,
    ) -> None:
        self._directory = directory.absolute()
        self.place = str(self._directory)
        self._filesystem, self._root = open_root(url)
        self._observer = observer
        self._max_bytes = max_bytes
        self._lock_file = _take(directory)
        self._disk = threading.Lock()  # around making and removing files, as both touch their directories

        self._changed = threading.Condition()  # guards the next four
        self._waiting = self._left_behind()  # by name
        self._num_bytes = sum(shard.num_bytes for shard in self._waiting.values())
        self._uploading: str | None = None
        self._closing = threading.Event()

        self._is_failing = False  # only the uploader's thread touches it
        self._persistent = Retrying(
            wait=wait_random_exponential(multiplier=retry_waits_s[0], max=retry_waits_s[1]),
            sleep=sleep_using_event(self._closing),
            stop=stop_when_event_set(self._closing),
            reraise=True,
        )
        self._report()
        self._thread = threading.Thread(target=self._run, name="traffic-uploader", daemon=True)
        self._thread.start()

    # -- the writer's thread ---------------------------------------------------------------------------------

    def put(self, name: str, data: bytes, num_records: int) -> None:
        """Keep a shard until the store has it. Raises OSError if the disk does not take it."""
        victims = self._make_room(len(data))
        if victims is None:
            self._count_dropped("spool_full", num_records)
            return
        for victim in victims:
            self._drop(victim, "spool_full")
        with self._disk:
            put_whole(LocalFileSystem(), str(self._directory / name), data)
        file = parse_shard_name(name, len(data), name)
        assert file is not None
        with self._changed:
            self._waiting[name] = _Waiting(file.written_unix_s, len(data))
            self._num_bytes += len(data)
            self._changed.notify_all()
        self._report()

    # -- any thread ------------------------------------------------------------------------------------------

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until nothing waits; False if `timeout` seconds ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, timeout)

    def close(self, timeout: float | None = None) -> int:
        """Send what waits, until the first failure or for `timeout` seconds; return how many shards stay behind."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            self._lock_file.close()
        with self._changed:
            return len(self._waiting)

    # -- the uploader's thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._persistent(self._upload_next)
            except Exception:  # counted and logged already; only closing ends the tries
                return

    def _wait_for_work(self) -> bool:
        """False when the spool is closing and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing.is_set())
            return bool(self._waiting)

    def _upload_next(self) -> None:
        """Send the oldest of the shards that failed least: one that the store will never take stops no other."""
        with self._changed:
            if not self._waiting:  # pushed out since
                return
            name = min(
                self._waiting, key=lambda name: (self._waiting[name].failures, self._waiting[name].written_unix_s)
            )
            self._uploading = name
        try:
            self._upload(name)
        except Exception as error:  # every store raises its own kinds
            with self._changed:
                if name in self._waiting:
                    self._waiting[name].failures += 1
            self._observer.observe_traffic_upload_failure()
            if not self._is_failing:
                to = f"{self._root}/{name}"
                logger.warning("traffic shards wait in the spool: %s", explain(error), extra={"path": to})
            self._is_failing = True
            raise
        finally:
            with self._changed:
                self._uploading = None

    def _upload(self, name: str) -> None:
        path = self._directory / name
        num_records = _count_records(path)
        if num_records is None:
            logger.warning("a traffic shard in the spool was damaged", extra={"path": str(path)})
            self._forget(name)
            self._drop(name, "spool_damaged")
            return
        started = time.monotonic()
        upload(self._filesystem, path, f"{self._root}/{name}")
        seconds = time.monotonic() - started
        self._remove(path)
        num_bytes = self._forget(name)
        self._observer.observe_traffic_records("written", num_records)
        self._observer.observe_traffic_flush(num_bytes, seconds, time.time())
        if self._is_failing:
            self._is_failing = False
            logger.info("the store takes traffic shards again", extra={"count": len(self._waiting)})

    # -- parts -----------------------------------------------------------------------------------------------

    def _left_behind(self) -> dict[str, _Waiting]:
        """Shards of the server before; what it was just writing is removed."""
        files, _ = list_files(LocalFileSystem(), self.place)
        for file in files:
            if file.is_temporary:
                Path(file.path).unlink(missing_ok=True)
        found = {
            str(Path(file.path).relative_to(self._directory)): _Waiting(file.written_unix_s, file.num_bytes)
            for file in files
            if not file.is_temporary
        }
        if found:
            logger.info("traffic shards of an earlier run wait in the spool", extra={"count": len(found)})
        return found

    def _make_room(self, num_bytes: int) -> list[str] | None:
        """The shards that give way, oldest first, no longer waiting; None if there is no room even without them."""
        victims: list[str] = []
        with self._changed:
            held = self._waiting[self._uploading].num_bytes if self._uploading in self._waiting else 0
            if held + num_bytes > self._max_bytes:
                return None
            by_age = sorted(self._waiting, key=lambda name: self._waiting[name].written_unix_s)
            for name in by_age:
                if self._num_bytes + num_bytes <= self._max_bytes:
                    break
                if name != self._uploading:
                    self._num_bytes -= self._waiting.pop(name).num_bytes
                    victims.append(name)
        return victims

    def _forget(self, name: str) -> int:
        """A shard no longer waits; return its size."""
        with self._changed:
            num_bytes = self._waiting.pop(name).num_bytes
            self._num_bytes -= num_bytes
            self._changed.notify_all()
        self._report()
        return num_bytes

    def _drop(self, name: str, reason: str) -> None:
        path = self._directory / name
        num_records = None
        with suppress(OSError):
            num_records = _count_records(path)
            self._remove(path)
        self._count_dropped(reason, num_records or 1)

    def _remove(self, path: Path) -> None:
        """Delete a shard, and its directories once they are empty."""
        with self._disk:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                for directory in path.relative_to(self._directory).parents[:-1]:
                    (self._directory / directory).rmdir()

    def _count_dropped(self, reason: str, count: int) -> None:
        self._observer.observe_traffic_records("dropped", count)
        self._observer.observe_traffic_dropped(reason, count)

    def _report(self) -> None:
        with self._changed:
            oldest = min((shard.written_unix_s for shard in self._waiting.values()), default=None)
            self._observer.set_traffic_spool(self._num_bytes, oldest)


def _take(directory: Path) -> IO[str]:
    """Make the directory ours; the kernel gives it back when this process dies."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (directory / ".lock").open("a")
    except OSError as error:
        raise ConfigError(f"cannot use {directory} as a spool of the traffic log: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(
            f"{directory} is the spool of another server: give each a directory of its own (traffic_log.spool_dir)"
        ) from error
    return file


def _count_records(path: Path) -> int | None:
    """From the end of a shard, which is written last; None if it is torn or gone. Raises OSError if the disk fails."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        return None
