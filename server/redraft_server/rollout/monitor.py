"""What the drafts in service achieve, counted as the engine reports it and read by the rollout."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from redraft.telemetry.observations import SequenceStep

MAX_SAMPLES = 4096
MAX_VERSIONS = 64
MIN_POSITIONS = 4
"""Positions that a completion must have been tested at to count as a sample."""


@dataclass(slots=True)
class Figures:
    """Sums over this server's traffic since its start."""

    draft_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else None


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion as a draft's judge sees it."""

    version: str
    expected_acceptance: float  # mean over the positions the draft was tested at, 0 to 1


class LiveMonitor:
    """Implements `DraftMonitor`. Safe to call from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._figures: dict[str, Figures] = {}
        self._samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)

    def observe_step(self, sequences: Sequence[SequenceStep]) -> None:
        with self._lock:
            for sequence in sequences:
                if sequence.drafted:
                    figures = self._figures.get(sequence.draft_version)
                    if figures is None:
                        figures = self._new(sequence.draft_version)
                    figures.draft_tokens += sequence.drafted
                    figures.accepted_tokens += sequence.accepted

    def observe_completion(self, version: str, expected_sum: float, num_positions: int) -> None:
        if num_positions >= MIN_POSITIONS:
            with self._lock:
                self._samples.append(Sample(version, min(max(expected_sum / num_positions, 0.0), 1.0)))

    def figures(self, version: str) -> Figures:
        """A copy of what the version has done; zeros if nothing."""
        with self._lock:
            found = self._figures.get(version, Figures())
            return Figures(found.draft_tokens, found.accepted_tokens)

    def take_samples(self) -> list[Sample]:
        """The completions since the last call, oldest first (the newest `MAX_SAMPLES` if there were more)."""
        with self._lock:
            samples = list(self._samples)
            self._samples.clear()
        return samples

    def _new(self, version: str) -> Figures:
        """Room for another version; the one seen first is forgotten when there are too many."""
        if len(self._figures) >= MAX_VERSIONS:
            del self._figures[next(iter(self._figures))]
        return self._figures.setdefault(version, Figures())
