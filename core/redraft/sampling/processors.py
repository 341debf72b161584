"""THE function from logits to probabilities. Draft, verification, training and evaluation all call it.

Order, for one row: repetition penalty, presence and frequency penalties, logit bias, bans, temperature, top-k, top-p
(of what top-k left), min-p, renormalise. Temperature 0 gives the one-hot row at the arg max after the bans. Cut-offs
are by value, so tokens tied with the last one kept are kept too and the result does not depend on a sort's order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redraft.kernels.library import kernels_for
from redraft.sampling.params import SamplingParams
from redraft.transfer import upload

BANNED = torch.finfo(torch.float32).min  # finite: a row with everything banned is still a distribution
_CANDIDATES = (64, 1024)  # most probable ids looked at before a nucleus needs the whole vocabulary sorted


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What one row of logits is processed with.

    `prompt_ids` and `output_ids` are the tokens before the row's position (drafted ones included); they are read only
    if the parameters have penalties. `banned_ids` get probability 0 (end-of-text before `min_new_tokens`), unless they
    are all there is: then they are equally likely.
    """

    params: SamplingParams
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()
    banned_ids: tuple[int, ...] = ()


def probabilities(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Distributions the tokens are drawn from.

    Args:
        logits: [rows, vocab_size], any float dtype; not changed.
        rows: one description per row.

    Returns:
        [rows, vocab_size] float32, each row sums to 1. A sampled row with NaN or +inf among its logits, or with
        nothing but -inf, is NaN throughout; the other rows are not touched by it.
    """
    scores = adjusted_logits(logits, rows)
    sampled = [index for index, row in enumerate(rows) if not row.params.is_greedy]
    if len(sampled) == len(rows):
        return _sampled_rows(scores, [row.params for row in rows])
    result = torch.zeros_like(scores)
    result.scatter_(1, scores.argmax(dim=1, keepdim=True), 1.0)
    if sampled:
        index = upload(sampled, torch.int64, scores.device)
        result[index] = _sampled_rows(scores[index], [rows[i].params for i in sampled])
    return result


def peaks(scores: Tensor) -> tuple[list[float], list[int]]:
    """The largest of each row of scores [rows, vocab_size] (NaN if one is NaN) and its id."""
    kernels = kernels_for(scores)
    if kernels is not None:
        return kernels.peaks(scores.contiguous())
    values, ids = scores.max(dim=1)
    return values.tolist(), ids.tolist()


def sure_peaks(scores: Tensor) -> tuple[list[float], list[int]]:
    """The largest probability of softmax(scores) and its id, for each row of float32 scores [rows, vocab_size]; NaN
    where a score is NaN."""
    kernels = kernels_for(scores)
    if kernels is not None:
        return kernels.sure_peaks(scores.contiguous())
    values, ids = scores.max(dim=1)
    return (values - scores.logsumexp(dim=1)).exp().tolist(), ids.tolist()


def adjusted_logits(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """logits [rows, vocab_size] as float32, after penalties, bias and bans; the argument itself if nothing changes.

    The first half of `probabilities`, for those who need logits: temperature and truncation are still to come.
    """
    assert logits.shape[0] == len(rows)
    scores = logits.float()
    if any(row.banned_ids or row.params.logit_bias or row.params.has_penalties for row in rows):
        scores = scores.clone() if scores is logits else scores
        for position, row in enumerate(rows):
            _adjust_row_(scores[position], row)
    return scores


def _adjust_row_(scores: Tensor, row: SamplingRow) -> None:
    """Penalties, bias and bans of one row, in place on scores [vocab_size]."""
    params = row.params
    if params.repetition_penalty != 1.0:
        seen = _ids(set(row.prompt_ids) | set(row.output_ids), scores)
        values = scores[seen]
        scores[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        counts = Counter(row.output_ids)
        amounts = upload(list(counts.values()), torch.float32, scores.device)
        scores[_ids(counts, scores)] -= params.presence_penalty + params.frequency_penalty * amounts
    if params.logit_bias:
        biases = upload([bias for _, bias in params.logit_bias], torch.float32, scores.device)
        scores.index_add_(0, _ids([token for token, _ in params.logit_bias], scores), biases)
    if row.banned_ids:
        scores[_ids(row.banned_ids, scores)] = BANNED


def _ids(ids: Sequence[int] | set[int] | Counter[int] | tuple[int, ...], like: Tensor) -> Tensor:
    return upload(list(ids), torch.int64, like.device)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return upload(values, torch.float32, like.device).unsqueeze(1)


def _sampled_rows(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Temperature and truncation for rows with temperature > 0: scores [rows, vocab] -> probabilities."""
    kernels = kernels_for(scores)
    if kernels is not None:
        return kernels.probabilities(
            scores.contiguous(),
            [p.temperature for p in params],
            [p.top_k for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
        )
    # with the maximum at 0 no temperature overflows; below 1e-30 float32 itself would make 0 / 0
    scores = scores - scores.max(dim=1, keepdim=True).values
    probs = torch.softmax(scores / _column([max(p.temperature, 1e-30) for p in params], scores), dim=1)
    truncated = [i for i, p in enumerate(params) if p.top_k or p.top_p < 1.0 or p.min_p > 0.0]
    if not truncated:
        return probs
    if len(truncated) == len(params):
        return _truncate(probs, params)
    index = upload(truncated, torch.int64, probs.device)
    probs[index] = _truncate(probs[index], [params[i] for i in truncated])
    return probs


def _truncate(probs: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Zero what top-k, top-p and min-p cut, and renormalise. probs [rows, vocab], each row sums to 1."""
    probs = torch.where(probs >= _floors(probs, params).unsqueeze(1), probs, 0.0)
    # in float64: a float32 sum of one long row is split among threads, and so rounds unlike that of several rows
    return probs / probs.sum(dim=1, keepdim=True, dtype=torch.float64).float()


def _floors(probs: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The smallest probability kept, [rows]."""
    vocab_size = probs.shape[1]
    if probs.device.type != "cpu":  # sorting all of it is quicker there than asking how far each nucleus reaches
        return cutoffs(probs.sort(dim=1, descending=True).values, params, vocab_size)
    floor = torch.full((len(params),), torch.nan, device=probs.device)
    for candidates in (*_CANDIDATES, vocab_size):
        unresolved = torch.isnan(floor).nonzero().flatten()
        if not len(unresolved):
            break
        rows = [params[i] for i in unresolved.tolist()]
        width = min(vocab_size, max(candidates, max(p.top_k for p in rows)))
        open_rows = probs if len(rows) == len(params) else probs[unresolved]
        floor[unresolved] = cutoffs(open_rows.topk(width, dim=1).values, rows, vocab_size)
    return floor


def cutoffs(ranked: Tensor, params: Sequence[SamplingParams], vocab_size: int) -> Tensor:
    """Smallest probability kept, per row [rows]; NaN where the nucleus reaches beyond the columns given.

    `ranked` [rows, width]: the `width` largest probabilities, descending.
    """
    width = ranked.shape[1]
    top_k = upload([min(p.top_k or vocab_size, vocab_size) for p in params], torch.int64, ranked.device)
    top_p = upload([[p.top_p] for p in params], torch.float64, ranked.device)
    column = torch.arange(width, device=ranked.device)
    in_top_k = column < top_k.unsqueeze(1)
    mass = torch.where(in_top_k, ranked, 0.0).double().cumsum(dim=1)
    # without top-k the whole row counts, also what lies beyond `width`; the same number whatever `width` is, because
    # that depends on the other rows
    total = torch.where(top_k.unsqueeze(1) < vocab_size, mass[:, -1:], 1.0)
    enough = (mass >= top_p * total) & (top_p < 1.0)
    last = torch.where(enough.any(dim=1), enough.int().argmax(dim=1), width - 1)
    last = torch.minimum(last, top_k.clamp(max=width) - 1)
    nucleus = ranked.gather(1, last.unsqueeze(1)).squeeze(1)
    if width < vocab_size:
        beyond = ~enough.any(dim=1) & (top_k > width) & (top_p.squeeze(1) < 1.0)
        nucleus = torch.where(beyond, torch.nan, nucleus)
    # no top-k and no top-p: nothing is cut by rank
    unlimited = (top_k >= vocab_size) & (top_p.squeeze(1) >= 1.0)
    nucleus = torch.where(unlimited, 0.0, nucleus)
    return torch.maximum(nucleus, ranked[:, 0] * _column([p.min_p for p in params], ranked).squeeze(1))
