"""A step as telemetry wants it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from redraft.speculation.draft_model import DraftModelProposer
from redraft.speculation.step import StepResult
from redraft.telemetry.observations import SequenceStep, StepObservation
from redraft_server.engine.scheduler import Scheduled


class DraftMonitor(Protocol):
    """Who judges the drafts in service. Called on the engine's thread; never blocks, never raises."""

    def observe_step(self, sequences: Sequence[SequenceStep]) -> None:
        """What was drafted and accepted in a step, by draft model or lookup."""

    def observe_completion(self, version: str, expected_sum: float, num_positions: int) -> None:
        """A completion has ended: Σ of expected acceptance over the positions that its last draft was tested at."""


def step_observation(scheduled: list[Scheduled], result: StepResult, gaps: Sequence[float]) -> StepObservation:
    """`gaps`: seconds between the deliveries of each sequence that has had one before."""
    sequences: list[SequenceStep] = []
    skipped: Counter[str] = Counter()
    by_model: Counter[str] = Counter()  # drafted tokens by version
    by_lookup: Counter[str] = Counter()
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
            from_model = output.proposal.proposer == DraftModelProposer.name
            (by_model if from_model else by_lookup)[output.proposal.draft_version] += drafted
        else:
            skipped["no_draft" if s.work.max_draft else "disabled"] += 1
    return StepObservation(
        sequences=tuple(sequences),
        verify_seconds=result.verify_seconds,
        num_sequences=len(scheduled),
        num_tokens=result.num_target_tokens,
        draft_seconds=_share(result.draft_seconds, by_model or by_lookup),
        skipped=skipped,
        inter_token_seconds=tuple(gaps),
    )


def _share(seconds: float, drafted: Counter[str]) -> dict[str, float]:
    """Drafting time by version. Beside a draft model, looking n-grams up takes no time worth telling apart."""
    return {version: seconds * count / drafted.total() for version, count in drafted.items()}
