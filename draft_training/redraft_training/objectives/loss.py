"""`loss`: one number to descend from a batch's predictions, for any objective; and the figures to watch beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from redraft.errors import ConfigError
from redraft_training.dataset.batch import Batch
from redraft_training.objectives.hidden import FeatureHead, feature_loss, relation_loss
from redraft_training.objectives.matching import Match, match_targets
from redraft_training.objectives.objective import Objective
from redraft_training.objectives.policy_gradient import RolloutTargets, long_term_values
from redraft_training.objectives.rows import sparse_log_probs
from redraft_training.objectives.scores import columns_of, student_scores
from redraft_training.objectives.supervision import on_device
from redraft_training.objectives.targets import Targets
from redraft_training.student.student import StudentOutput


@dataclass(frozen=True, slots=True)
class LossResult:
    """Attributes:
    loss: scalar with a gradient, the weighted mean over the positions (0 if none counts).
    values: [n] loss per position, without the part on hidden states; 0 where it does not count. No gradient.
    weights: [n]; losses of several batches are averaged by `total_weight`.
    alpha: [n] expected acceptance (`Match.alpha`); NaN where it is not known.
    num_positions: positions that count.
    metrics: figures for the log; means over those positions.
    """

    loss: Tensor
    values: Tensor
    weights: Tensor
    alpha: Tensor
    num_positions: int
    total_weight: float
    metrics: dict[str, float]


def loss(
    student_output: StudentOutput,
    targets: Targets | RolloutTargets,
    batch: Batch,
    objective: Objective,
    *,
    head: FeatureHead | None = None,
) -> LossResult:
    """The objective at a batch.

    `targets` come from `supervision`, or are `RolloutTargets` for a batch of rollouts of how=policy_gradient (which on
    a batch of the target's text is reverse KL). `head` is needed for what=features.

    Raises ConfigError if the targets lack what the objective needs.
    """
    rollout = targets if isinstance(targets, RolloutTargets) else None
    given = targets.targets if isinstance(targets, RolloutTargets) else targets
    plain = on_device(given, student_output.logits.device)
    if objective.how == "policy_gradient" and objective.on_policy_fraction == 1.0 and rollout is None:
        raise ConfigError("objective.how=policy_gradient with on_policy_fraction=1 needs rollouts, got logged text")
    weights = position_weights(batch, plain, objective)
    matched = match_targets(student_output, plain, batch, objective, weights)
    values = matched.values
    if objective.how == "policy_gradient" and rollout is not None:
        values = values + _long_term(student_output, rollout, batch, objective)
    if objective.temperature is not None:
        values = values * objective.temperature**2
    values = torch.where(weights > 0, values, 0.0)
    total_weight = weights.sum()
    mean = (values * weights).sum() / total_weight.clamp(min=1e-9)
    metrics = _metrics(matched, weights, objective)
    if objective.uses_hidden_states:
        hidden = _hidden_loss(student_output, plain, weights, objective, head)
        mean = mean + objective.hidden_weight * hidden
        metrics[f"{objective.what}_loss"] = float(hidden.detach())
    alpha = torch.where(_alpha_known(plain, batch, objective), matched.alpha, torch.nan)
    num_positions = int((weights > 0).sum())
    return LossResult(mean, values.detach(), weights, alpha, num_positions, float(total_weight), metrics)


def position_weights(batch: Batch, targets: Targets, objective: Objective) -> Tensor:
    """Weight of each position, [n] float32: 1 on the text, lambda on captured drafts off it, 0 without a teacher.

    This is GKD's mixture (1 - lambda) * text + lambda * states of the draft. The drafted tokens visited nearly every
    state of the text (where they were accepted) and those off it (where not), so with sums T over the text and B over
    the branches the mixture is (1 - lambda) T + lambda (T + B) = T + lambda B. For rollouts the mixing is between
    batches, and logged drafts do not count.
    """
    off_path = objective.on_policy_fraction if objective.on_policy_source == "captured" else 0.0
    weights = torch.where(batch.depth > 0, off_path, 1.0).to(targets.known.device)
    return torch.where(targets.known, weights, 0.0)


def _long_term(output: StudentOutput, rollout: RolloutTargets, batch: Batch, objective: Objective) -> Tensor:
    scores = student_scores(output, batch.sampling_rows, objective)
    sampled = batch.next_ids.to(output.logits.device).unsqueeze(1)
    columns, present = columns_of(sampled, output.vocab_ids)
    nothing = torch.zeros_like(columns[:, 0])
    at = sparse_log_probs(scores.logits, scores.temperature, columns, present, nothing, nothing.bool())
    return long_term_values(at.head.squeeze(1), rollout, batch)


def _hidden_loss(
    output: StudentOutput, targets: Targets, weights: Tensor, objective: Objective, head: FeatureHead | None
) -> Tensor:
    """Scalar: over the positions that count, unweighted."""
    pairs = len(objective.hidden_layers)
    if len(output.hidden) != pairs or len(targets.hidden) != pairs:
        raise ConfigError(
            f"objective.what={objective.what} needs hidden states of draft and target for {pairs} pairs of layers, got "
            f"{len(output.hidden)} and {len(targets.hidden)}: captured labels have none, re-run the target"
        )
    counted = (weights > 0).nonzero().flatten()
    own = [states[counted] for states in output.hidden]
    theirs = [states[counted] for states in targets.hidden]
    if objective.what == "relations":
        return relation_loss(own, theirs)
    if head is None:
        raise ConfigError("objective.what=features needs a FeatureHead")
    return feature_loss(head(own), theirs).sum() / max(1, len(counted))


def _alpha_known(targets: Targets, batch: Batch, objective: Objective) -> Tensor:
    """[n] bool. Text alone tells the acceptance of greedy requests only."""
    if objective.needs_teacher:
        return targets.known
    greedy = [row.params.is_greedy for row in batch.sampling_rows]
    return targets.known & torch.tensor(greedy, dtype=torch.bool, device=targets.known.device)


def _metrics(matched: Match, weights: Tensor, objective: Objective) -> dict[str, float]:
    counted = weights > 0
    if not bool(counted.any()):
        return {}
    metrics = {"unreachable_mass": float(matched.unreachable[counted].mean())}
    if objective.needs_teacher:
        metrics["alpha_slack"] = float(matched.slack[counted].mean())
    return metrics
