"""From a data set to a trained draft, with the models and settings of a cycle."""

from __future__ import annotations

from pathlib import Path

from redraft.models.ref import ModelRef
from redraft_training.cycle_models import Models
from redraft_training.dataset.packing import BatchPlan, PackSettings
from redraft_training.dataset.read import Dataset
from redraft_training.distill.trainer import DistillResult, distill
from redraft_training.settings import CycleSettings

ROW_TOKENS = 512


def train(
    settings: CycleSettings, models: Models, dataset: Dataset, output: Path, *, base: ModelRef | None = None
) -> DistillResult:
    """Distil into `output`, from `base` (None: the draft that the settings name, else a newborn one in `output/base`).

    Goes on from a checkpoint in `output`. Raises what `distill` raises.
    """
    if base is None:
        base = models.born(output / "base", dataset)
    student = models.student(base, dataset)
    own = settings.distill
    row_tokens = max(2, min(ROW_TOKENS, own.batch_tokens))
    batch_tokens = max(row_tokens, own.batch_tokens)
    pack = PackSettings(row_tokens, batch_tokens, branches=own.objective.on_policy_fraction > 0.0)
    held_out = BatchPlan(dataset.held_out, PackSettings(row_tokens, batch_tokens, branches=False))
    return distill(
        student,
        models.teacher(),
        BatchPlan(dataset.training, pack, seed=own.seed),
        held_out,
        own,
        output,
        rollouts=models.rollouts(student, pack),
    )
