"""Log-probabilities under the target's raw logits, and the compressed rows kept for distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redraft.kernels.library import kernels_for
from redraft.sampling.processors import SamplingRow, adjusted_logits
from redraft.transfer import upload

Summaries = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of rows of logits: the ids and values of the n largest [rows, n], and logsumexp without and with the temperature."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of an emitted (or prompt) token under the target's raw logits (before any processor)."""

    token_id: int
    logprob: float
    rank: int  # 1 = most probable
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


@dataclass(frozen=True, slots=True)
class TeacherRow:
    """The target's prediction at one position: its n largest logits and logsumexp over the whole vocabulary.

    exp(logits - logsumexp) are exact probabilities of `ids`; what they leave of 1 is the mass of the tail.
    `sampling_logsumexp` is the same after the request's penalties, bias, bans and temperature (before truncation);
    None at temperature 0.
    """

    ids: tuple[int, ...]
    logits: tuple[float, ...]
    logsumexp: float
    sampling_logsumexp: float | None = None


def token_logprobs(logits: Tensor, token_ids: list[int], num_top: int) -> tuple[TokenLogprob, ...]:
    """Score token_ids[i] under logits[i], [tokens, vocab_size], with the `num_top` best alternatives."""
    normaliser = logits.logsumexp(dim=1)
    own = logits.gather(1, upload(token_ids, torch.int64, logits.device).unsqueeze(1))
    ranks = ((logits > own).sum(dim=1) + 1).tolist()
    scores = (own.squeeze(1) - normaliser).tolist()
    best = logits.topk(min(num_top, logits.shape[1]), dim=1)
    top_ids = best.indices.tolist()
    top_scores = (best.values - normaliser.unsqueeze(1)).tolist()
    return tuple(
        TokenLogprob(token, score, rank, tuple(zip(ids, values, strict=True)))
        for token, score, rank, ids, values in zip(token_ids, scores, ranks, top_ids, top_scores, strict=True)
    )


def teacher_rows(logits: Tensor, num_top: int, rows: Sequence[SamplingRow]) -> tuple[TeacherRow, ...]:
    """Compress logits [rows, vocab_size] to their `num_top` largest and both normalisers."""
    return as_teacher_rows(summaries(logits, num_top, rows), rows)


def summaries(logits: Tensor, num_top: int, rows: Sequence[SamplingRow]) -> Summaries:
    """What `teacher_rows` are made of, on the device."""
    num_top = min(num_top, logits.shape[1])
    temperatures = [row.params.temperature for row in rows]
    ids, values, totals, tempered = _summary(logits, num_top, temperatures)
    adjusted = adjusted_logits(logits, rows)
    if adjusted is not logits:
        *_, tempered = _summary(adjusted, 0, temperatures)
    return ids, values, totals, tempered


def as_teacher_rows(found: Summaries, rows: Sequence[SamplingRow]) -> tuple[TeacherRow, ...]:
    ids, values, totals, tempered = found
    return tuple(
        TeacherRow(tuple(own_ids), tuple(own_values), total, None if row.params.is_greedy else sampling_total)
        for row, own_ids, own_values, total, sampling_total in zip(
            rows, ids.tolist(), values.tolist(), totals.tolist(), tempered.tolist(), strict=True
        )
    )


def _summary(logits: Tensor, num_top: int, temperatures: Sequence[float]) -> Summaries:
    """As `CpuKernels.summarise`, anywhere."""
    kernels = kernels_for(logits)
    if kernels is not None:
        return kernels.summarise(logits.contiguous(), num_top, temperatures)
    best = logits.float().topk(num_top, dim=1)
    slopes = upload([1.0 / (temperature or 1.0) for temperature in temperatures], torch.float32, logits.device)
    tempered = (logits.float() * slopes.unsqueeze(1)).logsumexp(dim=1)
    return best.indices, best.values, logits.float().logsumexp(dim=1), tempered
