"""The teacher's predictions in the form that losses and scores take them, whatever they were made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from redraft_training.dataset.batch import Batch


@dataclass(frozen=True, slots=True)
class Targets:
    """p at n positions, after the request's own sampling parameters unless a temperature was asked for.

    Dense (`ids` None): probs is [n, vocab_size] and nothing is missing. Sparse: probs [n, m] belong to `ids` [n, m]
    (a row with fewer ids is padded with id 0 at probability 0), `tail` [n] is the probability of all other ids, and
    `tail_ids` [n] is one draw from that tail or -1: the token that the target emitted there, if it is not among `ids`.

    Why one draw is enough: an emitted token is itself a draw from p, so
    `sum over ids of p_v f(v) + [emitted not in ids] f(emitted)` has the expectation `sum over all v of p_v f(v)`.

    Attributes:
        known: [n] bool, False where there is no teacher (p is then all zero).
        hidden: teacher hidden states at the positions, one [n, hidden_size] per layer asked for; empty if not asked.
    """

    probs: Tensor
    known: Tensor
    ids: Tensor | None = None
    tail: Tensor | None = None
    tail_ids: Tensor | None = None
    hidden: tuple[Tensor, ...] = ()


class Teacher(Protocol):
    """A source of teacher predictions."""

    def targets(self, batch: Batch, *, temperature: float | None = None) -> Targets:
        """Predictions at every position of the batch.

        `temperature` None: p is what the request's own parameters make of the target's logits (one-hot for a greedy
        request). A number: softmax(raw logits / temperature) for every position, the request's parameters ignored.
        """
