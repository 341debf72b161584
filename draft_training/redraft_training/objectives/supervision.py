"""What a batch is learnt from: `Targets` as the objective wants them, from a teacher or from the text alone."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from redraft.errors import ConfigError
from redraft_training.dataset.batch import Batch
from redraft_training.objectives.objective import Objective
from redraft_training.objectives.targets import Targets, Teacher


def supervision(teacher: Teacher | None, batch: Batch, objective: Objective) -> Targets:
    """Targets at every position of the batch, as `loss` takes them.

    A mixed batch (greedy and sampled requests) with soft greedy targets asks the teacher twice. Raises ConfigError if
    the objective needs a teacher and there is none.
    """
    if not objective.needs_teacher:
        return hard_targets(batch)
    if teacher is None:
        raise ConfigError(f"objective.what={objective.what} needs a teacher: use what=sequences for text alone")
    if objective.temperature is not None:
        return teacher.targets(batch, temperature=objective.temperature)
    greedy = torch.tensor([row.params.is_greedy for row in batch.sampling_rows], dtype=torch.bool)
    if objective.greedy_targets == "hard" or not bool(greedy.any()):
        return teacher.targets(batch)
    soft = teacher.targets(batch, temperature=1.0)
    return soft if bool(greedy.all()) else merged(teacher.targets(batch), soft, greedy)


def hard_targets(batch: Batch) -> Targets:
    """The emitted token with probability 1 (sequence-level distillation, Kim & Rush 2016); nothing off the path."""
    ids = batch.next_ids.clamp(min=0).unsqueeze(1)
    known = batch.next_ids >= 0
    none = torch.zeros(len(known), device=ids.device)
    return Targets(known.float().unsqueeze(1), known, ids, tail=none, tail_ids=torch.full_like(batch.next_ids, -1))


def merged(targets: Targets, other: Targets, use_other: Tensor) -> Targets:
    """`targets` with the rows of `other` where `use_other` [n] bool. Both from the same teacher; hidden states stay."""
    use = use_other.to(targets.probs.device)

    def pick(own: Tensor, theirs: Tensor) -> Tensor:
        return torch.where(use.view(-1, *[1] * (own.dim() - 1)), theirs, own)

    known = pick(targets.known, other.known)
    if targets.ids is None or other.ids is None:
        return dataclasses.replace(targets, probs=pick(targets.probs, other.probs), known=known)
    assert targets.tail is not None
    assert other.tail is not None
    width = max(targets.ids.shape[1], other.ids.shape[1])
    return dataclasses.replace(
        targets,
        probs=pick(_padded(targets.probs, width), _padded(other.probs, width)),
        ids=pick(_padded(targets.ids, width), _padded(other.ids, width)),
        tail=pick(targets.tail, other.tail),
        tail_ids=pick(_tail_ids(targets), _tail_ids(other)),
        known=known,
    )


def on_device(targets: Targets, device: torch.device) -> Targets:
    """The targets on that device; themselves if they are there."""
    if targets.probs.device == device:
        return targets
    moved = {
        field.name: getattr(targets, field.name).to(device)
        for field in dataclasses.fields(targets)
        if isinstance(getattr(targets, field.name), Tensor)
    }
    return dataclasses.replace(targets, hidden=tuple(states.to(device) for states in targets.hidden), **moved)


def _padded(rows: Tensor, width: int) -> Tensor:
    return F.pad(rows, (0, width - rows.shape[1]))


def _tail_ids(targets: Targets) -> Tensor:
    none = torch.full((len(targets.known),), -1, dtype=torch.int64, device=targets.known.device)
    return none if targets.tail_ids is None else targets.tail_ids
