"""The metric families that carry a draft version. Part of :class:`redraft.telemetry.metrics.ServerMetrics`.

The engine reports here at every step, so sequences are summed in plain integers first and each counter is
touched once per step; label children are resolved once per version and position.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from redraft.telemetry.observations import SequenceStep

STEP_SECONDS_BUCKETS = tuple(0.00025 * 2**i for i in range(15))

_LABELS = ("model", "draft_version")


class DraftMetrics:
    """Acceptance, expected acceptance and drafting time, per draft version.

    Safe to call from several threads, except that `forget` must not run while its version still drafts.
    """

    def __init__(self, registry: CollectorRegistry, model: str, max_draft_tokens: int) -> None:
        self._model = model
        self._families = _Families(registry, max_draft_tokens)
        self._versions: dict[str, _Version] = {}

    def observe(self, sequences: Iterable[SequenceStep], draft_seconds: Mapping[str, float]) -> None:
        drafted_by: dict[str, list[SequenceStep]] = {}
        for sequence in sequences:
            if sequence.drafted > 0:
                drafted_by.setdefault(sequence.draft_version, []).append(sequence)
        for version, drafted in drafted_by.items():
            self._version(version).add(drafted)
        for version, seconds in draft_seconds.items():
            self._version(version).draft_seconds.observe(seconds)

    def set_active(self, versions: Iterable[str]) -> None:
        """State which versions draft now; every other known version is shown as inactive."""
        active = set(versions)
        for version in active | self._versions.keys():
            self._version(version).active.set(version in active)

    def forget(self, version: str) -> None:
        """Drop all series of a retired version, so that retraining does not grow the page for ever."""
        known = self._versions.pop(version, None)
        if known is not None:
            known.remove()

    def _version(self, version: str) -> _Version:
        known = self._versions.get(version)
        if known is None:
            known = self._versions.setdefault(version, _Version(self._families, self._model, version))
        return known


class _Families:
    def __init__(self, registry: CollectorRegistry, max_draft_tokens: int) -> None:
        def counter(name: str, text: str, *more_labels: str) -> Counter:
            return Counter(f"redraft_spec_decode_{name}_total", text, (*_LABELS, *more_labels), registry=registry)

        self.num_drafts = counter("num_drafts", "Verify steps of a sequence with at least one drafted token.")
        self.num_draft_tokens = counter("num_draft_tokens", "Drafted tokens.")
        self.num_accepted_tokens = counter(
            "num_accepted_tokens", "Drafted tokens that were accepted, without recovered and bonus tokens."
        )
        self.drafted_at = counter(
            "num_draft_tokens_per_pos", "Drafted tokens by 0-based position in the draft.", "position"
        )
        self.accepted_at = counter(
            "num_accepted_tokens_per_pos", "Accepted tokens by 0-based position in the draft.", "position"
        )
        self.expected_sum = counter(
            "expected_acceptance_sum", "Overlap of target and draft distribution, summed over positions."
        )
        self.expected_positions = counter(
            "expected_acceptance_positions", "Drafted positions in the expected acceptance sum."
        )
        self.accepted_length = Histogram(
            "redraft_spec_decode_accepted_length",
            "Accepted tokens per verify step of a sequence with at least one drafted token.",
            _LABELS,
            buckets=tuple(float(length) for length in range(max_draft_tokens + 1)),
            registry=registry,
        )
        self.draft_seconds = Histogram(
            "redraft_draft_step_seconds",
            "Time to draft for all sequences of one step.",
            _LABELS,
            buckets=STEP_SECONDS_BUCKETS,
            registry=registry,
        )
        self.active = Gauge("redraft_draft_active", "1 for a draft version in use, else 0.", _LABELS, registry=registry)

    def without_position(self) -> tuple[Counter | Histogram | Gauge, ...]:
        counters = (self.num_drafts, self.num_draft_tokens, self.num_accepted_tokens)
        return (
            *counters,
            self.expected_sum,
            self.expected_positions,
            self.accepted_length,
            self.draft_seconds,
            self.active,
        )


class _Version:
    """The label-resolved children of one draft version."""

    def __init__(self, families: _Families, model: str, version: str) -> None:
        self._families = families
        self._labels = labels = (model, version)
        self._num_drafts = families.num_drafts.labels(*labels)
        self._num_draft_tokens = families.num_draft_tokens.labels(*labels)
        self._num_accepted_tokens = families.num_accepted_tokens.labels(*labels)
        self._expected_sum = families.expected_sum.labels(*labels)
        self._expected_positions = families.expected_positions.labels(*labels)
        self._accepted_length = families.accepted_length.labels(*labels)
        self.draft_seconds = families.draft_seconds.labels(*labels)
        self.active = families.active.labels(*labels)
        self._positions: list[tuple[Counter, Counter]] = []  # (drafted, accepted) at each draft position

    def add(self, sequences: list[SequenceStep]) -> None:
        """Count the sequences of one step; each has `drafted > 0`."""
        drafted_at = [0] * max(sequence.drafted for sequence in sequences)
        accepted_at = [0] * len(drafted_at)
        for sequence in sequences:
            for position in range(sequence.drafted):
                drafted_at[position] += 1
            for position in range(sequence.accepted):
                accepted_at[position] += 1
            self._accepted_length.observe(sequence.accepted)
        self._num_drafts.inc(len(sequences))
        self._num_draft_tokens.inc(sum(drafted_at))
        self._num_accepted_tokens.inc(sum(accepted_at))
        self._expected_sum.inc(sum(sequence.expected_acceptance_sum for sequence in sequences))
        self._expected_positions.inc(sum(sequence.expected_acceptance_positions for sequence in sequences))
        self._resolve_positions(len(drafted_at))
        for (drafted, accepted), num_drafted, num_accepted in zip(
            self._positions, drafted_at, accepted_at, strict=False
        ):
            drafted.inc(num_drafted)
            accepted.inc(num_accepted)

    def remove(self) -> None:
        for family in self._families.without_position():
            family.remove(*self._labels)
        for position in range(len(self._positions)):
            self._families.drafted_at.remove(*self._labels, str(position))
            self._families.accepted_at.remove(*self._labels, str(position))

    def _resolve_positions(self, count: int) -> None:
        for position in range(len(self._positions), count):
            labels = (*self._labels, str(position))
            pair = (self._families.drafted_at.labels(*labels), self._families.accepted_at.labels(*labels))
            self._positions.append(pair)
