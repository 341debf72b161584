"""One candidate on its way into service: scored in the shadow, then tried on a share of the requests."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from redraft.telemetry.metrics import ServerMetrics
from redraft_server.config import RolloutConfig
from redraft_server.engine.drafts import ResidentDraft
from redraft_server.engine.engine import Engine
from redraft_server.rollout.canary import CanaryTest, Verdict
from redraft_server.rollout.fleet import STEP_TIMEOUT_S, Fleet
from redraft_server.rollout.monitor import LiveMonitor
from redraft_server.rollout.shadow import ShadowScore, ShadowScorer

logger = logging.getLogger(__name__)

FAILED = "failed"


class Phase(Enum):
    SHADOW = "shadow"
    CANARY = "canary"
    PASSED = "passed"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial ended. `reason`: of a roll-back, one of `ROLLBACK_REASONS`."""

    promoted: bool
    reason: str = ""
    detail: str = ""


class Trial:
    """Moves one candidate through its phases. `step` is called again and again, on one thread.

    The candidate is loaded; `fleet.candidate` is set for the time of the trial by the caller.
    """

    def __init__(
        self,
        candidate: ResidentDraft,
        fleet: Fleet,
        engine: Engine,
        monitor: LiveMonitor,
        config: RolloutConfig,
        metrics: ServerMetrics,
        clock: Callable[[], float],
    ) -> None:
        self.candidate = candidate
        self.phase = Phase.SHADOW
        self._fleet = fleet
        self._engine = engine
        self._monitor = monitor
        self._config = config
        self._metrics = metrics
        self._clock = clock
        self._reported = ShadowScore()
        self._scorer: ShadowScorer | None = None
        self._test: CanaryTest | None = None
        self._deadline = 0.0

    def begin(self) -> None:
        """Enter the first phase that is configured."""
        if self._config.shadow_positions == 0:
            self._begin_canary()
            return
        self._scorer = ShadowScorer(self.candidate.proposer.runner, self._config.shadow_share)
        self._engine.set_observer(self._scorer).result(STEP_TIMEOUT_S)

    def step(self) -> Outcome | None:
        """Look at what has been seen since the last call; the outcome, if there is one now."""
        if self.phase is Phase.SHADOW:
            outcome = self._step_shadow()
            if outcome is not None or self.phase is Phase.SHADOW:
                return outcome
        if self.phase is Phase.CANARY:
            return self._step_canary()
        return Outcome(promoted=True)

    def end(self) -> None:
        """Leave whatever phase it is in. The candidate's share is the caller's to take away."""
        if self._scorer is not None:
            self._scorer = None
            self._engine.set_observer(None).result(STEP_TIMEOUT_S)

    def _step_shadow(self) -> Outcome | None:
        assert self._scorer is not None
        score, config = self._scorer.score, self._config
        self._report(score)
        if self._scorer.is_broken:
            return Outcome(False, FAILED, "it could not be run over live traffic")
        if score.num_positions < config.shadow_positions or score.expected_acceptance is None:
            return None
        difference, alpha, promised = score.difference, score.expected_acceptance, self.candidate.promised
        if difference is not None and difference < -config.promise_margin:
            detail = f"in the shadow, {-difference:.3f} below the active draft at {score.num_paired} positions"
            return Outcome(False, Verdict.WORSE.value, detail)
        if difference is None and promised is not None and alpha < promised - config.promise_margin:
            detail = f"in the shadow, {alpha:.3f} at {score.num_positions} positions, promised {promised:.3f}"
            return Outcome(False, Verdict.BROKEN_PROMISE.value, detail)
        logger.info("draft passed the shadow", extra={"draft_version": self.candidate.version})
        self.end()
        self._begin_canary()
        return None

    def _begin_canary(self) -> None:
        active, share = self._fleet.active, self._config.canary_share
        if active is None or share == 0.0:  # nobody to compare with, or nobody wants to
            self.phase = Phase.PASSED
            return
        self._test = CanaryTest(
            level=self._config.level,
            margin=self._config.margin,
            promised=self.candidate.promised,
            promise_margin=self._config.promise_margin,
        )
        self._deadline = self._clock() + self._config.canary_max_s
        self._fleet.serve({active.version: 1.0 - share, self.candidate.version: share})
        self._monitor.take_samples()  # of the time before
        self.phase = Phase.CANARY

    def _step_canary(self) -> Outcome | None:
        assert self._test is not None
        assert self._fleet.active is not None
        for sample in self._monitor.take_samples():
            if sample.version == self.candidate.version:
                self._test.candidate.add(sample.expected_acceptance)
            elif sample.version == self._fleet.active.version:
                self._test.active.add(sample.expected_acceptance)
        is_over = self._clock() >= self._deadline
        verdict = self._test.verdict_at_end() if is_over else self._test.verdict()
        if verdict.promotes:
            return Outcome(promoted=True, reason=verdict.value)
        if verdict.rolls_back:
            return Outcome(False, verdict.value, self._detail(self._test))
        return None

    def _detail(self, test: CanaryTest) -> str:
        low, high = test.difference
        return (
            f"as a canary, expected acceptance {test.candidate.mean:.3f} in {test.candidate.count} requests against "
            f"{test.active.mean:.3f} in {test.active.count} of the active draft; difference {low:.3f} to {high:.3f}"
        )

    def _report(self, score: ShadowScore) -> None:
        """Count what is new in the score."""
        self._metrics.rollout.observe_shadow(
            self.candidate.version,
            score.expected_sum - self._reported.expected_sum,
            score.num_positions - self._reported.num_positions,
        )
        self._reported = score
