"""One optimiser step, and one held-out score, shared by all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]

from redraft.sampling.randomness import sequence_key
from redraft_training.dataset.batch import Batch
from redraft_training.distill.errors import TrainingDiverged
from redraft_training.distill.module import autocast_dtype
from redraft_training.distill.parallel import sum_over_ranks
from redraft_training.distill.rollout import StudentRollouts
from redraft_training.distill.settings import DistillSettings
from redraft_training.distill.work import MicroBatch, StepWork
from redraft_training.objectives.loss import LossResult
from redraft_training.objectives.objective import Objective
from redraft_training.objectives.policy_gradient import RolloutTargets
from redraft_training.objectives.supervision import supervision
from redraft_training.objectives.targets import Targets, Teacher

SCORING = Objective(greedy_targets="hard")
"""What the held-out score is taken by, whatever is trained on: expected acceptance at the requests' own parameters."""
SCORING_TEXT = Objective(what="sequences", how="cross_entropy")
"""The same without a teacher: the emitted text tells the acceptance of greedy requests, and of no others."""


@dataclass(frozen=True, slots=True)
class StepFigures:
    """Of one step, over all ranks: means over its positions, NaN where there were none; `stop` if any rank asked.

    `alpha` is over the text that was trained on, at the objective's temperature, before the step.
    """

    loss: float
    alpha: float
    grad_norm: float
    tokens: int
    stop: bool


class Stepper:
    """Owns what a step needs; knows nothing of epochs, checkpoints or time."""

    def __init__(
        self,
        accelerator: Accelerator,
        module: Any,
        optimizer: Any,
        teacher: Teacher | None,
        settings: DistillSettings,
        rollouts: StudentRollouts | None,
    ) -> None:
        self._accelerator, self._module, self._optimizer = accelerator, module, optimizer
        self._teacher, self._settings, self._rollouts = teacher, settings, rollouts
        self._trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._dtype = autocast_dtype(settings.precision, accelerator.device)

    def step(self, work: StepWork, *, step: int, learning_rate: float, stop: bool) -> StepFigures:
        """Take a step; `step` is its number, from 0. `stop`: this rank wants the run to end after it.

        Raises `TrainingDiverged` before any parameter has changed.
        """
        torch.manual_seed(sequence_key(self._settings.seed + step * 2**32, self._accelerator.process_index) >> 1)
        with torch.no_grad():
            work_items = [self._labelled(micro) for micro in work.micro_batches]
        self._module.train()
        sums = _Sums()
        for number, (micro, (batch, targets)) in enumerate(zip(work.micro_batches, work_items, strict=True)):
            last = number == len(work_items) - 1
            with nullcontext() if last else self._accelerator.no_sync(self._module):
                result = self._forward(batch, targets, self._settings.objective)
                weight = 0.0 if micro.idle else result.total_weight
                # sums now, the mean over all ranks' weights below: batches of unlike size then count as they should
                self._accelerator.backward(result.loss * weight)
            if not micro.idle:
                sums.add(result, batch)
        loss, weight, alpha, scored, tokens, stops = sum_over_ranks(
            self._accelerator, [sums.loss, sums.weight, sums.alpha, sums.scored, sums.tokens, float(stop)]
        )
        grad_norm = self._update(weight, learning_rate, step) if weight else math.nan
        self._optimizer.zero_grad(set_to_none=True)
        return StepFigures(_ratio(loss, weight), _ratio(alpha, scored), grad_norm, int(tokens), stops > 0)

    def heldout_alpha(self, micro_batches: Iterable[MicroBatch]) -> float:
        """Mean expected acceptance over the text positions of some batches, at the requests' own parameters; NaN if no
        position has a label."""
        objective = SCORING_TEXT if self._teacher is None else SCORING
        sums = _Sums()
        self._module.eval()
        with torch.no_grad():
            for micro in micro_batches:
                targets = supervision(self._teacher, micro.batch, objective)
                result = self._forward(micro.batch, targets, objective)
                if not micro.idle:
                    sums.add(result, micro.batch)
        alpha, scored = sum_over_ranks(self._accelerator, [sums.alpha, sums.scored])
        return _ratio(alpha, scored)

    def _labelled(self, micro: MicroBatch) -> tuple[Batch, Targets | RolloutTargets]:
        """The batch to train on and its targets."""
        if self._rollouts is None or not self._rollouts.replaces(micro.epoch, micro.index):
            return micro.batch, supervision(self._teacher, micro.batch, self._settings.objective)
        batch = self._rollouts.batch(micro.batch, micro.epoch, micro.index)
        return batch, self._rollouts.targets(batch)

    def _forward(self, batch: Batch, targets: Targets | RolloutTargets, objective: Objective) -> LossResult:
        with torch.autocast(self._accelerator.device.type, self._dtype, enabled=self._dtype is not None):
            result: LossResult = self._module(batch, targets, objective)
        return result

    def _update(self, weight: float, learning_rate: float, step: int) -> float:
        """Turn summed gradients into means, clip, and step; return the norm before clipping."""
        # data parallelism has averaged the ranks' sums
        scale = self._accelerator.num_processes / weight
        gradients = [parameter.grad for parameter in self._trainable if parameter.grad is not None]
        torch._foreach_mul_(gradients, scale)
        norm = float(self._accelerator.clip_grad_norm_(self._trainable, self._settings.max_grad_norm))
        if not norm < math.inf:
            raise TrainingDiverged(
                f"the loss or its gradient is not finite at step {step + 1}: lower the learning rate (it is "
                f"{learning_rate:g} there), or lengthen the warm-up; the last checkpoint is from before it"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        return norm


class _Sums:
    """Totals of this rank's batches."""

    def __init__(self) -> None:
        self.loss = self.weight = self.alpha = self.scored = self.tokens = 0.0

    def add(self, result: LossResult, batch: Batch) -> None:
        if result.total_weight:
            self.loss += float(result.loss.detach()) * result.total_weight
        self.weight += result.total_weight
        on_text = result.alpha[(batch.depth == 0).to(result.alpha.device)]
        known = on_text[~on_text.isnan()]
        self.alpha += float(known.sum())
        self.scored += len(known)
        self.tokens += num_tokens(batch)


def num_tokens(batch: Batch) -> int:
    """Tokens that are not padding (id 0, which as text is next to never seen)."""
    return int(batch.input_ids.count_nonzero())


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan
