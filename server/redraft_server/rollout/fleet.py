"""Which drafts are in memory, which of them serve, and for which share of the requests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TypeVar

from redraft.errors import RedraftError
from redraft_server.engine.drafts import ResidentDraft
from redraft_server.engine.engine import Engine
from redraft_server.rollout.loader import DraftSource

logger = logging.getLogger(__name__)

T = TypeVar("T")
STEP_TIMEOUT_S = 60.0
"""Longest wait for the end of an engine's step."""


class TooManyDrafts(RedraftError):
    """No room in memory for another draft beside those in use."""


class Fleet:
    """The drafts of one engine. One thread at a time changes it; its properties may be read from any.

    Roles: `active` serves, `candidate` is being tried, `previous` is what served before. A draft that has lost its
    role stays until the last request that it drafts for has ended, and `previous` for as long as there is room.
    """

    def __init__(self, engine: Engine, source: DraftSource, max_resident: int, active: ResidentDraft | None) -> None:
        self._engine = engine
        self._source = source
        self._max_resident = max_resident
        self._resident: dict[str, ResidentDraft] = {}
        self._serving: tuple[str, ...] = ()  # what the router knows
        self._held: set[str] = set()  # loaded for what is being done now
        self.active = active
        self.candidate: ResidentDraft | None = None
        self.previous: ResidentDraft | None = None
        self.shares: Mapping[str, float] = {}
        if active is not None:
            self._resident[active.version] = active
            self._serving, self.shares = (active.version,), {active.version: 1.0}

    def resident(self, version: str) -> ResidentDraft | None:
        return self._resident.get(version)

    @property
    def versions(self) -> tuple[str, ...]:
        """In memory."""
        return tuple(self._resident)

    def load(self, version: str) -> ResidentDraft:
        """The draft in memory, loaded if it is not there. It serves nobody yet, and goes with `free` if it never does.

        Raises what `DraftLoader.load` raises, and TooManyDrafts.
        """
        found = self._resident.get(version)
        if found is None:
            self._make_room()
            found = self._resident[version] = self._source.load(version, self.between_steps)
            logger.info("draft loaded", extra={"draft_version": version})
        self._held.add(version)
        return found

    def serve(self, shares: Mapping[str, float]) -> None:
        """Share new requests between loaded drafts. Requests in progress keep theirs."""
        self._route(shares, {*self._serving, *shares})

    def withdraw(self, version: str, shares: Mapping[str, float]) -> None:
        """Like `serve`, and let the sequences of `version` move to the others now."""
        self._route(shares, {*self._serving, *shares} - {version})
        if self.candidate is not None and self.candidate.version == version:
            self.candidate = None

    def free(self) -> list[str]:
        """Free what has no role, no share and no request any more; the versions that went."""
        self._held.clear()
        return self._sweep()

    def _sweep(self) -> list[str]:
        needed = self._needed
        leaving = set(self._serving) - needed
        if leaving:
            users = _wait(self._engine.draft_users())
            if leaving - users:
                self._route(self.shares, set(self._serving) - (leaving - users))
        kept = needed | set(self._serving) | self._held
        if self.previous is not None:
            kept.add(self.previous.version)
        gone = [version for version in self._resident if version not in kept]
        for version in gone:
            del self._resident[version]
            logger.info("draft unloaded", extra={"draft_version": version})
        return gone

    def between_steps(self, action: Callable[[], T]) -> T:
        """Run `action` on the engine's thread, between two steps, and return its result."""
        return _wait(self._engine.between_steps(action))

    @property
    def _needed(self) -> set[str]:
        roles = (self.active, self.candidate)
        shared = {version for version, share in self.shares.items() if share > 0.0}
        return shared | {draft.version for draft in roles if draft is not None}

    def _make_room(self) -> None:
        self._sweep()
        if len(self._resident) >= self._max_resident and self.previous is not None:
            spare, self.previous = self.previous, None
            self._sweep()
            if spare.version in self._resident:
                self.previous = spare  # requests in progress hold it
        if len(self._resident) >= self._max_resident:
            raise TooManyDrafts(
                f"{len(self._resident)} drafts are in memory, of at most {self._max_resident}: try again when requests "
                "of the former draft have ended, or raise rollout.max_resident_drafts"
            )

    def _route(self, shares: Mapping[str, float], versions: set[str]) -> None:
        drafts = {v: self._resident[v].proposer for v in self._resident if v in versions}
        active = None if self.active is None else self.active.version
        _wait(self._engine.set_drafts(drafts, shares, active))
        self._serving, self.shares = tuple(drafts), dict(shares)
        self._held.clear()


def _wait(future: Future[T]) -> T:
    return future.result(STEP_TIMEOUT_S)
