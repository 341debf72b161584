"""Tells a server what changes in the registry: each change once, through outages, without ever raising.

`RegistryPoller.poll` is the whole logic, one look at the registry with no thread and no clock; `RegistryWatcher`
calls it from a thread of its own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from redraft.registry.errors import CorruptDraft, DraftNotFound, RegistryError
from redraft.registry.manifest import DraftEntry, DraftState
from redraft.registry.pointer import Current

logger = logging.getLogger(__name__)

MAX_BACK_OFF_S = 120.0
"""After failures, the wait between two looks grows to at most this, or `poll_s` if that is more: seldom enough to spare
a store in trouble, often enough that an alert on failures in a quarter of an hour can see them."""

MANY_FAILURES = 10
"""How often the wait is doubled at most, which bounds the number that `MAX_BACK_OFF_S` is compared with."""


@dataclass(frozen=True, slots=True)
class CurrentMoved:
    """CURRENT names another version than before (or its first), or was pinned or unpinned."""

    current: Current


@dataclass(frozen=True, slots=True)
class DraftPublished:
    """A published draft that is not current and was not seen before: a candidate."""

    entry: DraftEntry


@dataclass(frozen=True, slots=True)
class DraftRolledBack:
    """The current draft, the one before it or the newest candidate was marked so, by this or another replica."""

    entry: DraftEntry


Change = CurrentMoved | DraftPublished | DraftRolledBack


class ReadableRegistry(Protocol):
    """The part of `DraftRegistry` that watching needs."""

    def current(self) -> Current | None: ...

    def versions(self) -> tuple[str, ...]: ...

    def get(self, version: str) -> DraftEntry: ...


@dataclass(frozen=True, slots=True)
class Poll:
    """What one look at the registry found."""

    changes: tuple[Change, ...]
    errors: tuple[RegistryError, ...]
    """What could not be read. A damaged draft is reported once and then left alone."""
    next_poll_s: float
    """Seconds to wait before the next look: longer while the registry cannot be read."""


def back_off_s(poll_s: float, num_failures: int) -> float:
    """Seconds to the next look after so many failures in a row."""
    factor: int = 2 ** min(num_failures, MANY_FAILURES)
    return min(poll_s * factor, max(poll_s, MAX_BACK_OFF_S))


class RegistryPoller:
    """Remembers what was seen. One thread at a time."""

    def __init__(self, registry: ReadableRegistry, poll_s: float) -> None:
        if poll_s <= 0:
            raise ValueError(f"poll_s must be more than 0, not {poll_s}")
        self._registry = registry
        self._poll_s = poll_s
        self._current: Current | None = None
        self._known: set[str] | None = None  # versions; None before the first look
        self._watched: set[str] = set()  # versions whose roll-back is news
        self._candidate: str | None = None
        self._num_failures = 0

    def poll(self) -> Poll:
        """Look once. The first look reports CURRENT and, of the drafts already there, the newest that is newer."""
        changes: list[Change] = []
        errors: list[RegistryError] = []
        try:
            self._look_at_current(changes)
            self._look_for_drafts(changes, errors)
            self._look_for_roll_backs(changes, errors)
            self._num_failures = 0
        except RegistryError as error:
            errors.append(error)
            self._num_failures += 1
        return Poll(tuple(changes), tuple(errors), back_off_s(self._poll_s, self._num_failures))

    def _look_at_current(self, changes: list[Change]) -> None:
        found = self._registry.current()
        before = self._current
        if found is None or (before is not None and found.token == before.token):
            return
        self._current = found
        if before is None or (found.version, found.pinned) != (before.version, before.pinned):
            changes.append(CurrentMoved(found))
        if before is None or found.version != before.version:
            left = {before.version} if before is not None else set()
            candidate = {self._candidate} if self._candidate is not None else set()
            self._watched = {found.version} | left | candidate

    def _look_for_drafts(self, changes: list[Change], errors: list[RegistryError]) -> None:
        versions = set(self._registry.versions())
        is_first_look = self._known is None
        entries: list[DraftEntry] = []
        for version in sorted(versions - (self._known or set())):
            try:
                entries.append(self._registry.get(version))
            except (CorruptDraft, DraftNotFound) as error:
                if isinstance(error, CorruptDraft):
                    errors.append(error)
        self._known = versions
        current = self._current.version if self._current is not None else None
        candidates = [e for e in entries if e.state is DraftState.PUBLISHED and e.version != current]
        candidates.sort(key=lambda entry: (entry.manifest.created_unix_s, entry.version))
        if is_first_look:
            candidates = self._newer_than_current(candidates, entries)[-1:]
        for entry in candidates:
            changes.append(DraftPublished(entry))
            if self._candidate is not None and self._candidate != current:
                self._watched.discard(self._candidate)  # two requests a poll for each that is watched
            self._candidate = entry.version
            self._watched.add(entry.version)

    def _newer_than_current(self, candidates: list[DraftEntry], entries: list[DraftEntry]) -> list[DraftEntry]:
        if self._current is None:
            return candidates
        created = [e.manifest.created_unix_s for e in entries if e.version == self._current.version]
        return [e for e in candidates if not created or e.manifest.created_unix_s > created[0]]

    def _look_for_roll_backs(self, changes: list[Change], errors: list[RegistryError]) -> None:
        for version in sorted(self._watched):
            try:
                entry = self._registry.get(version)
            except (CorruptDraft, DraftNotFound) as error:
                if isinstance(error, CorruptDraft):
                    errors.append(error)
                self._watched.discard(version)
                continue
            if entry.state is DraftState.ROLLED_BACK:
                changes.append(DraftRolledBack(entry))
                self._watched.discard(version)


class RegistryWatcher:
    """A thread that polls every `poll_s` seconds and calls back, on that thread, in order.

    `on_change` receives each change once, `on_error` whatever went wrong, also an exception of `on_change` itself.
    Neither may block for long. Starts with `start`, ends with `stop`.
    """

    def __init__(
        self,
        registry: ReadableRegistry,
        poll_s: float,
        on_change: Callable[[Change], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self._poller = RegistryPoller(registry, poll_s)
        self._on_change = on_change
        self._on_error = on_error
        self._poll_s = poll_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="registry-watcher", daemon=True)

    def start(self) -> None:
        """Look for the first time at once."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> bool:
        """End the thread; False if it is still reading the registry after `timeout` seconds."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def poll(self) -> float:
        """One look with its callbacks; returns the seconds to wait before the next. Only without `start`."""
        try:
            poll = self._poller.poll()
        except Exception as error:  # a fault of ours must not end the watch
            logger.exception("polling the draft registry failed")
            self._report(error)
            return back_off_s(self._poll_s, MANY_FAILURES)
        for change in poll.changes:
            try:
                self._on_change(change)
            except Exception as error:
                self._report(error)
        for problem in poll.errors:
            self._report(problem)
        return poll.next_poll_s

    def _run(self) -> None:
        delay_s = 0.0
        while not self._stopping.wait(delay_s):
            delay_s = self.poll()

    def _report(self, error: Exception) -> None:
        try:
            self._on_error(error)
        except Exception:
            logger.exception("reporting a problem with the draft registry failed")
