"""What the rollout says of its drafts, and that versions that have gone leave nothing behind."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from redraft.telemetry.metrics import ServerMetrics
from redraft.telemetry.observations import DraftDescription
from redraft.telemetry.rollout_metrics import ROLLOUT_STATES, RolloutMetrics


class Page:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.now = 1000.0
        self.rollout = RolloutMetrics(self.registry, "demo", clock=lambda: self.now)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"redraft_{name}", {"model": "demo", **labels})

    def versions(self) -> set[str]:
        samples = [sample for family in self.registry.collect() for sample in family.samples]
        return {sample.labels["draft_version"] for sample in samples if "draft_version" in sample.labels}


@pytest.fixture
def page() -> Page:
    return Page()


def test_roles_change_and_leave_no_trace(page: Page) -> None:
    old = DraftDescription("active", 1.0)
    new = DraftDescription("candidate", 0.0, created_unix_s=900.0, promised=0.5, baseline=0.4)
    page.rollout.set_drafts({"v1": old, "v2": new})
    assert page.value("draft_info", draft_version="v2", role="candidate") == 1
    assert page.value("draft_promised_expected_acceptance", draft_version="v2") == 0.5
    assert page.value("draft_baseline_expected_acceptance", draft_version="v2") == 0.4
    assert page.value("draft_age_seconds", draft_version="v1") is None
    page.rollout.set_drafts({"v1": DraftDescription("previous", 0.0), "v2": DraftDescription("active", 1.0, 900.0)})
    assert page.value("draft_info", draft_version="v2", role="candidate") is None
    assert page.value("draft_info", draft_version="v2", role="active") == 1
    assert page.value("draft_info", draft_version="v1", role="previous") == 1
    assert page.value("draft_share", draft_version="v1") == 0.0
    page.rollout.set_drafts({"v2": DraftDescription("active", 1.0, 900.0)})
    assert page.versions() == {"v2"}
    page.rollout.set_drafts({})
    assert page.versions() == set()


def test_age_follows_the_clock(page: Page) -> None:
    page.rollout.set_drafts({"v1": DraftDescription("active", 1.0, 940.0)})
    assert page.value("draft_age_seconds", draft_version="v1") == 60.0
    page.now = 1100.0
    assert page.value("draft_age_seconds", draft_version="v1") == 160.0
    page.now = 0.0  # somebody set the clock back
    assert page.value("draft_age_seconds", draft_version="v1") == 0.0


def test_the_state_is_one_of_them(page: Page) -> None:
    assert page.value("rollout_state", state="idle") == 1
    page.rollout.set_state("canary")
    assert [page.value("rollout_state", state=state) for state in ROLLOUT_STATES] == [0, 0, 1, 0]


def test_counters(page: Page) -> None:
    page.rollout.observe_shadow("v1", 1.5, 3)
    page.rollout.observe_shadow("v1", 0.5, 1)
    page.rollout.observe_swap()
    page.rollout.observe_rollback("by_hand")
    page.rollout.observe_registry_error("list")
    page.rollout.set_refused(2)
    assert page.value("draft_shadow_expected_acceptance_sum_total", draft_version="v1") == 2.0
    assert page.value("draft_shadow_expected_acceptance_positions_total", draft_version="v1") == 4
    assert page.value("draft_swaps_total") == 1
    assert page.value("draft_rollbacks_total", reason="by_hand") == 1
    assert page.value("draft_rollbacks_total", reason="worse_than_active") == 0  # there from the start, for alerts
    assert page.value("registry_errors_total", operation="list") == 1
    assert page.value("registry_refused_drafts") == 2
    page.rollout.forget("v1")
    page.rollout.forget("never-there")
    assert page.versions() == set()


def test_forgetting_a_draft_forgets_its_shadow() -> None:
    registry = CollectorRegistry()
    metrics = ServerMetrics(registry, "demo")
    metrics.rollout.observe_shadow("v1", 1.0, 1)
    metrics.set_active_drafts(["v1"])
    metrics.forget_draft("v1")
    versions = {s.labels.get("draft_version") for family in registry.collect() for s in family.samples}
    assert "v1" not in versions
