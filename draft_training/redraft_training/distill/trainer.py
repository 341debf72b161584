"""Distillation: student, teacher, batches and settings in, a better draft out.

A plain loop. One process, or several under `torchrun` (DDP, or FSDP where accelerate's environment asks for it): the
ranks share each optimiser step, and the result is that of one process which accumulates as many batches. The rank that
runs out of batches goes through the motions at weight 0.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs  # type: ignore[import-untyped]
from accelerate.utils import DistributedType  # type: ignore[import-untyped]

from redraft.errors import ConfigError
from redraft_training.distill.checkpoint import CheckpointStore, Identity, TrainingState
from redraft_training.distill.errors import NothingToTrain, WorldSizeUnsupported
from redraft_training.distill.metrics import METRICS_FILE, MetricsRow, MetricsWriter, read_metrics
from redraft_training.distill.module import TrainingModule, feature_head
from redraft_training.distill.output import write_draft
from redraft_training.distill.parallel import (
    load_optimizer_tensors,
    load_trained_tensors,
    on_main_process,
    optimizer_tensors,
    parameters_fingerprint,
    trained_tensors,
)
from redraft_training.distill.progress import training_progress
from redraft_training.distill.rollout import StudentRollouts
from redraft_training.distill.schedule import learning_rate_at
from redraft_training.distill.settings import DistillSettings
from redraft_training.distill.step import Stepper
from redraft_training.distill.work import (
    BatchPlan,
    MicroBatch,
    StepWork,
    data_fingerprint,
    epoch_steps,
    steps_per_epoch,
)
from redraft_training.objectives.objective import Objective
from redraft_training.objectives.targets import Teacher
from redraft_training.student.student import Student

CHECKPOINTS, DRAFT = "checkpoints", "draft"
COMPLETED, MAX_TOKENS, NO_IMPROVEMENT, MAX_MINUTES = "completed", "max_tokens", "no_improvement", "max_minutes"
_NEWBORN_RATE, _LEARNT_RATE = 1e-3, 4e-4
_LEARNT_ALPHA = 0.2  # expected acceptance from which a draft counts as one that has learnt
OnProgress = Callable[[MetricsRow], None]


@dataclass(frozen=True)
class DistillResult:
    """What a run came to.

    Attributes:
        steps, tokens, seconds, cpu_seconds: of the whole run, all its sessions together.
        final_alpha, best_alpha: held-out expected acceptance at the end and at its best; NaN without held-out data.
        best_step: the optimiser step whose parameters were written.
        draft: directory of the finished draft.
        stopped: `completed`, `max_tokens`, `no_improvement`, or `max_minutes` (resuming goes on from there).
        parent_fingerprint: of the parameters that training began from.
        history: a row for every optimiser step.
    """

    steps: int
    tokens: int
    seconds: float
    cpu_seconds: float
    final_alpha: float
    best_alpha: float
    best_step: int
    draft: Path
    stopped: str
    parent_fingerprint: str
    world_size: int
    history: tuple[MetricsRow, ...]


def distill(
    student: Student,
    teacher: Teacher | None,
    train_plan: BatchPlan,
    heldout: BatchPlan | None,
    settings: DistillSettings,
    output_dir: Path,
    *,
    rollouts: StudentRollouts | None = None,
    resume: bool = True,
    on_progress: OnProgress | None = None,
) -> DistillResult:
    """Train the student's parameters that require a gradient, in place, and write `output_dir/draft`.

    Every `settings.checkpoint_every_batches` batches the held-out sample is scored and a checkpoint written; the draft
    that is written has the parameters of the best one (without held-out data, the last). Called again with the same
    arguments after any kind of end, it goes on from the newest checkpoint, to bitwise the same parameters on a CPU;
    a finished run only reports. `resume` False starts over. `rollouts` replaces a share of the batches by text that the
    student itself wrote. With several ranks, `output_dir` must be storage that all of them see.

    Raises `TrainingDiverged`, `NothingToTrain`, `CheckpointError`, `CheckpointMismatch`, `WorldSizeUnsupported`.
    """
    # the caller's random state is left alone: the loop seeds anew at every step
    with torch.random.fork_rng():
        run = _Run(student, teacher, train_plan, heldout, settings, output_dir, rollouts)
        run.restore(resume=resume)
        if not run.finished:
            run.train(on_progress)
        return run.finish()


class _Run:
    """One session of a run: the objects that live as long as it, and the state that checkpoints carry on."""

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        train_plan: BatchPlan,
        heldout: BatchPlan | None,
        settings: DistillSettings,
        output_dir: Path,
        rollouts: StudentRollouts | None,
    ) -> None:
        self._plan, self._heldout, self._settings, self._output_dir = train_plan, heldout, settings, output_dir
        self._accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)]
        )
        self._world_size, self._rank = self._accelerator.num_processes, self._accelerator.process_index
        self._sharded = self._accelerator.distributed_type == DistributedType.FSDP
        _check_rollouts(settings.objective, rollouts, sharded=self._sharded)
        self._counts = [train_plan.num_batches(epoch) for epoch in range(settings.epochs)]
        self._num_steps = self._count_steps()
        self._parent = parameters_fingerprint(student.model)
        # shards cannot be written as a checkpoint directory, so a whole copy is kept for that
        self._writer = copy.deepcopy(student) if self._sharded and self._accelerator.is_main_process else student
        self._module, self._optimizer = self._prepare(student, teacher)
        self._stepper = Stepper(self._accelerator, self._module, self._optimizer, teacher, settings, rollouts)
        self._heldout_sample = self._sample_heldout()
        identity = Identity(settings.identity(), data_fingerprint(train_plan), self._parent)
        self._store = CheckpointStore(output_dir / CHECKPOINTS, identity)
        self.state = TrainingState()

    def _prepare(self, student: Student, teacher: Teacher | None) -> tuple[Any, Any]:
        """Module and optimiser as the parallel set-up wants them; without shards the parameters stay the student's."""
        torch.manual_seed(self._settings.seed)  # of the projection's initial values
        first = next(self._plan.batches(0, 0, 0, 1))
        module = TrainingModule(student, feature_head(student, teacher, first, self._settings.objective))
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not trainable:
            raise NothingToTrain("no parameter of the draft is trainable")
        optimizer = torch.optim.AdamW(trainable, foreach=True)  # its rate is set at every step
        prepared: tuple[Any, Any] = self._accelerator.prepare(module, optimizer)
        return prepared

    def _count_steps(self) -> int:
        total = sum(steps_per_epoch(count, self._settings.accumulation, self._world_size) for count in self._counts)
        if total == 0:
            raise NothingToTrain("there is no training batch: collect more traffic, or widen the selection")
        return total

    def _suitable_learning_rate(self) -> float:
        """By what the draft can do before it learns; one batch, held out or else the first, says it."""
        sample = self._heldout_sample
        if not sample:
            first = epoch_steps(
                self._plan, 0, start_index=0, rank=self._rank, world_size=self._world_size, accumulation=1
            )
            sample = next(first).micro_batches
        alpha = self._stepper.heldout_alpha(sample[:1])
        return _LEARNT_RATE if alpha >= _LEARNT_ALPHA else _NEWBORN_RATE

    def _sample_heldout(self) -> tuple[MicroBatch, ...]:
        """This rank's share of the first held-out batches, the same ones for every score."""
        if self._heldout is None or not self._heldout.num_batches(0):
            return ()
        work = next(
            epoch_steps(
                self._heldout,
                0,
                start_index=0,
                rank=self._rank,
                world_size=self._world_size,
                accumulation=-(-self._settings.heldout_batches // self._world_size),
            )
        )
        return work.micro_batches

    @property
    def finished(self) -> bool:
        """Whether an earlier session has come to an end of its own; only running out of time is none."""
        return self.state.stopped in (COMPLETED, MAX_TOKENS, NO_IMPROVEMENT)

    def restore(self, *, resume: bool) -> None:
        """Go on from the newest checkpoint, if there is one and it is wanted."""
        with on_main_process(self._accelerator) as main:
            if main and resume:
                self._store.clean()
            elif main:
                self._store.clear()
        checkpoint = self._store.load()
        if checkpoint is not None:
            load_trained_tensors(self._module, checkpoint.model)
            load_optimizer_tensors(self._module, self._optimizer, checkpoint.optimizer)
            self.state = checkpoint.state

    def train(self, on_progress: OnProgress | None) -> None:
        """Take steps until there is a reason to stop."""
        if not self.state.peak_learning_rate:
            peak = self._settings.learning_rate or self._suitable_learning_rate()
            self.state = replace(self.state, peak_learning_rate=peak)
        main = self._accelerator.is_main_process
        writer = MetricsWriter(self._output_dir, last_step=self.state.step) if main else None
        try:
            with training_progress(self._num_steps, enabled=main) as show:
                show(self.state.step, None)
                for row in self._rows():
                    if writer is not None:
                        writer.write(row)
                    show(row.step, row)
                    if on_progress is not None:
                        on_progress(row)
        finally:
            if writer is not None:
                writer.close()

    def _rows(self) -> Iterator[MetricsRow]:
        """Train; a row for every step. Whoever takes a row does so before the checkpoint that follows it: after a crash
        in between, the row is overwritten rather than missing."""
        clock = _Clock(self.state)
        for epoch, work in self._work():
            began, done_before = clock.seconds(), self._batches_done()
            rate = self._learning_rate()
            figures = self._stepper.step(work, step=self.state.step, learning_rate=rate, stop=self._is_late(clock))
            self.state = replace(
                self.state,
                step=self.state.step + 1,
                epoch=epoch,
                next_batch=work.next_batch,
                tokens=self.state.tokens + figures.tokens,
                seconds=clock.seconds(),
                cpu_seconds=clock.cpu_seconds(),
            )
            every = self._settings.checkpoint_every_batches
            stopped = self._stop_reason(figures.stop)
            checkpoint_due = bool(stopped) or self._batches_done() // every > done_before // every
            if checkpoint_due:
                self._score()
                stopped = stopped or self._lost_patience()
            yield MetricsRow(
                step=self.state.step,
                epoch=epoch,
                loss=figures.loss,
                alpha=figures.alpha,
                heldout_alpha=self.state.last_alpha if checkpoint_due and self.state.best_alpha >= 0.0 else math.nan,
                learning_rate=rate,
                grad_norm=figures.grad_norm,
                tokens=self.state.tokens,
                tokens_per_s=figures.tokens / max(self.state.seconds - began, 1e-9),
                seconds=self.state.seconds,
            )
            if checkpoint_due:
                self.state = replace(
                    self.state, seconds=clock.seconds(), cpu_seconds=clock.cpu_seconds(), stopped=stopped
                )
                self._save()
            if stopped:
                return

    def _work(self) -> Iterator[tuple[int, StepWork]]:
        """Every step that is left, with its epoch."""
        for epoch in range(self.state.epoch, self._settings.epochs):
            work = epoch_steps(
                self._plan,
                epoch,
                start_index=self.state.next_batch if epoch == self.state.epoch else 0,
                rank=self._rank,
                world_size=self._world_size,
                accumulation=self._settings.accumulation,
            )
            for step_work in work:
                yield epoch, step_work

    def _batches_done(self) -> int:
        return sum(self._counts[: self.state.epoch]) + self.state.next_batch

    def _learning_rate(self) -> float:
        settings = self._settings
        progress = (self.state.step + 0.5) / self._num_steps
        if settings.max_tokens is not None:
            progress = max(progress, self.state.tokens / settings.max_tokens)
        return learning_rate_at(progress, self.state.peak_learning_rate, settings.warmup_share, settings.decay)

    def _is_late(self, clock: _Clock) -> bool:
        limit = self._settings.max_minutes
        return limit is not None and clock.session_seconds() > 60.0 * limit

    def _stop_reason(self, late: bool) -> str:
        settings, state = self._settings, self.state
        if state.epoch == settings.epochs - 1 and state.next_batch >= self._counts[-1]:
            return COMPLETED
        if settings.max_tokens is not None and state.tokens >= settings.max_tokens:
            return MAX_TOKENS
        return MAX_MINUTES if late else ""

    def _lost_patience(self) -> str:
        patience = self._settings.patience
        return NO_IMPROVEMENT if patience is not None and self.state.stale_evaluations >= patience else ""

    def _score(self) -> None:
        """Score the held-out sample; without one, the newest parameters are the best."""
        if not self._heldout_sample:
            self.state = replace(self.state, best_step=self.state.step)
            return
        alpha = self._stepper.heldout_alpha(self._heldout_sample)
        if math.isnan(alpha):  # nothing in the sample is labelled
            self.state = replace(self.state, best_step=self.state.step)
            return
        best: dict[str, Any]
        if alpha > self.state.best_alpha:
            best = {"best_alpha": alpha, "best_step": self.state.step, "stale_evaluations": 0}
        else:
            best = {"stale_evaluations": self.state.stale_evaluations + 1}
        self.state = replace(self.state, last_alpha=alpha, **best)

    def _save(self) -> None:
        model, optimizer = trained_tensors(self._module), optimizer_tensors(self._module, self._optimizer)
        with on_main_process(self._accelerator) as main:
            if main:
                self._store.save(self.state, model, optimizer)

    def finish(self) -> DistillResult:
        """Write the draft with the best parameters; they are also the student's from now on, unless it is sharded."""
        best = self._store.load_model(self.state.best_step)
        if not self._sharded:
            load_trained_tensors(self._module, best)
        draft = self._output_dir / DRAFT
        with on_main_process(self._accelerator) as main:
            if main:
                if self._sharded:
                    load_trained_tensors(TrainingModule(self._writer), best)
                write_draft(self._writer, draft)
        state, scored = self.state, self.state.best_alpha >= 0.0
        return DistillResult(
            steps=state.step,
            tokens=state.tokens,
            seconds=state.seconds,
            cpu_seconds=state.cpu_seconds,
            final_alpha=state.last_alpha if scored else math.nan,
            best_alpha=state.best_alpha if scored else math.nan,
            best_step=state.best_step,
            draft=draft,
            stopped=state.stopped,
            parent_fingerprint=self._parent,
            world_size=self._world_size,
            history=read_metrics(self._output_dir / METRICS_FILE),
        )


def _check_rollouts(objective: Objective, rollouts: StudentRollouts | None, *, sharded: bool) -> None:
    wanted = objective.on_policy_source == "rollout" and objective.on_policy_fraction > 0.0
    if wanted and rollouts is None:
        raise ConfigError("objective.on_policy_source=rollout needs the target in this process, to label the rollouts")
    if wanted and sharded:
        raise WorldSizeUnsupported("student rollouts need the whole draft on every rank: use DDP instead of FSDP")


class _Clock:
    """Seconds of a run over all its sessions."""

    def __init__(self, state: TrainingState) -> None:
        self._began, self._cpu_began = time.monotonic(), time.process_time()
        self._seconds, self._cpu_seconds = state.seconds, state.cpu_seconds

    def session_seconds(self) -> float:
        return time.monotonic() - self._began

    def seconds(self) -> float:
        return self._seconds + self.session_seconds()

    def cpu_seconds(self) -> float:
        return self._cpu_seconds + time.process_time() - self._cpu_began
