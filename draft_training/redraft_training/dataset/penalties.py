"""Penalties, bias and bans on the few logits kept of each row: `adjusted_logits` of the one function, for sparse rows.

That function works row by row on a whole vocabulary. Here thousands of rows with a few dozen ids each are done
together; the tests hold one against the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from redraft.sampling.processors import BANNED, SamplingRow

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def adjusted_kept(
    ids: Ints, logits: Floats, lowest: Floats, rows: Sequence[SamplingRow], vocab_size: int
) -> tuple[Floats, Floats]:
    """Adjusted logits, and a bound on what is not kept.

    Args:
        ids, logits: [n, m]; padding has logit -inf.
        lowest: [n], the largest raw logit that an id outside the kept ones can have (-inf: there is none).

    Returns:
        [n, m] adjusted logits, and [n] the largest adjusted logit that an id outside can have.
    """
    cells = _Cells(ids, np.isfinite(logits), vocab_size)
    penalty = np.array([row.params.repetition_penalty for row in rows])
    presence = np.array([row.params.presence_penalty for row in rows])
    frequency = np.array([row.params.frequency_penalty for row in rows])
    output = cells.count([row.output_ids for row in rows])
    seen = (output > 0) | (cells.count([row.prompt_ids for row in rows]) > 0)
    scores = np.where(seen, _repeated(logits, penalty[:, None]), logits)
    scores -= (output > 0) * presence[:, None] + output * frequency[:, None]
    bias, highest_bias = cells.bias([row.params.logit_bias for row in rows])
    scores += bias
    scores[cells.count([row.banned_ids for row in rows]) > 0] = BANNED
    outside = np.maximum(lowest, _repeated(lowest, penalty))
    outside += np.array([_largest_gain(row) for row in rows]) + highest_bias
    return scores, outside


def _repeated(logits: Floats, penalty: Floats) -> Floats:
    return np.where(logits > 0, logits / penalty, logits * penalty)


def _largest_gain(row: SamplingRow) -> float:
    """What negative presence and frequency penalties add at most to an id: they reward what was said before."""
    params = row.params
    if (params.presence_penalty >= 0.0 and params.frequency_penalty >= 0.0) or not row.output_ids:
        return 0.0
    most = max(Counter(row.output_ids).values())
    return max(0.0, *(-params.presence_penalty - params.frequency_penalty * count for count in (1, most)))


class _Cells:
    """Finds tokens of rows among the rows' kept ids, all at once."""

    def __init__(self, ids: Ints, filled: npt.NDArray[np.bool_], vocab_size: int) -> None:
        self._shape = ids.shape
        self._vocab_size = vocab_size
        keys = np.arange(len(ids))[:, None] * vocab_size + ids
        self._places = np.flatnonzero(filled)
        order = np.argsort(keys.ravel()[self._places])
        self._places = self._places[order]
        self._keys = keys.ravel()[self._places]

    def count(self, tokens: Sequence[Sequence[int]]) -> Ints:
        """How often each kept id is among its row's tokens, [n, m]."""
        keys = self._keys_of(tokens)
        places, hit = self._find(keys)
        return np.bincount(places[hit], minlength=self._shape[0] * self._shape[1]).reshape(self._shape)

    def bias(self, biases: Sequence[tuple[tuple[int, float], ...]]) -> tuple[Floats, Floats]:
        """The bias of each kept id [n, m], and the largest positive one of an id that is not kept [n], or 0."""
        result, highest = np.zeros(self._shape), np.zeros(self._shape[0])
        if any(biases):
            keys, where = np.unique(self._keys_of([[token for token, _ in own] for own in biases]), return_inverse=True)
            values = np.bincount(where, [value for own in biases for _, value in own], minlength=len(keys))
            places, hit = self._find(keys)
            result.ravel()[places[hit]] = values[hit]
            np.maximum.at(highest, keys[~hit] // self._vocab_size, values[~hit])
        return result, highest

    def _find(self, keys: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
        found = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return self._places[found], self._keys[found] == keys

    def _keys_of(self, tokens: Sequence[Sequence[int]]) -> Ints:
        counts = np.array([len(own) for own in tokens])
        flat: Iterable[int] = chain.from_iterable(tokens)
        return np.fromiter(flat, np.int64, count=int(counts.sum())) + np.repeat(
            np.arange(len(tokens)) * self._vocab_size, counts
        )
