"""What the server would do with teacher-forced α: verify steps, acceptance by depth, mean acceptance length for any k.

A verify step that starts at output position i tests the drafts of i, i+1, ... until one is rejected. With α of every
position known, where steps start is a Markov chain over positions, and its expectations are computed exactly:

    f(1) = 1                                   the prefill emits position 0 without a draft
    P(step at i accepts exactly a) = α(i) ... α(i+a-1) (1 - α(i+a)),  a < k;  α(i) ... α(i+k-1),  a = k
    f(i + a + 1) += f(i) P(...)                f(i): probability that a step starts at i

At temperature 0 this is what the server does, token for token. Otherwise it stands on teacher-forced α, with the
difference that `redraft_training.evaluate.scores` explains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from redraft_training.evaluate.errors import NothingToScore
from redraft_training.evaluate.scores import DraftScores, Floats

_SEGMENTS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class PredictedSpeculation:
    """Expected counts over all examples at one k.

    Attributes:
        num_output_tokens, verify_steps: the step that ends a prefill counts as one, as in the server's statistics.
        decode_steps: verify steps without those.
        drafted: drafted tokens.
        tested, accepted: [k] by depth: drafts that were reached, and those accepted.
        histogram: [k + 1], steps with a draft that accepted exactly j tokens.
    """

    num_speculative_tokens: int
    num_output_tokens: int
    verify_steps: float
    decode_steps: float
    drafted: float
    tested: tuple[float, ...]
    accepted: tuple[float, ...]
    histogram: tuple[float, ...]

    @property
    def acceptance_rate(self) -> float:
        return sum(self.accepted) / self.drafted if self.drafted else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        return 1.0 + sum(self.accepted) / self.verify_steps

    @property
    def tokens_per_decode_step(self) -> float:
        return 1.0 + sum(self.accepted) / self.decode_steps

    @property
    def acceptance_by_depth(self) -> tuple[float, ...]:
        """[k]: how often the d-th drafted token is accepted once it is reached; NaN where none is."""
        return tuple(a / t if t else float("nan") for a, t in zip(self.accepted, self.tested, strict=True))


def predict(scores: DraftScores, num_speculative_tokens: int) -> PredictedSpeculation:
    """Expected speculation with k drafted tokens a step over the examples' own texts.

    Positions that were not scored cut a text in pieces, each of which counts as a text of its own. Raises
    `NothingToScore` if there is no scored position, ValueError if k < 1.
    """
    if num_speculative_tokens < 1:
        raise ValueError("num_speculative_tokens must be at least 1")
    k = num_speculative_tokens
    total = _Sums(k)
    runs: list[Floats] = []
    num_prefills = 0
    for example in scores.examples:
        own = list(_known_runs(example.alpha))
        runs += own
        num_prefills += bool(own)
    if not runs:
        raise NothingToScore("no position was scored, so nothing can be predicted")
    runs.sort(key=len)
    for first in range(0, len(runs), _SEGMENTS_AT_ONCE):
        total.add(runs[first : first + _SEGMENTS_AT_ONCE])
    return PredictedSpeculation(
        k,
        sum(map(len, runs)) + num_prefills,
        total.steps + num_prefills,
        total.steps,
        total.drafted,
        tuple(total.tested.tolist()),
        tuple(total.accepted.tolist()),
        tuple(total.histogram.tolist()),
    )


class _Sums:
    def __init__(self, k: int) -> None:
        self.k = k
        self.steps = self.drafted = 0.0
        self.tested, self.accepted, self.histogram = np.zeros(k), np.zeros(k), np.zeros(k + 1)

    def add(self, runs: list[Floats]) -> None:
        """Walk along all texts at once: runs are α [length_i] of positions that follow each other."""
        k, longest = self.k, max(map(len, runs))
        lengths = np.array([len(run) for run in runs])
        alpha = np.zeros((len(runs), longest + k))
        for row, run in zip(alpha, runs, strict=True):
            row[: len(run)] = run
        starts = np.zeros((len(runs), longest + k + 1))
        starts[:, 0] = 1.0
        for position in range(longest):
            start = np.where(position < lengths, starts[:, position], 0.0)[:, None]
            limit = np.clip(lengths - position - 1, 0, k)[:, None]  # a step emits one token more than it accepts
            drafted = np.arange(k) < limit
            reached = np.cumprod(np.where(drafted, alpha[:, position : position + k], 0.0), axis=1)  # first d accepted
            before = np.concatenate([np.ones((len(runs), 1)), reached], axis=1)
            exactly = before - np.concatenate([reached, np.zeros((len(runs), 1))], axis=1)  # [runs, k + 1]
            starts[:, position + 1 : position + k + 2] += start * exactly
            self.steps += float(start.sum())
            self.drafted += float((start * limit).sum())
            self.tested += (start * before[:, :k] * drafted).sum(axis=0)
            self.accepted += (start * reached).sum(axis=0)
            self.histogram += (start * exactly * (limit > 0)).sum(axis=0)


def _known_runs(alpha: Floats) -> Iterator[Floats]:
    """Stretches of scored positions."""
    known = ~np.isnan(alpha)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], known, [False]]).astype(np.int8)))
    for first, last in _pairs(edges.tolist()):
        yield alpha[first:last]


def _pairs(edges: Iterable[int]) -> Iterator[tuple[int, int]]:
    iterator = iter(edges)
    return zip(iterator, iterator, strict=True)
