"""The writer: bounded, never in the way, and every record ends in exactly one counter."""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from redraft.traffic import writer
from redraft.traffic.reader import TrafficReader
from redraft.traffic.writer import TrafficWriter
from tests.unit.traffic.fakes import Observer, record

NOW = 1_795_527_000.0  # 2026-11-24 13:30 UTC


class Gate:
    """An object store whose uploads wait until the gate opens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        upload = MemoryFileSystem.pipe_file

        def gated(filesystem: MemoryFileSystem, path: str, value: bytes, **kwargs: Any) -> None:
            self.reached.set()
            assert self.open.wait(20)
            upload(filesystem, path, value, **kwargs)

        monkeypatch.setattr(MemoryFileSystem, "pipe_file", gated)
        self.url = f"memory://{uuid4().hex}"


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


@pytest.fixture
def observer() -> Observer:
    return Observer()


@contextmanager
def writing(url: str | Path, observer: Observer, **options: Any) -> Iterator[TrafficWriter]:
    options = {"clock": lambda: NOW} | options
    made = TrafficWriter(str(url), observer, **options)
    yield made
    assert made.close(20)


def ids(url: str | Path) -> list[str]:
    return [read.request_id for read in TrafficReader(str(url)).iter_records()]


def test_what_is_offered_can_be_read(tmp_path: Path, observer: Observer) -> None:
    originals = [record(f"r{i}", sample_index=i) for i in range(600)]  # more than one row group and one merge
    with writing(tmp_path, observer) as log:
        assert all(log.offer(original) for original in originals)
    assert list(TrafficReader(str(tmp_path)).iter_records()) == originals
    assert observer.results == {"written": 600}
    assert observer.shards == [sum(path.stat().st_size for path in tmp_path.rglob("*.parquet"))]


def test_path_names_hour_and_mode_is_private(tmp_path: Path, observer: Observer) -> None:
    with writing(tmp_path, observer) as log:
        log.offer(record())
    (shard,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    name = str(shard.relative_to(tmp_path))
    assert re.fullmatch(r"v1/dt=2026-11-24/hour=13/[0-9a-f-]{36}-\w+-\d+\.parquet", name)
    assert stat.S_IMODE(shard.stat().st_mode) == 0o600


def test_a_clock_that_is_set_back_hides_no_record(tmp_path: Path, observer: Observer) -> None:
    """A reader leaves out shards whose names are older than what it looks for."""
    with writing(tmp_path, observer, clock=lambda: NOW - 3600) as log:
        log.offer(record("late", created_unix_s=NOW + 0.25))
        log.offer(record("early", created_unix_s=NOW - 7200))
    assert [read.request_id for read in TrafficReader(str(tmp_path)).iter_records(since=NOW)] == ["late"]


def test_an_object_store_gets_whole_objects(gate: Gate, observer: Observer) -> None:
    gate.open.set()
    with writing(gate.url, observer) as log:
        log.offer(record("r1"))
    assert ids(gate.url) == ["r1"]
    assert TrafficReader(gate.url).scan().problems == ()


def test_a_full_queue_drops_without_waiting(gate: Gate, observer: Observer) -> None:
    with writing(gate.url, observer, max_queue_records=3, roll_bytes=1) as log:
        log.offer(record("in the store's hands"))
        assert gate.reached.wait(20)
        assert [log.offer(record(f"r{i}")) for i in range(5)] == [True, True, True, False, False]
        assert observer.reasons == {"queue_full": 2}
        gate.open.set()
    assert ids(gate.url) == ["in the store's hands", "r0", "r1", "r2"]
    assert observer.results == {"written": 4, "dropped": 2}


def test_the_queue_is_bounded_in_bytes_too(gate: Gate, observer: Observer) -> None:
    size = record().memory_bytes()
    with writing(gate.url, observer, max_queue_bytes=2 * size, roll_bytes=1) as log:
        log.offer(record())
        assert gate.reached.wait(20)
        assert [log.offer(record()) for _ in range(3)] == [True, True, False]
        assert not log.offer(record(prompt_token_ids=(1,) * size))
        assert observer.reasons == {"queue_full": 1, "too_large": 1}
        gate.open.set()


def test_flush_waits_for_the_store_and_for_no_later_record(gate: Gate, observer: Observer) -> None:
    with writing(gate.url, observer) as log:
        log.offer(record("before"))
        assert not log.flush(timeout=0)
        assert gate.reached.wait(20)
        log.offer(record("after"))
        gate.open.set()
        assert log.flush(20)
        assert sorted(ids(gate.url)) == ["after", "before"]
        assert log.flush(20)  # nothing to do


def test_a_shard_rolls_by_size(tmp_path: Path, observer: Observer) -> None:
    with writing(tmp_path, observer, roll_bytes=1) as log:
        for i in range(3):
            log.offer(record(f"r{i}"))
            assert observer.wait_for("written", i + 1)
    assert len(observer.shards) == 3


def test_a_shard_rolls_by_age(tmp_path: Path, observer: Observer) -> None:
    with writing(tmp_path, observer, roll_seconds=0.01) as log:
        log.offer(record())
        assert observer.wait_for("written", 1)


def test_sampling_goes_by_request_and_is_no_drop(tmp_path: Path, observer: Observer) -> None:
    with writing(tmp_path / "a", observer, sample_rate=0.25) as log:
        kept = {f"r{i}" for i in range(800) if log.offer(record(f"r{i}"))}
    assert 140 < len(kept) < 260
    assert observer.results == {"written": len(kept), "sampled_out": 800 - len(kept)}
    assert not observer.reasons

    with writing(tmp_path / "b", Observer(), sample_rate=0.25) as log:
        again = {f"r{i}" for i in range(800) for sample in (0, 1) if log.offer(record(f"r{i}", sample_index=sample))}
    assert again == kept

    with writing(tmp_path / "c", Observer(), sample_rate=0.0) as log:
        assert not log.offer(record())
    with pytest.raises(ValueError, match="sample_rate"):
        TrafficWriter(str(tmp_path), observer, sample_rate=1.5)


def full_disk(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_records_and_nothing_else(
    tmp_path: Path, observer: Observer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writer, "_RETRY_DELAYS_S", (0.0, 0.0))
    with writing(tmp_path, observer) as log:
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(os, "fsync", full_disk)
            for i in range(3):
                assert log.offer(record(f"lost{i}"))
                assert log.flush(20)
        log.offer(record("kept"))
    assert observer.reasons == {"write_error": 3}
    assert ids(tmp_path) == ["kept"]
    assert TrafficReader(str(tmp_path)).scan().problems == ()  # no temporary file is left
    assert [message for message in caplog.messages if "No space left" in message] == caplog.messages
    assert len(caplog.messages) == 1


def test_a_passing_failure_is_retried(tmp_path: Path, observer: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_RETRY_DELAYS_S", (0.0, 0.0))
    failures = iter([True, True])
    sync = os.fsync

    def fails_twice(descriptor: int) -> None:
        if next(failures, False):
            full_disk(descriptor)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fails_twice)
    with writing(tmp_path, observer) as log:
        log.offer(record("r1"))
    assert ids(tmp_path) == ["r1"]
    assert observer.results == {"written": 1}


def test_a_shard_that_cannot_be_encoded_is_counted(
    tmp_path: Path, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(writer, "_RETRY_DELAYS_S", ())
    monkeypatch.setattr(pq, "write_table", out_of_memory)
    with writing(tmp_path, observer) as log:
        assert log.offer(record())
    assert observer.results == {"dropped": 1}
    assert observer.reasons == {"write_error": 1}


def test_a_root_that_is_a_file_is_a_drop_not_a_crash(
    tmp_path: Path, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_RETRY_DELAYS_S", ())
    (tmp_path / "file").touch()
    with writing(tmp_path / "file", observer) as log:
        assert log.offer(record())
    assert observer.reasons == {"write_error": 1}


def test_a_record_beyond_the_schema_does_not_take_others_with_it(tmp_path: Path, observer: Observer) -> None:
    with writing(tmp_path, observer) as log:
        log.offer(record("good"))
        log.offer(record("bad", prompt_token_ids=(2**40,)))
        log.offer(record("good too"))
    assert ids(tmp_path) == ["good", "good too"]
    assert observer.reasons == {"invalid_record": 1}


def test_offer_survives_anything(tmp_path: Path, observer: Observer) -> None:
    with writing(tmp_path, observer) as log:
        assert not log.offer(None)  # type: ignore[arg-type]
        assert not log.offer(record("\ud800" * 3, prompt_token_ids=None))
    assert observer.reasons == {"invalid_record": 2}


def test_the_thread_survives_an_observer_that_raises(tmp_path: Path) -> None:
    class Broken(Observer):
        def observe_traffic_records(self, result: str, count: int) -> None:
            super().observe_traffic_records(result, count)
            raise RuntimeError("broken")

    observer = Broken()
    with writing(tmp_path, observer) as log:
        for i in range(2):
            log.offer(record(f"r{i}"))
            assert log.flush(20)
    assert ids(tmp_path) == ["r0", "r1"]


def test_what_the_redactor_refuses_never_reaches_the_store(tmp_path: Path, observer: Observer) -> None:
    with writing(tmp_path, observer, redact=lambda record: "phone") as log:
        assert log.offer(record())
        assert log.flush(20)
    assert list(tmp_path.rglob("*")) == []
    assert (observer.results, observer.patterns, observer.reasons) == ({"redacted": 1}, {"phone": 1}, {})


def test_a_redactor_that_fails_lets_nothing_through(
    tmp_path: Path, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    with writing(tmp_path, observer, redact=lambda record: 1 / 0) as log:
        assert log.offer(record())
        assert log.flush(20)
    assert list(tmp_path.rglob("*")) == []
    assert observer.reasons == {"redaction_error": 1}
    assert "ZeroDivisionError" in caplog.text


def test_after_close_records_are_dropped(tmp_path: Path, observer: Observer) -> None:
    with writing(tmp_path, observer) as log:
        log.offer(record("r0"))
    assert not log.offer(record("late"))
    assert log.close(20)
    assert ids(tmp_path) == ["r0"]
    assert observer.reasons == {"closed": 1}


def test_close_gives_up_on_a_store_that_hangs(gate: Gate, observer: Observer) -> None:
    with writing(gate.url, observer, roll_bytes=1) as log:
        log.offer(record("in the store's hands"))
        assert gate.reached.wait(20)
        log.offer(record("waiting"))
        assert not log.close(timeout=0)
        assert observer.reasons == {"closed": 1}
        assert not log.flush(timeout=0)
        gate.open.set()
    assert log.flush(20)
    assert ids(gate.url) == ["in the store's hands"]
