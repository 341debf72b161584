"""Losses on hidden states: FitNets (each state through a learned projection) and RKD (how states lie to each other)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_RELATED = 64
"""Positions of a batch that RKD relates: angles take their number cubed."""

_DISTANCE_WEIGHT, _ANGLE_WEIGHT = 1.0, 2.0


class FeatureHead(nn.Module):
    """FitNets' regressors: one linear map per pair of hidden states, draft size -> target size.

    It learns together with the draft and is thrown away afterwards.
    """

    def __init__(self, draft_sizes: Sequence[int], target_sizes: Sequence[int]) -> None:
        super().__init__()
        pairs = zip(draft_sizes, target_sizes, strict=True)
        self.projections = nn.ModuleList([nn.Linear(draft, target) for draft, target in pairs])

    def forward(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """One [n, draft_size] per pair -> one [n, target_size] per pair."""
        return [projection(states.float()) for projection, states in zip(self.projections, hidden, strict=True)]


def feature_loss(projected: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """1/2 ||u - r(v)||^2 per position (Romero et al. 2015), summed over pairs: [n].

    Divided by the mean ||u||^2 of the batch, so that a layer's scale, which differs 100-fold between models and depths,
    does not act as a weight: a projection to 0 costs about 1/2.
    """
    losses = []
    for guess, truth in zip(projected, target, strict=True):
        wanted = truth.detach().float()
        scale = wanted.square().sum(dim=1).mean().clamp(min=1e-12)
        losses.append((guess - wanted).square().sum(dim=1) / (2.0 * scale))
    return torch.stack(losses).sum(dim=0)


def relation_loss(student: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """RKD-DA (Park et al. 2019), summed over pairs of layers: scalar. Needs no projection, as distances and
    angles do not depend on the size of the states.

    student, target: per pair [n, draft_size] and [n, target_size], of the same n positions. At most `MAX_RELATED` of
    them, evenly spread, are related; fewer than 3 give 0.
    """
    total = student[0].new_zeros((), dtype=torch.float32)
    for own, theirs in zip(student, target, strict=True):
        count = min(len(own), MAX_RELATED)
        if count < 3:
            total = total + 0.0 * own.float().sum()
            continue
        chosen = torch.linspace(0, len(own) - 1, count, device=own.device).round().long()
        mine, wanted = own[chosen].float(), theirs[chosen].detach().float()
        total = total + _DISTANCE_WEIGHT * F.smooth_l1_loss(_distances(mine), _distances(wanted))
        total = total + _ANGLE_WEIGHT * F.smooth_l1_loss(_angles(mine), _angles(wanted))
    return total


def _distances(states: Tensor) -> Tensor:
    """Distances of all pairs in units of their mean, [count, count]."""
    pairs = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist")
    return pairs / (pairs.sum() / max(1, len(states) * (len(states) - 1))).clamp(min=1e-12)


def _angles(states: Tensor) -> Tensor:
    """Cosine of the angle at j of all triplets, [j, i, k]."""
    arms = F.normalize(states.unsqueeze(0) - states.unsqueeze(1), dim=2)  # [j, i, size], from j to i
    return arms @ arms.transpose(1, 2)
