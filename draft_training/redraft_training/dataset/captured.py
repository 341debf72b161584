"""What the captured logits of a position say of the request's own distribution.

The kept ids are the n largest raw logits, so whatever else there is lies below the smallest of them. Together with the
two normalisers that settles most requests exactly:

- temperature, penalties and bias: `exp(adjusted / temperature - sampling_logsumexp)` is the exact probability of every
  kept id, and what they leave of 1 that of all others together;
- top-k, top-p, min-p: if the cut lies above anything that an id outside could have, the kept ids above it are the
  whole distribution, and nothing is left outside. Otherwise the mass that survives the cut is only known to lie in an
  interval (with top-p alone it is narrower than one outside id's probability); its middle is taken, and the row is
  marked as not exact;
- temperature 0: what was emitted is the arg max. Off the path it is the largest adjusted kept logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from redraft.sampling.processors import SamplingRow, cutoffs
from redraft_training.dataset.example import Label
from redraft_training.dataset.penalties import adjusted_kept

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_NEGLIGIBLE = 1e-8  # mass
_ROUNDING = 2e-6  # of a float32 normaliser, as a share of the probabilities


@dataclass(frozen=True, slots=True)
class KeptRows:
    """Captured labels as arrays: `ids` [n, m] padded with 0, `logits` [n, m] with -inf; `counts` [n] of kept ids."""

    ids: Ints
    logits: Floats
    counts: Ints

    @classmethod
    def of(cls, labels: Sequence[Label]) -> KeptRows:
        counts = np.fromiter((len(label.ids) for label in labels), np.int64, count=len(labels))
        width, total = int(counts.max(initial=1)), int(counts.sum())
        filled = np.arange(width) < counts[:, None]
        ids = np.zeros(filled.shape, np.int64)
        logits = np.full(filled.shape, -np.inf)
        ids[filled] = np.fromiter(chain.from_iterable(label.ids for label in labels), np.int64, count=total)
        logits[filled] = np.fromiter(chain.from_iterable(label.logits for label in labels), np.float64, count=total)
        return cls(ids, logits, counts)


@dataclass(frozen=True, slots=True)
class KeptProbabilities:
    """Probabilities of the kept ids [n, m], of all others together [n], and whether both are exact [n] (but for
    rounding)."""

    probs: Floats
    tail: Floats
    exact: Bools


def request_probabilities(
    labels: Sequence[Label], kept: KeptRows, rows: Sequence[SamplingRow], next_ids: Ints, vocab_size: int
) -> KeptProbabilities:
    """At the requests' own parameters. `next_ids` [n]: the token emitted there, -1 off the path."""
    scores, outside = _adjusted_scores(kept, rows, vocab_size)
    probs = np.zeros_like(scores)
    tail = np.zeros(len(labels))
    exact = np.ones(len(labels), np.bool_)
    is_greedy = np.fromiter((row.params.is_greedy for row in rows), np.bool_, count=len(rows))
    greedy, sampled = np.flatnonzero(is_greedy), np.flatnonzero(~is_greedy)
    if len(greedy):
        probs[greedy], tail[greedy], exact[greedy] = _greedy(
            scores[greedy], kept.ids[greedy], outside[greedy], next_ids[greedy]
        )
    if len(sampled):
        normalisers = np.array([labels[i].sampling_logsumexp for i in sampled.tolist()], np.float64)
        is_full = kept.counts[sampled] >= vocab_size
        probs[sampled], tail[sampled], exact[sampled] = _sampled(
            scores[sampled], normalisers, outside[sampled], is_full, [rows[i] for i in sampled.tolist()], vocab_size
        )
    return KeptProbabilities(probs, tail, exact)


def tempered_probabilities(
    labels: Sequence[Label], kept: KeptRows, temperature: float, vocab_size: int
) -> KeptProbabilities:
    """softmax(raw logits / temperature), the request's parameters ignored.

    Exact at temperature 1, where the normaliser is known. At any other the kept ids are taken for the whole vocabulary
    (the tail's mass is not known), which overstates each of them by the same factor 1 / (1 - tail).
    """
    if temperature == 1.0:
        totals = np.array([label.logsumexp for label in labels], np.float64)
        probs = np.exp(kept.logits - totals[:, None])
        tail = np.where(kept.counts >= vocab_size, 0.0, np.maximum(1.0 - probs.sum(1), 0.0))
        return KeptProbabilities(probs, tail, np.ones(len(labels), np.bool_))
    scores = kept.logits / temperature
    scores = np.exp(scores - scores.max(1, keepdims=True))
    return KeptProbabilities(scores / scores.sum(1, keepdims=True), np.zeros(len(labels)), kept.counts >= vocab_size)


def _adjusted_scores(kept: KeptRows, rows: Sequence[SamplingRow], vocab_size: int) -> tuple[Floats, Floats]:
    """Logits [n, m] after penalties, bias and bans, and what no id outside the kept ones can exceed [n]."""
    filled = np.isfinite(kept.logits)
    lowest = np.where(filled, kept.logits, np.inf).min(1)
    outside = np.where(kept.counts >= vocab_size, -np.inf, lowest)
    touched = [i for i, row in enumerate(rows) if row.banned_ids or row.params.logit_bias or row.params.has_penalties]
    if not touched:
        return kept.logits, outside
    rows_touched = [rows[i] for i in touched]
    scores = kept.logits.copy()
    scores[touched], outside[touched] = adjusted_kept(
        kept.ids[touched], kept.logits[touched], outside[touched], rows_touched, vocab_size
    )
    return scores, outside


def _greedy(scores: Floats, ids: Ints, outside: Floats, next_ids: Ints) -> tuple[Floats, Floats, Bools]:
    """One-hot rows: what was emitted, else the arg max of what is kept (of equal ones the smallest id)."""
    best = scores.max(1)
    choice = np.where(scores == best[:, None], ids, np.iinfo(np.int64).max).argmin(1)
    hot = np.zeros_like(scores)
    hot[np.arange(len(hot)), choice] = 1.0
    on_path = next_ids >= 0
    emitted = (ids == next_ids[:, None]) & np.isfinite(scores)
    hot = np.where(on_path[:, None], emitted.astype(np.float64), hot)
    return hot, 1.0 - hot.sum(1), on_path | (best > outside)


def _sampled(
    scores: Floats, normalisers: Floats, outside: Floats, is_full: Bools, rows: Sequence[SamplingRow], vocab_size: int
) -> tuple[Floats, Floats, Bools]:
    """Rows at temperature > 0: adjusted scores [n, m] to probabilities, mass of the tail, whether they are exact."""
    temperature = np.array([max(row.params.temperature, 1e-30) for row in rows])
    best = scores.max(1)
    relative = np.exp((scores - best[:, None]) / temperature[:, None])
    # at low temperatures a float32 normaliser is too coarse, but there all of the mass is among the kept ids anyway
    complete = is_full | ((outside - best) / temperature + np.log(vocab_size) < np.log(_NEGLIGIBLE))
    normaliser = np.where(complete, np.log(relative.sum(1)), normalisers - best / temperature)
    probs = relative * np.exp(-normaliser)[:, None]
    tail = np.where(complete, 0.0, np.maximum(1.0 - probs.sum(1), 0.0))
    bound = np.exp(np.minimum(outside / temperature - normalisers, 0.0))
    # one id outside cannot hold more than all of them together; -1: there is none
    bound = np.where(is_full, -1.0, np.minimum(bound, tail + _ROUNDING))
    return _truncated(probs, tail, bound, rows, vocab_size)


def _truncated(
    probs: Floats, tail: Floats, bound: Floats, rows: Sequence[SamplingRow], vocab_size: int
) -> tuple[Floats, Floats, Bools]:
    """Apply top-k, top-p and min-p to probs [n, m], of which no id outside has more than bound [n]."""
    top_k = np.array([min(row.params.top_k or vocab_size, vocab_size) for row in rows])
    top_p = np.array([row.params.top_p for row in rows])
    min_p = np.array([row.params.min_p for row in rows])
    cuts = (top_k < vocab_size) | (top_p < 1.0) | (min_p > 0.0)
    if not cuts.any():
        return probs, tail, np.ones(len(rows), np.bool_)
    ranked = -np.sort(-probs, axis=1)
    in_order = (ranked > bound[:, None]).sum(1)  # leading ranks that are those of the whole vocabulary
    counted = (top_k >= vocab_size) | (top_k <= in_order)
    params = [row.params for row in rows]
    floor = cutoffs(torch.from_numpy(ranked).float(), params, vocab_size).double().numpy()
    relative = ranked[:, 0] * min_p  # alone it decides where rank and nucleus reach beyond the kept ids
    beyond = np.where(counted, np.isnan(floor), top_p >= 1.0)
    floor = np.where(beyond, relative, floor)
    exact = ~cuts | ((counted | beyond) & (floor > bound))
    kept = np.where((probs.astype(np.float32) >= floor[:, None]) & (probs > 0.0), probs, 0.0)
    kept = kept / np.maximum(kept.sum(1, keepdims=True), 1e-300)
    surviving = _surviving_mass(probs.sum(1), np.maximum(bound, 0.0), top_k, in_order, top_p, vocab_size)
    guess = probs / surviving[:, None]
    result = np.where(cuts[:, None], np.where(exact[:, None], kept, guess), probs)
    rest = np.where(cuts, np.where(exact, 0.0, np.maximum(1.0 - guess.sum(1), 0.0)), tail)
    return result, rest, exact


def _surviving_mass(
    total: Floats, bound: Floats, top_k: Ints, in_order: Ints, top_p: Floats, vocab_size: int
) -> Floats:
    """Middle of the interval in which the mass behind the cut lies, given that of the kept ids, [n]."""
    most = np.where(top_k < vocab_size, np.minimum(total + np.maximum(top_k - in_order, 0) * bound, 1.0), 1.0)
    least = np.where(top_k < vocab_size, total, 1.0)
    high = np.where(top_p < 1.0, np.minimum(top_p * most + bound, most), most)
    low = np.maximum(np.where(top_p < 1.0, top_p * least, total), total)
    return np.maximum((low + np.maximum(high, low)) / 2, 1e-300)
