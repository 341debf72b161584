"""One thread, one thing at a time, and no command that waits for ever."""

from __future__ import annotations

import threading

import pytest

from redraft_server.engine.api import EngineUnavailable
from redraft_server.rollout.worker import Worker

WAIT_S = 60.0
LONG_S = 3600.0


def test_commands_and_ticks_share_a_thread_and_errors_go_to_the_caller() -> None:
    names: list[str] = []
    worker = Worker("w", lambda: names.append(threading.current_thread().name), LONG_S)
    early = worker.submit(lambda: 1)
    worker.start()
    assert early.result(WAIT_S) == 1
    assert worker.submit(lambda: threading.current_thread().name).result(WAIT_S) == "w"
    with pytest.raises(ZeroDivisionError):
        worker.submit(lambda: 1 // 0).result(WAIT_S)
    assert worker.submit(lambda: 2).result(WAIT_S) == 2
    worker.stop(WAIT_S)
    assert set(names) == {"w"}


def test_a_failing_tick_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    worked = threading.Event()
    calls = iter([RuntimeError("no"), None, None, None])

    def tick() -> None:
        error = next(calls, None)
        if error is not None:
            raise error
        worked.set()

    worker = Worker("w", tick, 1e-3)
    worker.start()
    assert worked.wait(WAIT_S)
    worker.stop(WAIT_S)
    assert "w failed" in caplog.text


def test_what_waits_at_the_end_is_told() -> None:
    busy, go = threading.Event(), threading.Event()

    def stand() -> int:
        busy.set()
        assert go.wait(WAIT_S)
        return 3

    worker = Worker("w", lambda: None, LONG_S)
    worker.start()
    first = worker.submit(stand)
    assert busy.wait(WAIT_S)
    waiting, cancelled = worker.submit(lambda: 4), worker.submit(lambda: 5)
    assert cancelled.cancel()
    stopper = threading.Thread(target=worker.stop, args=(WAIT_S,))
    stopper.start()
    while not worker._stopping:
        pass
    go.set()
    stopper.join(WAIT_S)
    assert first.result(WAIT_S) == 3
    for future in (waiting, worker.submit(lambda: 6)):
        with pytest.raises(EngineUnavailable):
            future.result(WAIT_S)


def test_it_ends_with_the_engine() -> None:
    def tick() -> None:
        raise EngineUnavailable("SERVER_DRAINING", "gone")

    worker = Worker("w", tick, LONG_S)
    worker.start()
    worker._thread.join(WAIT_S)
    with pytest.raises(EngineUnavailable):
        worker.submit(lambda: 1).result(WAIT_S)
