"""The rollout: follows the registry, tries new drafts, promotes or rolls them back, and obeys operators.

    published ─→ load aside ─→ shadow ─→ canary ─→ active ─→ previous
        └→ refused here           └──────────┴→ rolled back, never tried again

All decisions are taken on one thread, one after the other. What it knows it has from the registry, so a restart loses
nothing but figures. The registry may be away at any time: the drafts in memory serve on.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from typing import TypeVar

from redraft.errors import RedraftError
from redraft.registry.errors import CurrentChanged, NoPreviousDraft
from redraft.registry.pointer import Current
from redraft.registry.store import DraftRegistry
from redraft.registry.watcher import CurrentMoved, DraftPublished, DraftRolledBack
from redraft.telemetry.metrics import ServerMetrics
from redraft_server.config import RolloutConfig
from redraft_server.engine.api import EngineUnavailable
from redraft_server.engine.drafts import ResidentDraft
from redraft_server.engine.engine import Engine
from redraft_server.rollout.fleet import Fleet, TooManyDrafts
from redraft_server.rollout.ledger import AWAY, Ledger
from redraft_server.rollout.monitor import LiveMonitor
from redraft_server.rollout.trial import Outcome, Phase, Trial
from redraft_server.rollout.view import DraftView, Swap, describe, views
from redraft_server.rollout.worker import Worker

logger = logging.getLogger(__name__)

T = TypeVar("T")
TICK_S = 0.25
"""Between two looks at a trial."""
_MAX_RETIRED = 8  # versions whose figures stay on the metrics page
BY_HAND = "by_hand"


class Rollout:
    """Owns the drafts of one engine. `start` and `stop` it; `submit` commands from any thread.

    Methods marked *commands* run on its thread only (or on the caller's, before `start`).
    """

    def __init__(
        self,
        engine: Engine,
        fleet: Fleet,
        registry: DraftRegistry,
        monitor: LiveMonitor,
        config: RolloutConfig,
        metrics: ServerMetrics,
        *,
        poll_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._fleet = fleet
        self._monitor = monitor
        self._config = config
        self._metrics = metrics
        self._clock = clock
        self._ledger = Ledger(registry, metrics, poll_s, clock)
        self._wanted: str | None = None  # the newest version to be tried
        self._trial: Trial | None = None
        self._manual = False
        self._retired: deque[str] = deque()
        self._worker = Worker("redraft-rollout", self.tick, TICK_S)
        self._publish()

    # -- any thread ------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._worker.start()

    def stop(self, timeout_s: float) -> None:
        """End after what is being done; the drafts in service serve on."""
        self._worker.stop(timeout_s)

    def submit(self, command: Callable[[], T]) -> Future[T]:
        """Run one of the commands on the rollout's thread; EngineUnavailable if it has ended."""
        return self._worker.submit(command)

    def views(self) -> list[DraftView]:
        """All drafts, newest first. Reads the registry; while it is away, what was last read of it."""
        ledger = self._ledger
        return views(ledger.entries(), self._fleet, self._monitor, self._engine.info, dict(ledger.problems))

    @property
    def state(self) -> str:
        """One of `ROLLOUT_STATES`."""
        if self._manual:
            return "manual"
        trial = self._trial
        if trial is None:
            return "idle"
        return "shadow" if trial.phase is Phase.SHADOW else "canary"

    # -- commands --------------------------------------------------------------------------------------------

    def activate(self, version: str, expected: str = "") -> Swap:
        """Let a draft serve all requests, now and in the registry.

        Raises `CurrentChanged` if `expected` is given and not active; `RegistryError` or `ModelError` if the draft
        cannot be had or used; `TooManyDrafts`.
        """
        self._check_active(expected)
        before = self._fleet.active
        draft = self._fleet.load(version)
        if draft.manifest is not None:  # the configured draft is in no registry
            self._ledger.activate(version)
        self._leave_trial(but_keep=(version,))
        self._manual = False
        self._wanted = None
        self._make_active(draft)
        return self._swap(before)

    def rollback(self, expected: str = "") -> Swap:
        """Withdraw the candidate that is being tried, or else the active draft. Raises as `activate`, and
        `NoPreviousDraft`."""
        self._check_active(expected)
        if self._trial is not None:
            candidate = self._trial.candidate
            self._roll_back_trial(Outcome(False, BY_HAND, "rolled back by hand"))
            return self._swap(candidate)
        active = self._fleet.active
        if active is None:
            raise NoPreviousDraft("no draft is active")
        previous = self._fleet.load(self._version_before(active))
        self._withdraw_active(active, previous)
        self._manual = False
        self._wanted = None
        return self._swap(active)

    def split(self, shares: Mapping[str, float]) -> list[DraftView]:
        """Share new requests between drafts until `activate` or `rollback`. Raises as `activate`."""
        shares = {version: share for version, share in shares.items() if share > 0.0}
        if len(shares) > self._config.max_resident_drafts:
            raise TooManyDrafts(
                f"{len(shares)} drafts at once, of at most {self._config.max_resident_drafts}: "
                "raise rollout.max_resident_drafts"
            )
        self._leave_trial(but_keep=shares)
        drafts = {version: self._fleet.load(version) for version in shares}
        active = self._fleet.active
        if active is None or active.version not in shares:
            self._fleet.active = drafts[max(shares, key=lambda version: shares[version])]
            self._fleet.previous = active
            self._metrics.rollout.observe_swap()
        self._manual = True
        self._fleet.serve(shares)
        self._publish()
        return [view for view in self.views() if view.version in shares]

    # -- the rollout's thread --------------------------------------------------------------------------------

    def tick(self) -> None:
        """One look at everything: the registry when it is time, the trial, and what can be freed."""
        self._follow_registry()
        if self._wanted is not None and not self._manual:
            self._try_wanted()
        if self._trial is not None and not self._manual:
            outcome = self._trial.step()
            if outcome is not None and outcome.promoted:
                self._promote(self._trial.candidate, outcome)
            elif outcome is not None:
                self._roll_back_trial(outcome)
        self._retire(self._fleet.free())
        self._publish()

    def _follow_registry(self) -> None:
        for change in self._ledger.poll():
            match change:
                case DraftRolledBack(entry):
                    self._withdrawn_elsewhere(entry.version)
                case CurrentMoved(current):
                    self._current_moved(current)
                case DraftPublished(entry):
                    if self._ledger.current is None or not self._ledger.current.pinned:
                        self._wanted = entry.version

    def _current_moved(self, current: Current) -> None:
        active = self._fleet.active
        if active is not None and current.version == active.version:
            return
        withdrawn = active is not None and active.version in self._ledger.withdrawn
        if (withdrawn or current.pinned) and not self._manual:
            self._follow(current.version)
        else:
            self._wanted = current.version

    def _follow(self, version: str) -> None:
        """Serve what others have decided on, without a trial."""
        try:
            draft = self._load(version)
        except TooManyDrafts:
            draft = None
        if draft is None:
            self._wanted = version
        else:
            self._leave_trial(but_keep=(version,))
            self._wanted = None
            self._make_active(draft)

    def _withdrawn_elsewhere(self, version: str) -> None:
        if version in self._ledger.withdrawn:
            return  # our own doing
        self._ledger.withdrawn.add(version)
        if self._trial is not None and version == self._trial.candidate.version:
            logger.warning("draft was rolled back elsewhere", extra={"draft_version": version})
            self._metrics.rollout.observe_rollback("elsewhere")
            self._leave_trial()

    def _try_wanted(self) -> None:
        """Begin the trial of the wanted version, unless it serves, failed before, or cannot be had now."""
        version = self._wanted
        assert version is not None
        trying = self._trial.candidate.version if self._trial is not None else None
        serving = self._fleet.active.version if self._fleet.active is not None else None
        if version in (trying, serving) or version in self._ledger.withdrawn or version in self._ledger.problems:
            self._wanted = None
            return
        self._leave_trial()
        try:
            draft = self._load(version)
        except TooManyDrafts:
            return  # as soon as there is room
        if draft is None:
            return
        self._wanted = None
        self._fleet.candidate = draft
        self._trial = Trial(draft, self._fleet, self._engine, self._monitor, self._config, self._metrics, self._clock)
        self._trial.begin()

    def _load(self, version: str) -> ResidentDraft | None:
        """None if it cannot be had now (it stays wanted) or cannot be used (it is never tried again here)."""
        try:
            return self._fleet.load(version)
        except (EngineUnavailable, TooManyDrafts):
            raise
        except RedraftError as error:
            self._ledger.failed("load", error)
            if not isinstance(error, AWAY):
                self._ledger.give_up(version, str(error))
        except OSError as error:
            logger.exception("reading a draft failed", extra={"draft_version": version})
            self._ledger.give_up(version, f"reading it failed: {error.strerror}")
        except Exception:
            logger.exception("loading a draft failed", extra={"draft_version": version})
            self._ledger.give_up(version, "loading it failed; see the server's log")
        return None

    def _promote(self, candidate: ResidentDraft, outcome: Outcome) -> None:
        logger.info("draft promoted", extra={"draft_version": candidate.version, "reason": outcome.reason})
        self._leave_trial(but_keep=(candidate.version,))
        self._make_active(candidate)
        self._ledger.confirm(candidate.version)

    def _roll_back_trial(self, outcome: Outcome) -> None:
        assert self._trial is not None
        version = self._trial.candidate.version
        logger.warning(
            "draft rolled back: %s", outcome.detail, extra={"draft_version": version, "reason": outcome.reason}
        )
        self._metrics.rollout.observe_rollback(outcome.reason)
        self._leave_trial()
        self._ledger.withdraw(version, f"{outcome.reason}: {outcome.detail}")
        self._publish()

    def _version_before(self, active: ResidentDraft) -> str:
        """Which draft a roll-back by hand brings back."""
        previous = self._fleet.previous
        if previous is not None and previous.version not in self._ledger.withdrawn:
            return previous.version
        return self._ledger.version_before(active.version)

    def _withdraw_active(self, active: ResidentDraft, previous: ResidentDraft) -> None:
        logger.warning("draft rolled back by hand", extra={"draft_version": active.version, "reason": BY_HAND})
        if active.manifest is not None:
            self._ledger.mark(active.version, BY_HAND)
        self._metrics.rollout.observe_rollback(BY_HAND)
        self._fleet.active, self._fleet.previous = previous, None
        self._fleet.withdraw(active.version, {previous.version: 1.0})
        self._metrics.rollout.observe_swap()
        self._publish()

    def _make_active(self, draft: ResidentDraft) -> None:
        before = self._fleet.active
        self._fleet.active, self._fleet.candidate = draft, None
        if before is not None and before.version != draft.version:
            self._fleet.previous = before
        self._fleet.serve({draft.version: 1.0})
        if before is None or before.version != draft.version:
            self._metrics.rollout.observe_swap()
        self._publish()

    def _leave_trial(self, but_keep: Collection[str] = ()) -> None:
        """End the trial, if there is one; its candidate loses its share at once unless it is kept."""
        trial, self._trial = self._trial, None
        if trial is None:
            return
        trial.end()
        active = self._fleet.active
        if trial.candidate.version in but_keep:
            self._fleet.candidate = None
            return
        self._fleet.withdraw(trial.candidate.version, {} if active is None else {active.version: 1.0})

    def _check_active(self, expected: str) -> None:
        active = self._fleet.active.version if self._fleet.active is not None else "none"
        if expected and expected != active:
            raise CurrentChanged(f"the active draft is {active}, not {expected[:100]}")

    def _swap(self, before: ResidentDraft | None) -> Swap:
        by_version = {view.version: view for view in self.views()}
        active, previous = (None if d is None else by_version.get(d.version) for d in (self._fleet.active, before))
        return Swap(active, previous)

    def _retire(self, versions: Collection[str]) -> None:
        """The figures of a few last drafts stay on the metrics page, so that somebody can look at them."""
        for version in versions:
            if version in self._retired:
                self._retired.remove(version)
            self._retired.append(version)
        while len(self._retired) > _MAX_RETIRED:
            oldest = self._retired.popleft()
            if self._fleet.resident(oldest) is None:
                self._metrics.forget_draft(oldest)

    def _publish(self) -> None:
        described = describe(self._fleet)
        self._metrics.rollout.set_drafts(described)
        self._metrics.rollout.set_state(self.state)
        self._metrics.set_active_drafts(version for version, draft in described.items() if draft.share > 0.0)
