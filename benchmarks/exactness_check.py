"""Where two generations differ, and whether float32 rounding explains it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from redraft.sampling.params import SamplingParams
from redraft.sampling.processors import SamplingRow, probabilities
from redraft.sampling.randomness import as_key_tensor, exponentials, sequence_key

TIE = 1e-4  # logits closer than this change places with the shape of the batch

Logits = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first token at which a generation leaves the reference's."""

    prompt: str  # id
    position: int  # among the new tokens
    ours: int | None  # None: ended before
    reference: int | None
    margin: float  # between the two, from transformers' logits at the common prefix; inf if one ended early
    is_tie: bool


def find_mismatch(
    prompt_id: str,
    prompt: Sequence[int],
    ours: Sequence[int],
    reference: Sequence[int],
    params: SamplingParams,
    logits_after: Logits,
) -> Mismatch | None:
    """Compare token ids; None if they are the same. `logits_after` is called only if they are not."""
    if tuple(ours) == tuple(reference):
        return None
    pairs = zip(ours, reference, strict=False)
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(reference)))
    if position == min(len(ours), len(reference)):  # one is a prefix of the other: nothing to weigh
        a = ours[position] if position < len(ours) else None
        b = reference[position] if position < len(reference) else None
        return Mismatch(prompt_id, position, a, b, float("inf"), False)
    a, b = ours[position], reference[position]
    logits = logits_after([*prompt, *reference[:position]])
    margin, is_tie = _weigh(logits, a, b, params, position)
    return Mismatch(prompt_id, position, a, b, margin, is_tie)


def _weigh(logits: Tensor, a: int, b: int, params: SamplingParams, position: int) -> tuple[float, bool]:
    """Distance between two tokens in what the choice is made by, and whether it is within rounding."""
    if params.is_greedy:
        margin = abs(float(logits[a] - logits[b]))
        return margin, margin < TIE
    assert params.seed is not None
    key = as_key_tensor([sequence_key(params.seed, 0)])
    noise = exponentials(key, torch.tensor([position]), len(logits))[0]
    # log E - log p: the race's own units, in which a change of a logit is a change of the score over temperature
    scores = [_race_scores(logits, replace(params, top_p=top_p), noise) for top_p in _near(params.top_p)]
    margin = min(abs(float(score[a] - score[b])) for score in scores)
    # a token at the edge of the nucleus may be in or out: then either can win by any margin
    winners = {int(score.argmin()) for score in scores}
    return margin, margin < TIE / params.temperature or {a, b} <= winners


def _near(top_p: float) -> tuple[float, ...]:
    return tuple(min(1.0, top_p + shift) for shift in (-TIE, 0.0, TIE))


def _race_scores(logits: Tensor, params: SamplingParams, noise: Tensor) -> Tensor:
    probs = probabilities(logits.unsqueeze(0), [SamplingRow(params)])[0]
    return noise.log() - probs.log()
