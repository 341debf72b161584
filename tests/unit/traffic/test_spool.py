"""The spool: whatever the store does, a record is in the log, in the spool, or counted as dropped, and in one only."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from redraft.errors import ConfigError
from redraft.traffic.reader import TrafficReader
from redraft.traffic.spool import Spool
from redraft.traffic.writer import TrafficWriter
from tests.unit.traffic.fakes import Observer, record

NOW = 1_795_527_000.0  # 2026-11-24 13:30 UTC
SHORT_WAITS = (0.001, 0.01)


class Store:
    """An object store that can be away, and can hold an upload up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.url = f"memory://{uuid4().hex}"
        self.away = False
        self.refuses: Callable[[str], bool] = lambda path: False
        self.reached, self.open = threading.Event(), threading.Event()
        self.open.set()
        upload = MemoryFileSystem.put_file

        def put_file(filesystem: MemoryFileSystem, source: str, path: str, **options: Any) -> None:
            self.reached.set()
            assert self.open.wait(20)
            if self.away or self.refuses(path):
                raise ConnectionError("away")
            upload(filesystem, source, path, **options)

        monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)

    def ids(self) -> list[str]:
        return sorted(read.request_id for read in TrafficReader(self.url).iter_records())


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    return Store(monkeypatch)


@pytest.fixture
def observer() -> Observer:
    return Observer()


@contextmanager
def spooling(directory: Path, store: Store, observer: Observer, **options: Any) -> Iterator[Log]:
    log = Log(directory, store, observer, **options)
    yield log
    log.close()


class Log:
    """A writer with a spool; each record becomes a shard of its own, a second older than the next."""

    def __init__(self, directory: Path, store: Store, observer: Observer, *, max_bytes: int = 2**30, **options: Any):
        clock = itertools.count(int(options.pop("since", NOW))).__next__
        self.directory = directory
        self.spool = Spool(directory, store.url, observer, max_bytes=max_bytes, retry_waits_s=SHORT_WAITS)
        self.writer = TrafficWriter(self.spool, observer, clock=lambda: float(clock()), **options)

    def write(self, *request_ids: str) -> None:
        for request_id in request_ids:
            assert self.writer.offer(record(request_id))
            assert self.writer.flush(20)  # returns while the store is away: nobody waits for it

    def close(self) -> int:
        assert self.writer.close(20)
        return self.spool.close(20)


def shards(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.parquet"))


def test_shards_go_up_and_leave_the_spool_empty(tmp_path: Path, store: Store, observer: Observer) -> None:
    with spooling(tmp_path, store, observer) as log:
        log.write("a", "b", "c")
        assert log.spool.flush(20)
        assert observer.results == {"written": 3}
        assert len(observer.shards) == 3
        assert observer.spool == (0, None)
    assert store.ids() == ["a", "b", "c"]
    assert TrafficReader(store.url).scan().problems == ()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]  # no directory of an hour long gone


def test_an_outage_costs_nothing(
    tmp_path: Path, store: Store, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    store.away = True
    with caplog.at_level(logging.INFO), spooling(tmp_path, store, observer) as log:
        log.write("a", "b", "c")
        assert observer.wait_for_failures(3)
        assert not log.spool.flush(0)
        assert observer.results == {}
        assert observer.spool == (sum(path.stat().st_size for path in shards(tmp_path)), NOW)
        store.away = False
        assert log.spool.flush(20)
    assert observer.results == {"written": 3}
    assert store.ids() == ["a", "b", "c"]
    assert [message for message in caplog.messages if "store" in message or "spool" in message] == [
        "traffic shards wait in the spool: the store cannot be reached (ConnectionError)",
        "the store takes traffic shards again",
    ]


def test_what_one_server_leaves_the_next_one_sends(tmp_path: Path, store: Store, observer: Observer) -> None:
    store.away = True
    log = Log(tmp_path, store, observer)
    log.write("a", "b")
    assert log.close() == 2
    store.away = False
    later = Observer()
    with spooling(tmp_path, store, later, since=NOW + 60) as log:
        log.write("c")
        assert log.spool.flush(20)
    assert later.results == {"written": 3}
    assert store.ids() == ["a", "b", "c"]


def test_the_oldest_give_way_and_are_counted(tmp_path: Path, store: Store, observer: Observer) -> None:
    store.open.clear()
    with spooling(tmp_path, store, observer) as log:
        log.write("r0")
        assert store.reached.wait(20)  # in the uploader's hands, so it stays
        log.spool._max_bytes = int(3.5 * observer.spool[0])
        log.write(*(f"r{i}" for i in range(1, 8)))
        assert observer.reasons == {"spool_full": 5}
        assert observer.spool[1] == NOW
        assert observer.spool[0] <= log.spool._max_bytes
        store.open.set()
        assert log.spool.flush(20)
    assert store.ids() == ["r0", "r6", "r7"]
    assert observer.results == {"written": 3, "dropped": 5}


def test_a_shard_on_its_way_is_not_pushed_out(tmp_path: Path, store: Store, observer: Observer) -> None:
    store.open.clear()
    with spooling(tmp_path, store, observer, max_bytes=2**20) as log:
        log.write("on its way")
        assert store.reached.wait(20)
        log.spool._max_bytes = int(1.5 * observer.spool[0])
        log.write("no room")
        assert observer.reasons == {"spool_full": 1}
        store.open.set()
        assert log.spool.flush(20)
    assert store.ids() == ["on its way"]
    assert observer.results == {"written": 1, "dropped": 1}


def test_a_shard_that_the_store_never_takes_stops_no_other(tmp_path: Path, store: Store, observer: Observer) -> None:
    with spooling(tmp_path, store, observer) as log:
        store.away = True
        log.write("cursed")
        name = shards(tmp_path)[0].name
        store.refuses = lambda path: path.endswith(name)
        store.away = False
        log.write("a", "b")
        assert observer.wait_for("written", 2)
        assert store.ids() == ["a", "b"]
        assert log.close() == 1
    assert observer.results == {"written": 2}


@pytest.mark.parametrize("num_bytes", [0, 10, 2000])
def test_a_torn_shard_is_counted_and_the_others_go_up(
    tmp_path: Path, store: Store, observer: Observer, num_bytes: int
) -> None:
    store.away = True
    log = Log(tmp_path, store, Observer())
    log.write("torn", "sound")
    log.close()
    torn = shards(tmp_path)[0]
    torn.write_bytes(torn.read_bytes()[:num_bytes])
    (torn.parent / f"{torn.name}.tmp").write_bytes(b"half")  # what a crash leaves of the shard it was writing
    store.away = False
    with spooling(tmp_path, store, observer) as log:
        assert log.spool.flush(20)
    assert store.ids() == ["sound"]
    assert observer.reasons == {"spool_damaged": 1}
    assert observer.results == {"written": 1, "dropped": 1}
    assert [path.name for path in tmp_path.rglob("*")] == [".lock"]


def test_a_shard_that_somebody_deleted_is_counted(tmp_path: Path, store: Store, observer: Observer) -> None:
    store.away = True
    with spooling(tmp_path, store, observer) as log:
        log.write("gone", "here")
        shards(tmp_path)[0].unlink()
        store.away = False
        assert log.spool.flush(20)
    assert store.ids() == ["here"]
    assert observer.reasons == {"spool_damaged": 1}


def test_closing_does_not_wait_for_a_store_that_hangs(tmp_path: Path, store: Store, observer: Observer) -> None:
    store.open.clear()
    log = Log(tmp_path, store, observer)
    log.write("a", "b")
    assert store.reached.wait(20)
    assert log.writer.close(20)
    assert log.spool.close(0) == 2
    store.open.set()
    assert log.spool.close(20) == 0
    assert store.ids() == ["a", "b"]


def test_a_directory_belongs_to_one_server(tmp_path: Path, store: Store, observer: Observer) -> None:
    with (
        spooling(tmp_path, store, observer),
        pytest.raises(ConfigError, match=r"is the spool of another server: .*traffic_log\.spool_dir"),
    ):
        Spool(tmp_path, store.url, Observer(), max_bytes=1)
    with spooling(tmp_path, store, observer) as log:  # given back
        log.write("a")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="as a spool of the traffic log: "):
        Spool(tmp_path / "file" / "below", store.url, Observer(), max_bytes=1)


def test_a_relative_directory_is_one_too(
    tmp_path: Path, store: Store, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store.away = True
    log = Log(Path("spool"), store, observer)
    log.write("a")
    log.close()
    store.away = False
    with spooling(Path("spool"), store, observer) as log:
        assert log.spool.flush(20)
    assert store.ids() == ["a"]
