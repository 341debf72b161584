"""How ranks share batches: every batch once, in the order that one process has, and the same number of turns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest

from redraft_training.dataset.batch import Batch
from redraft_training.dataset.packing import BatchPlan, PackSettings
from redraft_training.distill.work import StepWork, data_fingerprint, epoch_steps, steps_per_epoch
from tests.unit.training.distill_runs import PACK, examples, plan


class Numbers:
    """A plan whose batches are their own indices."""

    examples = ()

    def __init__(self, total: int) -> None:
        self._total = total

    def num_batches(self, epoch: int) -> int:
        return self._total

    def batches(self, epoch: int, start_index: int, rank: int, world_size: int) -> Iterator[Batch]:
        return iter(cast(Any, range(start_index + rank, self._total, world_size)))


def shared(total: int, world_size: int, accumulation: int, start: int = 0) -> list[list[StepWork]]:
    return [
        list(
            epoch_steps(
                Numbers(total), 0, start_index=start, rank=rank, world_size=world_size, accumulation=accumulation
            )
        )
        for rank in range(world_size)
    ]


def places(steps: list[StepWork]) -> list[list[tuple[int, bool]]]:
    return [[(micro.index, micro.idle) for micro in step.micro_batches] for step in steps]


@pytest.mark.parametrize("total", [1, 2, 5, 8, 13])
@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 3), (2, 1), (2, 2), (3, 2), (4, 1)])
def test_ranks_share_the_steps_of_one_process(total: int, world_size: int, accumulation: int) -> None:
    ranks = shared(total, world_size, accumulation)
    (single,) = shared(total, 1, accumulation * world_size)
    assert len({len(steps) for steps in ranks}) == 1
    assert len(single) == len(ranks[0]) == steps_per_epoch(total, accumulation, world_size)
    for number, alone in enumerate(single):
        parts = [steps[number] for steps in ranks]
        assert len({len(part.micro_batches) for part in parts}) == 1  # no rank waits for another
        done = sorted(micro.index for part in parts for micro in part.micro_batches if not micro.idle)
        assert done == [micro.index for micro in alone.micro_batches]
        assert {part.next_batch for part in parts} == {alone.next_batch}
        for micro in (micro for part in parts for micro in part.micro_batches):
            assert micro.idle or cast(Any, micro.batch) == micro.index
    assert single[-1].next_batch == total


def test_the_rest_of_an_epoch_is_its_end() -> None:
    for start in (2, 4, 6):
        for whole, rest in zip(shared(7, 2, 1), shared(7, 2, 1, start=start), strict=True):
            assert places(rest) == places(whole[start // 2 :])
    assert shared(6, 2, 1, start=6) == [[], []]


def test_the_fingerprint_tells_data_and_order_apart() -> None:
    assert data_fingerprint(plan(10)) == data_fingerprint(plan(10))
    others = [
        plan(9),
        plan(10, seed=1),
        BatchPlan(examples(10), PACK, seed=1),
        BatchPlan(examples(10), PackSettings(row_tokens=64, batch_tokens=128), seed=0),
    ]
    assert len({data_fingerprint(other) for other in (plan(10), *others)}) == 5
