"""The divergence between target and student at every position, from dense or sparse targets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from redraft.sampling import divergence
from redraft_training.dataset.batch import Batch
from redraft_training.objectives.objective import Objective
from redraft_training.objectives.rows import SparseLogProbs, by_chunks, sparse_log_probs
from redraft_training.objectives.scores import Scores, columns_of, student_scores
from redraft_training.objectives.targets import Targets
from redraft_training.student.student import StudentOutput


@dataclass(frozen=True, slots=True)
class Match:
    """Per position, [n] float32.

    Attributes:
        values: the divergence, with a gradient. Meaningless where the targets are not known.
        alpha: expected acceptance sum min(p, q), of sparse targets without their tail (a lower bound). For a greedy
            request 1 if student and target have the same arg max, else 0: what acceptance is there.
        unreachable: mass of p that the student's output vocabulary lacks, as far as the targets name it.
        slack: by how much `alpha` may be too low; 0 for dense targets.
    """

    values: Tensor
    alpha: Tensor
    unreachable: Tensor
    slack: Tensor


@dataclass(frozen=True, slots=True)
class _Task:
    """What both ways of matching are given; all tensors on the device of the logits."""

    scores: Scores
    vocab_ids: Tensor | None  # of the student
    targets: Targets
    objective: Objective
    weights: Tensor  # [n]
    greedy: Tensor  # [n] bool: the request is at temperature 0
    is_draw: Tensor  # [n] bool: the emitted token is a draw of p


def match_targets(
    output: StudentOutput, targets: Targets, batch: Batch, objective: Objective, weights: Tensor
) -> Match:
    """`weights` [n] say how the positions count in the mean acceptance that steers the `lk` blend."""
    device = output.logits.device
    greedy = torch.tensor([row.params.is_greedy for row in batch.sampling_rows], dtype=torch.bool, device=device)
    is_draw = _emitted_by_target(batch, objective, greedy)
    scores = student_scores(output, batch.sampling_rows, objective)
    task = _Task(scores, output.vocab_ids, targets, objective, weights, greedy, is_draw)
    return _dense(task) if targets.ids is None else _sparse(task)


def _emitted_by_target(batch: Batch, objective: Objective, greedy: Tensor) -> Tensor:
    """Where `next_ids` is a draw of p, [n] bool."""
    # the target drew from what the request's own parameters make of its logits, and from nothing else
    if objective.temperature is not None:
        return torch.zeros_like(greedy)
    drawn = (batch.next_ids >= 0).to(greedy.device)
    if objective.greedy_targets == "soft":
        drawn &= ~greedy
    if objective.on_policy_source == "rollout" and objective.on_policy_fraction > 0.0:
        # some batches were written by the draft: only what verification labelled is the target's for sure
        labelled = [label is not None for label in batch.labels]
        drawn &= torch.tensor(labelled, dtype=torch.bool, device=greedy.device)
    return drawn


def _sparse(task: _Task) -> Match:
    """The targets' ids one by one, all others as one atom, corrected by the draw where there is one."""
    targets, objective, logits = task.targets, task.objective, task.scores.logits
    assert targets.ids is not None
    assert targets.tail is not None
    columns, present = columns_of(targets.ids, task.vocab_ids)
    tail_ids = torch.full_like(targets.ids[:, 0], -1) if targets.tail_ids is None else targets.tail_ids
    drawn_column, drawn_present = columns_of(tail_ids, task.vocab_ids)
    in_tail = task.is_draw & (tail_ids >= 0)
    drawn = in_tail & drawn_present
    there = present & (targets.probs > 0)
    at = sparse_log_probs(logits, task.scores.temperature, columns, there, drawn_column, drawn)

    alpha = divergence.expected_acceptance(targets.probs, at.head.detach().exp())
    slack = torch.minimum(targets.tail, at.tail.detach().exp())
    kl_weight = _kl_weight(alpha + slack, task)
    p, log_q = divergence.with_tail(targets.probs, targets.tail, at.head, at.tail)
    values = _divergence(objective, p, log_q, kl_weight)
    if objective.how in ("forward_kl", "cross_entropy", "lk"):
        values = values + kl_weight * _tail_correction(task, targets.tail, at, drawn)

    missing = torch.where(present, 0.0, targets.probs).sum(dim=1) + (in_tail & ~drawn_present).float()
    return Match(
        values=values,
        alpha=torch.where(task.greedy, _agrees(task, tail_ids, at.largest).float(), alpha),
        unreachable=missing,
        slack=torch.where(task.greedy, 0.0, slack),
    )


def _agrees(task: _Task, tail_ids: Tensor, largest: Tensor) -> Tensor:
    """Whether student and target have the same arg max, [n] bool."""
    assert task.targets.ids is not None
    top = task.targets.probs.max(dim=1)
    best = task.targets.ids.gather(1, top.indices.unsqueeze(1)).squeeze(1)
    # a greedy request may emit, for its penalties, a token that is not among the largest raw logits
    best = torch.where((top.values == 0) & (tail_ids >= 0), tail_ids, best)
    column, present = columns_of(best, task.vocab_ids)
    at_best = task.scores.logits.detach().gather(1, column.unsqueeze(1)).squeeze(1)
    return present & (at_best >= largest)


def _tail_correction(task: _Task, tail: Tensor, at: SparseLogProbs, drawn: Tensor) -> Tensor:
    """What makes the forward KL's gradient unbiased, [n]; 0 where the emitted token is no draw of p."""
    if task.vocab_ids is None:
        return divergence.tail_draw(at.tail, at.drawn, drawn)
    return torch.where(task.is_draw, divergence.tail_draw_alone(tail, at.tail, at.drawn, drawn), 0.0)


def _dense(task: _Task) -> Match:
    targets, reduced = task.targets, task.vocab_ids

    def atoms(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """p and log q of a chunk; with a reduced vocabulary all ids outside it are one atom that q cannot reach."""
        log_q = (logits / task.scores.temperature[rows].unsqueeze(1)).log_softmax(dim=1)
        p = targets.probs[rows].float()
        if reduced is None:
            return p, log_q
        inside = p[:, reduced]
        outside = (p.sum(dim=1) - inside.sum(dim=1)).clamp(min=0.0).unsqueeze(1)
        nowhere = log_q.new_full((len(log_q), 1), divergence.UNREACHABLE)
        return torch.cat([inside, outside], dim=1), torch.cat([log_q, nowhere], dim=1)

    def overlap(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        p, log_q = atoms(logits, rows)
        return divergence.expected_acceptance(p, log_q.exp()), divergence.unreachable_mass(p, log_q)

    def value(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        p, log_q = atoms(logits, rows)
        agrees = p.argmax(dim=1) == log_q.argmax(dim=1)
        alpha = divergence.expected_acceptance(p, log_q.detach().exp())
        values = _divergence(task.objective, p, log_q, kl_weight)
        return values, torch.where(task.greedy[rows], agrees.float(), alpha)

    kl_weight = torch.ones_like(task.weights[:1])
    if task.objective.how == "lk":  # its weight is needed before the first gradient
        kl_weight = _kl_weight(by_chunks(task.scores.logits.detach(), overlap)[0], task)
    values, alpha = by_chunks(task.scores.logits, value)
    unreachable = torch.zeros_like(alpha)
    if reduced is not None:
        unreachable = (targets.probs.sum(dim=1) - targets.probs[:, reduced].sum(dim=1)).clamp(min=0.0)
    return Match(values, alpha, unreachable, torch.zeros_like(alpha))


def _divergence(objective: Objective, p: Tensor, log_q: Tensor, kl_weight: Tensor) -> Tensor:
    match objective.how:
        case "forward_kl":
            return divergence.forward_kl(p, log_q)
        case "cross_entropy":
            return divergence.cross_entropy(p, log_q)
        case "reverse_kl" | "policy_gradient":  # the single-step part of MiniLLM's gradient
            return divergence.reverse_kl(p, log_q)
        case "jsd":
            return divergence.jsd(p, log_q, objective.beta)
        case "tv":
            return divergence.total_variation(p, log_q)
        case "neg_log_alpha":
            return divergence.neg_log_acceptance(p, log_q)
        case "lk":
            return divergence.lk(p, log_q, kl_weight)


def _kl_weight(alpha: Tensor, task: _Task) -> Tensor:
    """Share of KL, [1]: of the `lk` blend by the mean acceptance of the positions that count, 1 otherwise."""
    if task.objective.how != "lk":
        return torch.ones_like(alpha[:1])
    mean = (alpha * task.weights).sum(dim=0, keepdim=True) / task.weights.sum().clamp(min=1e-9)
    return divergence.lk_kl_weight(mean, task.objective.eta)
