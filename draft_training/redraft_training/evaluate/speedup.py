"""From α to speed: predicted tokens per target pass, weighed with what the passes cost on a given machine.

With a draft pass at c and a verifying pass at β(k) times the cost of a plain decoding pass, a step that emits E tokens
is E / (c·k + β) times as fast as plain decoding (Leviathan et al. 2023, theorem 3.8, with β = 1 there). E is either
(1 - a^(k+1)) / (1 - a), which takes every position's acceptance to be a, or, better, what `prediction` says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redraft.files import write_file
from redraft.models.runner import ModelRunner
from redraft.speculation.cost import StepCost, measure_cost
from redraft.speculation.length import expected_tokens
from redraft_training.evaluate.errors import InvalidProfile
from redraft_training.evaluate.prediction import PredictedSpeculation, predict
from redraft_training.evaluate.scores import DraftScores

_SIZES = (1, 2, 4, 8, 16, 32)
_MAX_BYTES = 1 << 20
_SCHEMA_VERSION = 1

Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class CostProfile:
    """Seconds of a forward pass by its number of tokens, for target and draft.

    Raises `InvalidProfile` if either has no point, or a size or a time is not positive and finite.
    """

    target: Points
    draft: Points
    machine: str = ""

    def __post_init__(self) -> None:
        for name, points in (("target", self.target), ("draft", self.draft)):
            if not points or any(size < 1 or not 0 < seconds < math.inf for size, seconds in points):
                raise InvalidProfile(f"the cost profile has no usable measurement of the {name}: measure it again")

    def draft_cost(self, batch_size: int = 1) -> float:
        """c: one draft pass over `batch_size` sequences, in plain target passes."""
        return _cost(self.draft).estimate(batch_size) / _cost(self.target).estimate(batch_size)

    def verify_cost(self, num_speculative_tokens: int, batch_size: int = 1) -> float:
        """β: the target's pass over k + 1 tokens of `batch_size` sequences, in plain target passes."""
        cost = _cost(self.target)
        return cost.estimate(batch_size * (num_speculative_tokens + 1)) / cost.estimate(batch_size)

    def speedup(self, tokens_per_step: float, num_speculative_tokens: int, batch_size: int = 1) -> float:
        """Speed of decoding with k drafted tokens a step, in that of plain decoding."""
        k = num_speculative_tokens
        return tokens_per_step / (self.draft_cost(batch_size) * k + self.verify_cost(k, batch_size))

    def to_json(self) -> str:
        content = {"schema_version": _SCHEMA_VERSION, "target": self.target, "draft": self.draft}
        return json.dumps({**content, "machine": self.machine}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CostProfile:
        """Raises `InvalidProfile`."""
        try:
            content: Any = json.loads(text)
            if content["schema_version"] != _SCHEMA_VERSION:
                raise InvalidProfile(f"the cost profile's schema version is not {_SCHEMA_VERSION}: measure it again")
            target, draft = (_points(content[name]) for name in ("target", "draft"))
            return cls(target, draft, str(content.get("machine", "")))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidProfile("the cost profile is damaged: measure it again") from error

    def write(self, path: Path) -> None:
        """The file appears whole or not at all."""
        write_file(path, self.to_json().encode("utf-8"))
        path.chmod(0o644)  # written as a private file; the server's is for the trainer to read

    @classmethod
    def read(cls, path: Path) -> CostProfile:
        """Raises `InvalidProfile` if there is no such file, or it is damaged."""
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise InvalidProfile(f"{path} is too large to be a cost profile")
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidProfile(f"cannot read the cost profile {path}: {type(error).__name__}") from error


@dataclass(frozen=True, slots=True)
class Speedup:
    """What to expect at one k. `speedup` is None without a cost profile."""

    num_speculative_tokens: int
    acceptance_rate: float
    mean_acceptance_length: float
    speedup: float | None


def measure_profile(target: ModelRunner, draft: ModelRunner, *, machine: str = "") -> CostProfile:
    """Time both models by size of the pass, as the server does when it starts. Overwrites their first KV blocks."""
    return CostProfile(_measured(target), _measured(draft), machine)


def predict_speedups(
    scores: DraftScores, profile: CostProfile | None, *, max_k: int = 8, batch_size: int = 1
) -> tuple[Speedup, ...]:
    """For k = 1 .. max_k. Raises `NothingToScore` if there is no scored position."""
    return tuple(_speedup(predict(scores, k), profile, batch_size) for k in range(1, max_k + 1))


def geometric_speedup(acceptance: float, profile: CostProfile, k: int, *, batch_size: int = 1) -> float:
    """(1 - a^(k+1)) / ((1 - a)(c·k + β)): every position accepted with the same probability, as the server's length
    controller reckons."""
    return profile.speedup(expected_tokens(min(acceptance, 1.0 - 1e-9), k), k, batch_size)


def best(speedups: Sequence[Speedup]) -> Speedup | None:
    """The fastest; None if there is no cost profile, or if drafting is slower than plain decoding at every k."""
    faster = [entry for entry in speedups if entry.speedup is not None and entry.speedup > 1.0]
    return max(faster, key=lambda entry: entry.speedup or 0.0, default=None)


def _speedup(predicted: PredictedSpeculation, profile: CostProfile | None, batch_size: int) -> Speedup:
    k = predicted.num_speculative_tokens
    speedup = None if profile is None else profile.speedup(predicted.tokens_per_decode_step, k, batch_size)
    return Speedup(k, predicted.acceptance_rate, predicted.mean_acceptance_length, speedup)


def _measured(runner: ModelRunner) -> Points:
    cost = measure_cost(runner)
    capacity = runner.num_blocks * runner.block_size
    return tuple((size, cost.estimate(size)) for size in _SIZES if size <= capacity)


def _cost(points: Points) -> StepCost:
    cost = StepCost()
    for size, seconds in points:
        cost.observe(size, seconds)
    return cost


def _points(value: Any) -> Points:
    return tuple((int(size), float(seconds)) for size, seconds in value)


def speedups_from_json(entries: Sequence[Mapping[str, Any]]) -> tuple[Speedup, ...]:
    """The inverse of `dataclasses.asdict` on each."""
    return tuple(Speedup(**entry) for entry in entries)
