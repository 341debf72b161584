"""Alternating measurement: an engine's modes, prompt by prompt, each round between two runs of redraft plain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks.cells import quartiles
from benchmarks.peers.workers.protocol import Request


class Generates(Protocol):
    """A running worker."""

    def generate(self, request: Request) -> Any:
        """Its answer, see `workers/protocol.py`."""


@dataclass(frozen=True, slots=True)
class Sampling:
    temperature: float
    top_p: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What one cell of each mode consists of: batches of prompts, how long, how often."""

    batches: Sequence[Sequence[list[int]]]
    max_new_tokens: int
    sampling: Sampling
    repeats: int


@dataclass(frozen=True, slots=True)
class Round:
    """One run of one mode, and the mean of the reference's runs around it."""

    tokens: int
    seconds: float
    reference_tokens: float
    reference_seconds: float


@dataclass
class Measured:
    """One mode over all rounds."""

    rounds: list[Round] = field(default_factory=list)
    draft_tokens: int = 0
    accepted_tokens: int = 0
    same: int = 0
    compared: int = 0

    def values(self) -> dict[str, object]:
        """The row's entries: speeds of all rounds together, quartiles of the single rounds' ratios."""
        tokens, seconds = sum(r.tokens for r in self.rounds), sum(r.seconds for r in self.rounds)
        plain = sum(r.reference_tokens for r in self.rounds) / sum(r.reference_seconds for r in self.rounds)
        ratios = [r.tokens / r.seconds * r.reference_seconds / r.reference_tokens for r in self.rounds]
        low, _, high = quartiles(ratios)
        return {
            "tokens_per_s": round(tokens / seconds, 2),
            "ratio_to_plain": round(tokens / seconds / plain, 4),
            "acceptance_rate": round(self.accepted_tokens / self.draft_tokens, 4) if self.draft_tokens else None,
            "ratio_quartiles": [round(low, 4), round(high, 4)],
            "rounds": len(self.rounds),
            "same_tokens": [self.same, self.compared] if self.compared else None,
        }


def measure(
    plan: Plan, reference: Generates, modes: Mapping[str, Generates], on_run: Callable[[str], None]
) -> dict[str, Measured]:
    """Run the plan with every mode. `on_run` hears the name of what runs next."""
    measured = {name: Measured() for name in modes}
    for repetition in range(plan.repeats):
        for number, batch in enumerate(plan.batches):
            request = _request(plan, batch, repetition)
            on_run("reference")
            before = reference.generate(request)
            answers = {}
            for name in _rotated(list(modes), repetition + number):
                on_run(name)
                answers[name] = modes[name].generate(request)
            on_run("reference")
            after = reference.generate(request)
            for name, answer in answers.items():
                measured[name].rounds.append(_round(answer, before, after))
                _count(measured[name], answer, after, plan.sampling)
    return measured


def _request(plan: Plan, batch: Sequence[list[int]], repetition: int) -> Request:
    return Request(list(batch), plan.max_new_tokens, plan.sampling.temperature, plan.sampling.top_p, repetition + 1)


def _rotated(names: list[str], turn: int) -> list[str]:
    turn %= len(names)
    return [*names[turn:], *names[:turn]]


def _round(answer: Any, before: Any, after: Any) -> Round:
    return Round(
        _num_tokens(answer),
        answer["seconds"],
        (_num_tokens(before) + _num_tokens(after)) / 2,
        (before["seconds"] + after["seconds"]) / 2,
    )


def _num_tokens(answer: Any) -> int:
    return sum(map(len, answer["token_ids"]))


def _count(measured: Measured, answer: Any, reference: Any, sampling: Sampling) -> None:
    measured.draft_tokens += answer["draft_tokens"] or 0
    measured.accepted_tokens += answer["accepted_tokens"] or 0
    if sampling.temperature == 0.0:
        pairs = list(zip(answer["token_ids"], reference["token_ids"], strict=True))
        measured.compared += len(pairs)
        measured.same += sum(ours == theirs for ours, theirs in pairs)
