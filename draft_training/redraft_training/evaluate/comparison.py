"""Candidate against the draft in service, on the same held-out positions: what the gate decides on."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from redraft.registry.manifest import EvaluationSummary
from redraft_training.evaluate.bootstrap import DEFAULT_RESAMPLES, paired_bootstrap
from redraft_training.evaluate.errors import EvaluationError, NothingToScore
from redraft_training.evaluate.scores import DraftScores, ExampleScore, Floats, bucket_name, position_buckets
from redraft_training.evaluate.speedup import CostProfile, Speedup, best, predict_speedups, speedups_from_json

_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Gain:
    """α of both drafts over the same positions, and the difference with its confidence interval over requests."""

    alpha_old: float
    alpha_new: float
    low: float
    high: float
    p_value: float
    num_positions: int
    num_requests: int

    @property
    def gain(self) -> float:
        return self.alpha_new - self.alpha_old


@dataclass(frozen=True, slots=True)
class PositionAlpha:
    """α of both drafts at a bucket of output positions."""

    alpha_old: float
    alpha_new: float
    num_positions: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that is said about a candidate before it may be published. Numbers only, no text.

    `serving_version` None: nothing is in service, and the candidate is measured against no speculation (α = 0).
    """

    candidate_version: str
    serving_version: str | None
    overall: Gain
    domains: dict[str, Gain]
    sampling: dict[str, Gain]  # `greedy`, `sampled`
    positions: dict[str, PositionAlpha]
    speedups_old: tuple[Speedup, ...]  # by k = 1, 2, ...; empty if nothing is in service
    speedups_new: tuple[Speedup, ...]
    confidence: float
    seed: int
    num_non_finite: int = 0  # positions at which the candidate's logits overflowed

    @property
    def gap_recovered(self) -> float:
        """(α_new - α_old) / (1 - α_old): the share of what was missing to full acceptance. 0 if nothing was."""
        missing = 1.0 - self.overall.alpha_old
        return self.overall.gain / missing if missing > 1e-12 else 0.0

    @property
    def best_old(self) -> Speedup | None:
        return best(self.speedups_old)

    @property
    def best_new(self) -> Speedup | None:
        return best(self.speedups_new)

    def to_summary(self, num_speculative_tokens: int) -> EvaluationSummary:
        """For the draft's manifest. The mean acceptance length is that of k, or of the largest k computed."""
        index = min(num_speculative_tokens, len(self.speedups_new)) - 1
        served = self.serving_version is not None
        return EvaluationSummary(
            expected_acceptance=self.overall.alpha_new,
            per_domain={name: gain.alpha_new for name, gain in self.domains.items() if name},
            baseline_version=self.serving_version,
            baseline_expected_acceptance=self.overall.alpha_old if served else None,
            gain_low=self.overall.low if served else None,
            gain_high=self.overall.high if served else None,
            num_positions=self.overall.num_positions,
            mean_acceptance_length=self.speedups_new[index].mean_acceptance_length if index >= 0 else None,
        )

    def to_json(self) -> str:
        return json.dumps({"schema_version": _SCHEMA_VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Raises `EvaluationError` for anything that `to_json` has not written."""
        try:
            content: dict[str, Any] = json.loads(text)
            if content.pop("schema_version") != _SCHEMA_VERSION:
                raise EvaluationError(f"the comparison's schema version is not {_SCHEMA_VERSION}: evaluate again")
            return cls(
                **{
                    **content,
                    "overall": Gain(**content["overall"]),
                    "domains": {name: Gain(**entry) for name, entry in content["domains"].items()},
                    "sampling": {name: Gain(**entry) for name, entry in content["sampling"].items()},
                    "positions": {name: PositionAlpha(**entry) for name, entry in content["positions"].items()},
                    "speedups_old": speedups_from_json(content["speedups_old"]),
                    "speedups_new": speedups_from_json(content["speedups_new"]),
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise EvaluationError("the comparison is damaged: evaluate again") from error


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """One sequence under both drafts, NaN at positions that either lacks."""

    example: ExampleScore
    old: Floats
    new: Floats


def compare(
    candidate: DraftScores,
    serving: DraftScores | None,
    *,
    profile: CostProfile | None = None,
    max_k: int = 8,
    batch_size: int = 1,
    confidence: float = 0.95,
    seed: int = 0,
    num_resamples: int = DEFAULT_RESAMPLES,
) -> Comparison:
    """Compare over the positions that both were scored at; `serving` None: against no draft at all.

    The intervals per domain and per sampling class are each at `confidence`, without a correction for their number.
    Raises `NothingToScore` if there is no common position.
    """
    pairs = _pairs(candidate, serving)
    settings: dict[str, Any] = {"seed": seed, "confidence": confidence, "num_resamples": num_resamples}
    return Comparison(
        candidate_version=candidate.draft_version,
        serving_version=None if serving is None else serving.draft_version,
        overall=_gain(pairs, "", **settings),
        domains=_gains(pairs, [pair.example.domain for pair in pairs], **settings),
        sampling=_gains(pairs, [pair.example.sampling for pair in pairs], **settings),
        positions=_by_position(pairs),
        speedups_old=()
        if serving is None
        else predict_speedups(_restricted(serving, pairs), profile, max_k=max_k, batch_size=batch_size),
        speedups_new=predict_speedups(_restricted(candidate, pairs), profile, max_k=max_k, batch_size=batch_size),
        confidence=confidence,
        seed=seed,
        num_non_finite=candidate.num_non_finite,
    )


def _pairs(candidate: DraftScores, serving: DraftScores | None) -> list[_Pair]:
    """Sequences with at least one common position, in an order of their own: the interval must not depend on how the
    examples were packed."""
    old = None if serving is None else {example.key: example.alpha for example in serving.examples}
    pairs: list[_Pair] = []
    for example in sorted(candidate.examples, key=lambda e: e.key):
        baseline = np.zeros_like(example.alpha) if old is None else old.get(example.key)
        if baseline is None:
            continue
        if len(baseline) != len(example.alpha):
            raise EvaluationError("the two drafts were scored on different outputs of the same request")
        known = ~(np.isnan(baseline) | np.isnan(example.alpha))
        if known.any():
            new = np.where(known, example.alpha, np.nan)
            pairs.append(_Pair(example, np.where(known, baseline, np.nan), new))
    if not pairs:
        raise NothingToScore(
            "the two drafts have no scored position in common: score both on the same held-out traffic"
        )
    return pairs


def _gains(pairs: Sequence[_Pair], names: Sequence[str], **settings: Any) -> dict[str, Gain]:
    groups: dict[str, list[_Pair]] = {}
    for pair, name in zip(pairs, names, strict=True):
        groups.setdefault(name, []).append(pair)
    return {name: _gain(groups[name], name, **settings) for name in sorted(groups)}


def _gain(pairs: Iterable[_Pair], name: str, *, seed: int, confidence: float, num_resamples: int) -> Gain:
    """α and the interval over requests; a request's samples are one draw."""
    sums: dict[str, Floats] = {}
    for pair in pairs:
        known = ~np.isnan(pair.new)
        own = np.array([pair.old[known].sum(), pair.new[known].sum(), known.sum()], dtype=np.float64)
        sums[pair.example.request_id] = sums.get(pair.example.request_id, 0.0) + own
    old, new, counts = np.array(list(sums.values())).T
    interval = paired_bootstrap(
        new - old,
        counts,
        seed=seed + zlib.crc32(name.encode()),  # groups must not share their draws
        confidence=confidence,
        num_resamples=num_resamples,
    )
    total = counts.sum()
    return Gain(
        float(old.sum() / total),
        float(new.sum() / total),
        interval.low,
        interval.high,
        interval.p_value,
        int(total),
        len(counts),
    )


def _by_position(pairs: Sequence[_Pair]) -> dict[str, PositionAlpha]:
    result: dict[str, PositionAlpha] = {}
    for first, last in position_buckets(max(len(pair.new) for pair in pairs)):
        old = np.concatenate([pair.old[first:last] for pair in pairs])
        new = np.concatenate([pair.new[first:last] for pair in pairs])
        known = ~np.isnan(new)
        if known.any():
            name = bucket_name(first, last)
            result[name] = PositionAlpha(float(old[known].mean()), float(new[known].mean()), int(known.sum()))
    return result


def _restricted(scores: DraftScores, pairs: Sequence[_Pair]) -> DraftScores:
    """The same draft at the common positions only."""
    known: Mapping[tuple[str, int], Floats] = {pair.example.key: ~np.isnan(pair.new) for pair in pairs}
    kept = [
        ExampleScore(e.request_id, e.sample_index, e.domain, e.sampling, np.where(known[e.key], e.alpha, np.nan))
        for e in scores.examples
        if e.key in known
    ]
    return DraftScores(scores.draft_version, tuple(kept))
