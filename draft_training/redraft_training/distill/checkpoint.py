"""Checkpoints of a run: what it takes to go on as if it had never been stopped.

    <directory>/step-00000040/model.safetensors      the parameters that train
                              optimizer.safetensors  `<parameter>/<name>` -> tensor
                              state.json             counters, identity, SHA-256 of the other two

A checkpoint is written aside, flushed to disk and renamed: a process killed at any point leaves the earlier ones whole.
The last two are kept, and the best. There is no state of random generators in it, because the trainer keeps none: every
random number is a function of (seed, step, rank). Nothing is pickled.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from redraft.files import atomic_directory, sha256_file, sync_directory
from redraft_training.distill.errors import CheckpointError, CheckpointMismatch

SCHEMA_VERSION = 1
KEPT = 2
MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"
_PREFIX = "step-"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Where a run is.

    Attributes:
        step: optimiser steps taken.
        epoch, next_batch: the batch to go on with; `next_batch` counts batches of all ranks within the epoch.
        tokens: run through the student so far.
        seconds, cpu_seconds: spent so far, by the main process.
        best_alpha, best_step: of the held-out evaluations; -1 and 0 before the first.
        last_alpha: of the newest evaluation.
        stale_evaluations: evaluations since the best one.
        stopped: why the session ended here, empty if it went on.
        peak_learning_rate: chosen when the run began; 0 before.
    """

    step: int = 0
    epoch: int = 0
    next_batch: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    best_alpha: float = -1.0
    best_step: int = 0
    last_alpha: float = -1.0
    stale_evaluations: int = 0
    stopped: str = ""
    peak_learning_rate: float = 0.0


@dataclass(frozen=True, slots=True)
class Identity:
    """What a checkpoint belongs to: going on with anything else would give neither run's result."""

    settings: Mapping[str, Any]
    data: str
    parent: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    state: TrainingState
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


class CheckpointStore:
    """The checkpoints under one directory, of one run. Only the main process may write.

    `clean` removes what a killed process left behind; leave it to the writer.
    """

    def __init__(self, directory: Path, identity: Identity) -> None:
        self.directory = directory
        self._identity = identity

    def path(self, step: int) -> Path:
        return self.directory / f"{_PREFIX}{step:08d}"

    def steps(self) -> list[int]:
        """Steps that there is a checkpoint of, ascending."""
        if not self.directory.is_dir():
            return []
        names = [path.name.removeprefix(_PREFIX) for path in self.directory.glob(f"{_PREFIX}*") if path.is_dir()]
        return sorted(int(name) for name in names if name.isdigit())

    def clean(self) -> None:
        """Remove unfinished checkpoints."""
        for path in self.directory.glob(f".{_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Remove every checkpoint: the run starts over."""
        self.clean()
        for step in self.steps():
            shutil.rmtree(self.path(step))

    def save(self, state: TrainingState, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> Path:
        """Write one checkpoint and prune older ones. Raises `CheckpointError`, the earlier ones then being intact."""
        target = self.path(state.step)
        if target.exists():  # damaged, or it would have been resumed from
            shutil.rmtree(target)
        try:
            with atomic_directory(target) as temporary:
                self._write(temporary, state, model, optimizer)
            sync_directory(self.directory)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(self._write_failure(error)) from error
        self._prune(keep={state.best_step})
        return target

    def load(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None if there is none at all.

        Raises `CheckpointMismatch` if it is not of this run, `CheckpointError` if all are damaged.
        """
        problems = []
        for step in reversed(self.steps()):
            try:
                return self._read(self.path(step))
            except CheckpointMismatch:
                raise
            except CheckpointError as error:
                _log.warning("%s; trying the checkpoint before it", error)
                problems.append(str(error))
        if problems:
            raise CheckpointError(f"no checkpoint can be read ({problems[0]}): start over without resuming")
        return None

    def load_model(self, step: int) -> dict[str, Tensor]:
        """The parameters at `step`. Raises `CheckpointError`."""
        return self._read(self.path(step)).model

    def _write(
        self, directory: Path, state: TrainingState, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
    ) -> None:
        digests = {}
        for name, tensors in ((MODEL_FILE, model), (OPTIMIZER_FILE, optimizer)):
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / name)
            digests[name] = sha256_file(directory / name)
        content = {
            "schema_version": SCHEMA_VERSION,
            "state": asdict(state),
            "identity": {**asdict(self._identity), "settings": dict(self._identity.settings)},
            "sha256": digests,
        }
        (directory / STATE_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for path in directory.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_directory(directory)

    def _read(self, directory: Path) -> Checkpoint:
        try:
            content = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
            if content["schema_version"] != SCHEMA_VERSION:
                raise CheckpointMismatch(f"checkpoint {directory.name} was written by another version of redraft")
            self._check_identity(directory.name, content["identity"])
            for name in (MODEL_FILE, OPTIMIZER_FILE):
                if sha256_file(directory / name) != content["sha256"][name]:
                    raise CheckpointError(f"checkpoint {directory.name} is damaged: {name} has another SHA-256")
            model, optimizer = load_file(directory / MODEL_FILE), load_file(directory / OPTIMIZER_FILE)
            return Checkpoint(TrainingState(**content["state"]), model, optimizer)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"checkpoint {directory.name} is damaged: {type(error).__name__}") from error

    def _check_identity(self, name: str, found: Mapping[str, Any]) -> None:
        wanted = self._identity
        reasons = []
        # through JSON: what was written has lists where the settings have tuples
        old, new = found["settings"], json.loads(json.dumps(dict(wanted.settings)))
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        if changed:
            reasons.append(f"other settings ({', '.join(changed)})")
        if found["data"] != wanted.data:
            reasons.append("other training data")
        if found["parent"] != wanted.parent:
            reasons.append("another parent draft")
        if reasons:
            raise CheckpointMismatch(
                f"checkpoint {name} in {self.directory} was made with {' and '.join(reasons)}: "
                "restore them, choose another output directory, or start over without resuming"
            )

    def _prune(self, keep: Iterable[int]) -> None:
        steps = self.steps()
        for step in set(steps[:-KEPT]) - set(keep):
            shutil.rmtree(self.path(step), ignore_errors=True)

    def _write_failure(self, error: Exception) -> str:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        steps = self.steps()
        kept = f"the checkpoint of step {steps[-1]} is intact" if steps else "there is no earlier one"
        reason = "the disk is full: free some space and run it again" if full else str(error)
        return f"cannot write a checkpoint to {self.directory} ({kept}): {reason}"
