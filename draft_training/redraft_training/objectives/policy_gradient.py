"""MiniLLM (Gu et al. 2024): the gradient of the sequence-level reverse KL, from texts that the student writes.

KL(q || p) over whole texts y = y_1..y_T has the gradient

    E_y sum_t [ grad KL_t  +  A_t grad log q(y_t) ],    KL_t = KL(q || p) at the state before y_t,
                                                       A_t = sum over t' > t of log q(y_t') / p(y_t').

The first part (single-step decomposition) is exact over the vocabulary at each state; only the second, what a token
does to the states after it, is sampled. As in the paper and its authors' code

- A_t is divided by the number T - t of its terms (length normalisation), else short texts win;
- tokens are drawn from `teacher_mixing * p + (1 - teacher_mixing) * q`, against texts that only the student finds good,
  and the second part is weighted by q(y_t) / (what y_t was drawn from), clipped: the per-token approximation of the
  importance weight. It makes the gradient a slightly biased one; with no mixing and a fresh student it is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from redraft.sampling.divergence import UNREACHABLE
from redraft_training.dataset.batch import Batch
from redraft_training.objectives.targets import Targets

MAX_IMPORTANCE = 2.0
"""A fresh student cannot exceed 1 / (1 - teacher_mixing); more than this means that the rollouts are old."""

MAX_LOG_RATIO = 10.0
"""Bound on |log q / p| of one token in A_t: a token that a truncated p excludes has an infinite one."""


@dataclass(frozen=True, slots=True)
class RolloutTargets:
    """What a batch of rollouts needs beside the batch: one example per rollout, all its tokens predicted, nothing off
    the path; `batch.next_ids` are the sampled tokens.

    Attributes:
        targets: p at the n positions, dense or sparse, at the temperature of the objective.
        teacher_log_probs: [n] log p of the sampled tokens.
        behaviour_log_probs: [n] log-probability with which they were drawn: log(mixing * p + (1 - mixing) * q), q the
            student that wrote them.
    """

    targets: Targets
    teacher_log_probs: Tensor
    behaviour_log_probs: Tensor

    @classmethod
    def from_dense(cls, targets: Targets, batch: Batch, behaviour_log_probs: Tensor) -> RolloutTargets:
        """From dense targets, which hold the sampled tokens' probabilities themselves."""
        assert targets.ids is None
        sampled = targets.probs.gather(1, batch.next_ids.clamp(min=0).unsqueeze(1)).squeeze(1)
        return cls(targets, sampled.clamp(min=1e-30).log(), behaviour_log_probs)


def long_term_values(log_q: Tensor, rollout: RolloutTargets, batch: Batch, *, length_normalised: bool = True) -> Tensor:
    """The second part as a loss, [n]: its gradient is that of w_t A_t log q(y_t).

    `log_q` [n]: of the sampled tokens under the student in training, with a gradient. A token outside the student's
    vocabulary has weight 0.
    """
    fixed = log_q.detach()
    reachable = fixed > UNREACHABLE
    ratios = torch.where(reachable, fixed - rollout.teacher_log_probs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    later, count = sums_of_later(ratios, batch.owner.to(fixed.device), batch.offset.to(fixed.device))
    if length_normalised:
        later = later / count.clamp(min=1.0)
    weight = (fixed - rollout.behaviour_log_probs).exp().clamp(max=MAX_IMPORTANCE)
    return torch.where(reachable, weight * later * log_q, 0.0)


def sums_of_later(values: Tensor, owner: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """For each position the sum of `values` over the positions of the same owner behind it, and their number; all [n].

    Worked example: owner (0, 0, 1, 0), offset (0, 1, 0, 2), values (1, 2, 5, 4): sums (6, 4, 0, 0).
    """
    behind = (owner.unsqueeze(1) == owner) & (offset > offset.unsqueeze(1))  # [n, n]: j is behind i
    behind_values = behind.to(values.dtype)
    return behind_values @ values, behind_values.sum(dim=1)
