"""What data parallelism wraps: the draft and its loss in one module, so that every trained parameter is inside."""

from __future__ import annotations

import torch
from torch import nn

from redraft_training.dataset.batch import Batch
from redraft_training.distill.settings import Precision
from redraft_training.objectives.hidden import FeatureHead
from redraft_training.objectives.loss import LossResult, loss
from redraft_training.objectives.objective import Objective
from redraft_training.objectives.policy_gradient import RolloutTargets
from redraft_training.objectives.supervision import supervision
from redraft_training.objectives.targets import Targets, Teacher
from redraft_training.student.student import Student


class TrainingModule(nn.Module):
    """Batch, targets and objective in, `LossResult` out. `head` is FitNets' projection, which trains with the draft."""

    def __init__(self, student: Student, head: FeatureHead | None = None) -> None:
        super().__init__()
        self.model = student.model
        self.head = head
        self._student = student

    def forward(self, batch: Batch, targets: Targets | RolloutTargets, objective: Objective) -> LossResult:
        output = self._student(batch, hidden_layers=objective.draft_layers)
        return loss(output, targets, batch, objective, head=self.head)


@torch.no_grad()
def feature_head(student: Student, teacher: Teacher | None, batch: Batch, objective: Objective) -> FeatureHead | None:
    """The projection that the objective needs, of the sizes that a batch shows; None if it needs none."""
    if objective.what != "features":
        return None
    draft = student(batch, hidden_layers=objective.draft_layers).hidden
    target = supervision(teacher, batch, objective).hidden
    # a wrong number of layers is reported by the loss, which knows what to say
    pairs = list(zip(draft, target, strict=False))
    return FeatureHead([own.shape[1] for own, _ in pairs], [theirs.shape[1] for _, theirs in pairs])


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The dtype to compute in, None for float32 throughout."""
    if precision == "auto":
        # on a CPU bf16 pays only with AMX or AVX512-BF16, and loses elsewhere
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    return torch.bfloat16 if precision == "bf16" else None
