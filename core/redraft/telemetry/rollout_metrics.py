"""The metric families of the rollout of drafts. Part of :class:`redraft.telemetry.metrics.ServerMetrics`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge

from redraft.telemetry.observations import DraftDescription

ROLLOUT_STATES = ("idle", "shadow", "canary", "manual")
"""What a rollout does: nothing, scoring a candidate, trying it on a share of the requests, or what it was told."""

ROLLBACK_REASONS = ("worse_than_active", "below_promise", "failed", "by_hand", "elsewhere")
"""`failed`: the candidate could not be scored. `elsewhere`: another replica or an operator withdrew it."""
REGISTRY_OPERATIONS = ("current", "list", "load", "confirm", "roll_back")


class RolloutMetrics:
    """Roles, shares, age and promise of each draft, shadow scores, swaps and roll-backs. Any thread."""

    def __init__(self, registry: CollectorRegistry, model: str, clock: Callable[[], float] = time.time) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"redraft_{name}", text, ("model", *labels), registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"redraft_{name}_total", text, ("model", *labels), registry=registry)

        self._model = model
        self._clock = clock
        self._info = gauge("draft_info", "1 for each draft in memory, with its role.", "draft_version", "role")
        self._share = gauge("draft_share", "Share of new requests, 0 to 1.", "draft_version")
        self._age = gauge("draft_age_seconds", "Time since the draft was made.", "draft_version")
        self._promised = gauge(
            "draft_promised_expected_acceptance", "Expected acceptance before it was published.", "draft_version"
        )
        self._baseline = gauge(
            "draft_baseline_expected_acceptance", "That of the draft it was compared with.", "draft_version"
        )
        self._shadow_sum = counter(
            "draft_shadow_expected_acceptance_sum",
            "Overlap with the target where it would have drafted.",
            "draft_version",
        )
        self._shadow_positions = counter(
            "draft_shadow_expected_acceptance_positions", "Positions in the shadow sum.", "draft_version"
        )
        self._state = gauge("rollout_state", "1 for what the rollout does now, else 0.", "state")
        self._swaps = counter("draft_swaps", "Changes of the active draft.").labels(model)
        self._rollbacks = counter("draft_rollbacks", "Drafts withdrawn from service, by reason.", "reason")
        self._refused = gauge("registry_refused_drafts", "Drafts in the registry that the gate refused.")
        self._errors = counter("registry_errors", "Failures to read, load from or write to the registry.", "operation")
        self._shown: dict[str, DraftDescription] = {}
        self.set_state("idle")
        for reason in ROLLBACK_REASONS:
            self._rollbacks.labels(model, reason)
        for operation in REGISTRY_OPERATIONS:
            self._errors.labels(model, operation)

    def set_drafts(self, drafts: Mapping[str, DraftDescription]) -> None:
        """State which drafts are in memory now; the series of all others go."""
        for version, old in self._shown.items():
            if version not in drafts or drafts[version].role != old.role:
                self._info.remove(self._model, version, old.role)
            if version not in drafts:
                for family in (self._share, self._age, self._promised, self._baseline):
                    family.remove(self._model, version)
        for version, draft in drafts.items():
            self._info.labels(self._model, version, draft.role).set(1)
            self._share.labels(self._model, version).set(draft.share)
            self._describe(version, draft)
        self._shown = dict(drafts)

    def _describe(self, version: str, draft: DraftDescription) -> None:
        created = draft.created_unix_s
        if created is not None:
            self._age.labels(self._model, version).set_function(lambda: max(0.0, self._clock() - created))
        for family, value in ((self._promised, draft.promised), (self._baseline, draft.baseline)):
            if value is not None:
                family.labels(self._model, version).set(value)

    def set_state(self, state: str) -> None:
        """State what the rollout does, one of `ROLLOUT_STATES`."""
        for known in ROLLOUT_STATES:
            self._state.labels(self._model, known).set(known == state)

    def observe_shadow(self, version: str, expected_sum: float, num_positions: int) -> None:
        """Count positions at which a candidate was scored."""
        self._shadow_sum.labels(self._model, version).inc(expected_sum)
        self._shadow_positions.labels(self._model, version).inc(num_positions)

    def observe_swap(self) -> None:
        """Count a change of the active draft."""
        self._swaps.inc()

    def observe_rollback(self, reason: str) -> None:
        """Count a draft withdrawn from service."""
        self._rollbacks.labels(self._model, reason).inc()

    def observe_registry_error(self, operation: str) -> None:
        """Count a failure, by what was tried: see `REGISTRY_OPERATIONS`."""
        self._errors.labels(self._model, operation).inc()

    def set_refused(self, count: int) -> None:
        """State how many drafts in the registry did not pass the gate. Not exported before: unknown is not 0."""
        self._refused.labels(self._model).set(count)

    def forget(self, version: str) -> None:
        """Drop the counters of a draft that has left."""
        for family in (self._shadow_sum, self._shadow_positions):
            family.remove(self._model, version)
