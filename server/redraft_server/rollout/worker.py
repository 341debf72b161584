"""One thread that does one thing at a time: looks after something, and obeys commands in between."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from redraft_server.engine.api import EngineUnavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Worker:
    """Calls `tick` every `interval_s`, and commands as they come, all on one thread.

    Of ordinary priority: a thread that yields to the whole machine would do so with Python's lock in its hands.

    Ends with `stop`, or when `tick` raises EngineUnavailable; any other exception is logged and the next tick tried.
    """

    def __init__(self, name: str, tick: Callable[[], None], interval_s: float) -> None:
        self._tick = tick
        self._interval_s = interval_s
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._stopping = False  # guarded by _lock: what is put before it was set is run
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the thread after what it is doing; commands that wait fail with EngineUnavailable."""
        with self._lock:
            self._stopping = True
            self._commands.put(lambda: None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def submit(self, command: Callable[[], T]) -> Future[T]:
        """Run a command on the thread; cancelling the future before it has begun leaves it undone."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self._stopping:
                    raise _ending()
                future.set_result(command())
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            if self._stopping:
                future.set_exception(_ending())
            else:
                self._commands.put(run)
        return future

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._tick()
            except EngineUnavailable:
                break
            except Exception:
                logger.exception("%s failed; it goes on", self._thread.name)
            self._take_commands(self._interval_s)
        with self._lock:
            self._stopping = True
        self._take_commands(None)

    def _take_commands(self, timeout_s: float | None) -> None:
        try:
            command = self._commands.get_nowait() if timeout_s is None else self._commands.get(timeout=timeout_s)
            while True:
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return


def _ending() -> EngineUnavailable:
    return EngineUnavailable("SERVER_DRAINING", "the server is shutting down")
