"""The order of a run's batches, the same for any number of ranks, and how ranks share an optimiser step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from redraft_training.dataset.batch import Batch
from redraft_training.dataset.example import Example


class BatchPlan(Protocol):
    """Batches in a reproducible order: epoch and index say which examples are in a batch.

    `redraft_training.dataset.packing.BatchPlan` is one.
    """

    @property
    def examples(self) -> Sequence[Example]:
        """Everything that is in the batches."""

    def num_batches(self, epoch: int) -> int:
        """Batches of the epoch, of all ranks together."""

    def batches(self, epoch: int, start_index: int, rank: int, world_size: int) -> Iterator[Batch]:
        """The epoch's batches `start_index + rank`, `start_index + rank + world_size`, ..."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One batch of an optimiser step on one rank. `idle`: the rank has nothing left to do; the batch is run at weight 0
    so that it takes part in every collective operation of the others."""

    epoch: int
    index: int
    batch: Batch
    idle: bool


@dataclass(frozen=True, slots=True)
class StepWork:
    """This rank's share of an optimiser step; `next_batch` is where the following step begins."""

    micro_batches: tuple[MicroBatch, ...]
    next_batch: int


def steps_per_epoch(num_batches: int, accumulation: int, world_size: int) -> int:
    return -(-num_batches // (accumulation * world_size))


def epoch_steps(
    plan: BatchPlan, epoch: int, *, start_index: int, rank: int, world_size: int, accumulation: int
) -> Iterator[StepWork]:
    """The rest of an epoch from batch `start_index` on. A step takes the next `accumulation * world_size` batches,
    dealt out in turn, so one rank that accumulates w times as much makes the steps that w ranks make.

    Every rank gets the same number of steps and of batches in each. Worked example: 5 batches, 2 ranks, accumulation 2:
    rank 0 gets (0, 2), (4); rank 1 gets (1, 3), (idle).
    """
    total = plan.num_batches(epoch)
    batches = plan.batches(epoch, start_index, rank, world_size)
    spare: Batch | None = None
    for first in range(start_index, total, accumulation * world_size):
        following = min(first + accumulation * world_size, total)
        micro_batches = []
        for index in range(first + rank, first + rank + _padded(following - first, world_size), world_size):
            if index < total:
                spare = next(batches)
            elif spare is None:
                spare = next(plan.batches(epoch, 0, 0, 1))
            micro_batches.append(MicroBatch(epoch, index, spare, idle=index >= total))
        yield StepWork(tuple(micro_batches), following)


def _padded(count: int, multiple: int) -> int:
    """`count` rounded up to a multiple."""
    return -(-count // multiple) * multiple


def data_fingerprint(plan: BatchPlan) -> str:
    """SHA-256 over which examples there are and how the first epoch begins, which seed and packing decide."""
    digest = hashlib.sha256(str(plan.num_batches(0)).encode())
    for example in plan.examples:
        key = (example.request_id, example.sample_index, len(example.prompt_token_ids), example.output_token_ids)
        digest.update(repr(key).encode("utf-8", "surrogatepass"))
    for batch in plan.batches(0, 0, 0, max(plan.num_batches(0), 1)):
        digest.update(batch.input_ids.numpy().tobytes())
    return digest.hexdigest()
