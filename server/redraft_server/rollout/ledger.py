"""The registry as the rollout sees it: what it says, what it must still be told, and what came of its drafts here."""

from __future__ import annotations

import logging
from collections.abc import Callable

from redraft.errors import RedraftError
from redraft.registry.errors import (
    CorruptRegistry,
    CurrentChanged,
    NoPreviousDraft,
    RegistryError,
    RegistryUnavailable,
)
from redraft.registry.manifest import DraftEntry
from redraft.registry.pointer import Current
from redraft.registry.store import DraftRegistry
from redraft.registry.watcher import Change, CurrentMoved, DraftRolledBack, RegistryPoller
from redraft.telemetry.metrics import ServerMetrics

logger = logging.getLogger(__name__)

AWAY = (RegistryUnavailable, CorruptRegistry)
"""Errors of the registry as a whole: they say nothing of a draft, and later it may be back."""
_MAX_PROBLEMS = 256


class Ledger:
    """One thread at a time, but for `entries`.

    Attributes:
        current: CURRENT when it was last read.
        withdrawn: versions rolled back, here or elsewhere: never tried again.
        problems: versions that cannot be used here, and why.
    """

    def __init__(
        self, registry: DraftRegistry, metrics: ServerMetrics, poll_s: float, clock: Callable[[], float]
    ) -> None:
        self.current: Current | None = None
        self.withdrawn: set[str] = set()
        self.problems: dict[str, str] = {}
        self._registry = registry
        self._metrics = metrics
        self._clock = clock
        self._poller = RegistryPoller(registry, poll_s)
        self._next_poll = clock()
        self._unmarked: dict[str, str] = {}  # rolled back here, which the registry does not know yet
        self._entries: list[DraftEntry] = []  # the last listing that could be had

    def poll(self) -> list[Change]:
        """What has changed in the registry, if it is time to look; roll-backs first.

        A roll-back elsewhere says how the move of CURRENT that goes with it is meant.
        """
        if self._clock() < self._next_poll:
            return []
        poll = self._poller.poll()
        self._next_poll = self._clock() + poll.next_poll_s
        for error in poll.errors:
            self.failed("current", error)
        if not any(isinstance(error, AWAY) for error in poll.errors):
            self.flush()
            self._count_refused()
        for change in poll.changes:
            if isinstance(change, CurrentMoved):
                self.current = change.current
        return sorted(poll.changes, key=lambda change: not isinstance(change, DraftRolledBack))

    def entries(self) -> list[DraftEntry]:
        """All drafts, newest first; while the registry is away, as last read. Any thread."""
        try:
            self._entries = self._registry.list()
        except RegistryError as error:
            self.failed("list", error)
        return self._entries

    def activate(self, version: str) -> None:
        """Move CURRENT to a version, by hand. Raises `RegistryError`."""
        self.current = self._registry.activate(version)
        self.withdrawn.discard(version)

    def confirm(self, version: str) -> None:
        """A candidate has been promoted here: make it current and proven, unless somebody else has moved CURRENT."""
        if self.current is not None and self.current.version == version and not self.current.is_on_trial:
            return
        expected = None if self.current is None else self.current.version
        try:
            self.current = self._registry.activate(version, expected_current=expected)
        except RegistryError as error:  # another replica was first, or it is pinned or away: this one serves it
            self.failed("confirm", error)

    def withdraw(self, version: str, reason: str) -> None:
        """A draft was rolled back here: never try it again, and tell the registry, now or when it is back."""
        self.withdrawn.add(version)
        self._unmarked[version] = reason
        self.flush()

    def flush(self) -> None:
        """Tell the registry of roll-backs that it does not know yet."""
        for version, reason in list(self._unmarked.items()):
            try:
                self.mark(version, reason)
            except RegistryError as error:
                self.failed("roll_back", error)
                if isinstance(error, AWAY):
                    return
            del self._unmarked[version]

    def mark(self, version: str, reason: str) -> None:
        """Mark a version as rolled back, and move CURRENT away if it is there. Raises `RegistryError`."""
        self._registry.mark_rolled_back(version, reason)
        self.withdrawn.add(version)
        current = self._registry.current()
        if current is not None and current.version == version and not current.pinned:
            try:
                self.current = self._registry.rollback(reason=reason, expected_current=version)
            except (NoPreviousDraft, CurrentChanged):
                return  # the mark is enough: nobody starts with it

    def version_before(self, version: str) -> str:
        """What was current before. Raises `NoPreviousDraft` or another `RegistryError`."""
        current = self._registry.current()
        if current is None or current.version != version or current.previous is None:
            raise NoPreviousDraft("there is no earlier draft to roll back to")
        return current.previous

    def give_up(self, version: str, reason: str) -> None:
        """Remember that a version cannot be used here."""
        while len(self.problems) >= _MAX_PROBLEMS:
            del self.problems[next(iter(self.problems))]
        self.problems[version] = reason

    def _count_refused(self) -> None:
        """At every look: a refusal is no change for the poller, and several in a row without any are an alert."""
        try:
            self._metrics.rollout.set_refused(len(self._registry.refused_versions()))
        except RegistryError as error:
            self.failed("list", error)

    def failed(self, operation: str, error: RedraftError) -> None:
        """Log and count."""
        logger.warning("draft registry: %s", error, extra={"reason": type(error).__name__})
        self._metrics.rollout.observe_registry_error(operation)
