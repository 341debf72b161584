"""A value made of files, made anew when they change; while they cannot be used, the last good value stays."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from redraft.errors import ConfigError

LOOK_INTERVAL_S = 5.0
"""Time between two looks at the files. Kubernetes itself takes up to a minute or two to update a mounted Secret."""

T = TypeVar("T")

_log = logging.getLogger("redraft.security")


class ReloadMetrics(Protocol):
    """The part of `redraft.telemetry.security_metrics.SecurityMetrics` that counts reloads."""

    def observe_reload(self, kind: str, result: str) -> None: ...


class Reloaded(Generic[T]):
    """`value` is what `parse` makes of the files' contents; it is replaced whole, so any thread may read it.

    `files` are (name of the setting, path), `kind` is the word for them in metrics and log lines. Contents are
    compared, not times of change: that holds for renames, symbolic links (as of a mounted Secret) and writes in place.

    Raises:
        ConfigError: on construction, if a file cannot be read, or by `parse`.
    """

    def __init__(self, kind: str, files: Sequence[tuple[str, Path]], parse: Callable[[Sequence[bytes]], T]) -> None:
        self.kind = kind
        self._files = tuple(files)
        self._parse = parse
        self._contents = self._read()
        self.value = parse(self._contents)

    def look(self) -> bool:
        """Read the files; True if there is a new value. Raises `ConfigError`, and then the old value stays."""
        contents = self._read()
        if contents == self._contents:
            return False
        self.value = self._parse(contents)
        self._contents = contents
        return True

    def _read(self) -> tuple[bytes, ...]:
        return tuple(_read(setting, path) for setting, path in self._files)


def _read(setting: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}: cannot read {path}: {error.strerror}") from None


class Follower:
    """Looks at files again and again, from `start` to `close`. `on_change` is called on the event loop after a change.

    A problem is logged once, when it arises, and counted at every look as long as it lasts.
    """

    def __init__(
        self, files: Iterable[Reloaded[Any]], metrics: ReloadMetrics, on_change: Callable[[], None] = lambda: None
    ) -> None:
        self._files = tuple(files)
        self._metrics = metrics
        self._on_change = on_change
        self._problems: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Call on the event loop."""
        if self._files:
            self._task = asyncio.create_task(self._follow(), name="credentials")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def look(self) -> None:
        """One look at all files, on a thread: a disk may hang, the event loop may not."""
        for file in self._files:
            try:
                changed = await asyncio.to_thread(file.look)
            except ConfigError as error:
                self._report(file.kind, str(error))
                continue
            if changed:
                self._metrics.observe_reload(file.kind, "ok")
                _log.info("read anew: %s", file.kind)
                self._on_change()
            self._problems.pop(file.kind, None)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            try:
                await self.look()
            except Exception:
                _log.exception("credentials could not be looked at")

    def _report(self, kind: str, problem: str) -> None:
        self._metrics.observe_reload(kind, "failed")
        if self._problems.get(kind) != problem:
            _log.error("%s; what was read before stays in use", problem)
        self._problems[kind] = problem
