"""A step as telemetry wants it."""

from __future__ import annotations

from collections import Counter

from redraft.speculation.step import StepResult
from redraft.telemetry.observations import SequenceStep, StepObservation
from redraft_server.engine.scheduler import Scheduled


def step_observation(scheduled: list[Scheduled], result: StepResult) -> StepObservation:
    sequences: list[SequenceStep] = []
    skipped: Counter[str] = Counter()
    versions: set[str] = set()
    for s, output in zip(scheduled, result.outputs, strict=True):
        if not output.emitted:
            continue
        drafted = len(output.proposal.token_ids)
        sequences.append(
            SequenceStep(
                output.proposal.draft_version,
                drafted,
                output.num_accepted,
                sum(output.expected_acceptance),
                len(output.expected_acceptance),
            )
        )
        if drafted:
            versions.add(output.proposal.draft_version)
        else:
            skipped["no_draft" if s.work.max_draft else "disabled"] += 1
    return StepObservation(
        sequences=tuple(sequences),
        verify_seconds=result.verify_seconds,
        num_sequences=len(scheduled),
        num_tokens=result.num_target_tokens,
        draft_seconds=dict.fromkeys(versions, result.draft_seconds) if len(versions) == 1 else {},
        skipped=skipped,
    )
