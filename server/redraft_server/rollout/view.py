"""What is known of each draft, put together from the registry and from this server's traffic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from redraft.registry.manifest import DraftEntry, DraftManifest, DraftState
from redraft.telemetry.observations import DraftDescription
from redraft_server.engine.api import EngineInfo
from redraft_server.engine.drafts import ResidentDraft
from redraft_server.rollout.fleet import Fleet
from redraft_server.rollout.monitor import LiveMonitor

MAX_LISTED = 1000


class LiveState(Enum):
    """Where a draft is in its life; the names are those of the API's `DraftState`."""

    CANDIDATE = "CANDIDATE"
    SHADOW = "SHADOW"
    CANARY = "CANARY"
    ACTIVE = "ACTIVE"
    PREVIOUS = "PREVIOUS"
    REFUSED = "REFUSED"
    RETIRED = "RETIRED"
    ROLLED_BACK = "ROLLED_BACK"


@dataclass(frozen=True, slots=True)
class DraftView:
    """One draft as `DraftService` shows it."""

    version: str
    state: LiveState
    target_fingerprint: str
    tokenizer_fingerprint: str
    parent_version: str = ""
    created_unix_s: float | None = None
    expected_acceptance: float | None = None
    realised_acceptance: float | None = None
    draft_tokens: int = 0
    share: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Swap:
    """The draft that is active now, and the one that it replaced or that was withdrawn; None where there is none."""

    active: DraftView | None
    previous: DraftView | None


def role_of(version: str, fleet: Fleet) -> LiveState | None:
    """The part that a draft plays on this server; None if it plays none."""
    if fleet.active is not None and version == fleet.active.version:
        return LiveState.ACTIVE
    if fleet.shares.get(version, 0.0) > 0.0:
        return LiveState.CANARY
    if fleet.candidate is not None and version == fleet.candidate.version:
        return LiveState.SHADOW
    if fleet.previous is not None and version == fleet.previous.version:
        return LiveState.PREVIOUS
    return None


def views(
    entries: Sequence[DraftEntry],
    fleet: Fleet,
    monitor: LiveMonitor,
    info: EngineInfo,
    problems: Mapping[str, str],
) -> list[DraftView]:
    """All drafts, newest first; `problems`: versions that this server could not use, and why."""
    known = {entry.version: entry for entry in entries}
    resident = [draft for version in fleet.versions if (draft := fleet.resident(version)) is not None]
    unknown = [draft for draft in resident if draft.version not in known]
    found = [_of_resident(draft, fleet, monitor, info) for draft in unknown]
    active = fleet.active.manifest if fleet.active is not None else None
    for entry in entries[:MAX_LISTED]:
        state, reason = _state(entry, fleet, active, problems)
        found.append(_of_manifest(entry.manifest, state, reason, fleet, monitor))
    return found[:MAX_LISTED]


def describe(fleet: Fleet) -> dict[str, DraftDescription]:
    """The drafts in memory, for the metrics."""
    roles = {LiveState.ACTIVE: "active", LiveState.CANARY: "canary", LiveState.SHADOW: "candidate"}
    described: dict[str, DraftDescription] = {}
    for version in fleet.versions:
        draft = fleet.resident(version)
        if draft is None:
            continue
        role = role_of(version, fleet)
        evaluation = draft.manifest.evaluation if draft.manifest is not None else None
        described[version] = DraftDescription(
            role="leaving" if role is None else roles.get(role, "previous"),
            share=fleet.shares.get(version, 0.0),
            created_unix_s=draft.manifest.created_unix_s if draft.manifest is not None else None,
            promised=draft.promised,
            baseline=evaluation.baseline_expected_acceptance if evaluation is not None else None,
        )
    return described


def _state(
    entry: DraftEntry, fleet: Fleet, active: DraftManifest | None, problems: Mapping[str, str]
) -> tuple[LiveState, str]:
    role = role_of(entry.version, fleet)
    if role in (LiveState.ACTIVE, LiveState.CANARY, LiveState.SHADOW):
        return role, ""  # also of one that was withdrawn elsewhere a moment ago: this is what serves here
    if entry.state is not DraftState.PUBLISHED:
        return LiveState[entry.state.name], entry.reason
    if role is not None:
        return role, ""
    if entry.version in problems:
        return LiveState.REFUSED, problems[entry.version]
    is_older = active is not None and entry.manifest.created_unix_s < active.created_unix_s
    return (LiveState.RETIRED if is_older else LiveState.CANDIDATE), ""


def _of_manifest(
    manifest: DraftManifest, state: LiveState, reason: str, fleet: Fleet, monitor: LiveMonitor
) -> DraftView:
    figures = monitor.figures(manifest.version)
    return DraftView(
        version=manifest.version,
        state=state,
        target_fingerprint=manifest.target_fingerprint,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        parent_version=manifest.parent_version or "",
        created_unix_s=manifest.created_unix_s,
        expected_acceptance=None if manifest.evaluation is None else manifest.evaluation.expected_acceptance,
        realised_acceptance=figures.acceptance_rate,
        draft_tokens=figures.draft_tokens,
        share=fleet.shares.get(manifest.version, 0.0),
        reason=reason,
    )


def _of_resident(draft: ResidentDraft, fleet: Fleet, monitor: LiveMonitor, info: EngineInfo) -> DraftView:
    """A draft that the registry does not list: configured, or the registry is away."""
    state = role_of(draft.version, fleet) or LiveState.RETIRED
    if draft.manifest is not None:
        return _of_manifest(draft.manifest, state, "", fleet, monitor)
    figures = monitor.figures(draft.version)
    return DraftView(
        version=draft.version,
        state=state,
        target_fingerprint=info.target_fingerprint,
        tokenizer_fingerprint=info.tokenizer_fingerprint,
        realised_acceptance=figures.acceptance_rate,
        draft_tokens=figures.draft_tokens,
        share=fleet.shares.get(draft.version, 0.0),
    )
