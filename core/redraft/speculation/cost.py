"""What a forward pass costs, measured: the ground that draft lengths are chosen on."""

from __future__ import annotations

import functools
import itertools
import math
import time
from bisect import bisect_left
from collections.abc import Callable

from redraft.models.runner import Chunk, ModelRunner

_COST_RATE = 0.1  # of the moving average of step times
_COMMON_RATE = 0.08  # as much of it is taken for a change of the machine's speed, which all sizes share
_MAX_CHANGE = 2.0  # of one step against what was expected: a preempted step says nothing of its size
_WARM_UP_SIZES = (1, 2, 4, 8, 16, 32)
_WARM_UP_ROWS = 4
_WARM_UP_ROUNDS = 5


class StepCost:
    """Seconds of a forward pass as a function of its size, a moving average per size class.

    What one size turns out to cost moves the others along: contexts grow and neighbours come and go for all of them. If
    each size were on its own, one that had bad luck would look dear beside those that are not tried, and never be
    chosen again. Nor is a pass ever dearer than one of more tokens: what says so is noise.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        # the size classes, ascending, and what is believed of them: estimates are asked for dozens of times a step
        self._known: list[int] = []
        self._believed: list[float] = []

    @staticmethod
    def _size_class(size: int) -> int:
        if size <= 16:  # passes of 9 or 10 tokens would make 16 look cheap
            return size
        return -(-size // 4) * 4 if size <= 32 else 1 << (size - 1).bit_length()

    def observe(self, size: int, seconds: float) -> None:
        key = self._size_class(size)
        if key not in self._seconds:
            self._seconds[key] = seconds
            self._known = sorted(self._seconds)
        else:
            ratio = seconds / max(self._seconds[key], 1e-9)
            change = min(max(ratio, 1.0 / _MAX_CHANGE), _MAX_CHANGE) - 1.0
            self._seconds[key] *= (1.0 + _COST_RATE * change) / (1.0 + _COMMON_RATE * change)
            for size_class in self._seconds:
                self._seconds[size_class] *= 1.0 + _COMMON_RATE * change
        falling = itertools.accumulate((self._seconds[size_class] for size_class in reversed(self._known)), min)
        self._believed = list(falling)[::-1]

    def estimate(self, size: int) -> float:
        """Interpolated between measured classes, proportional beyond the largest; 0 if nothing was measured."""
        known, believed = self._known, self._believed
        if not known:
            return 0.0
        at = bisect_left(known, size)
        if at == 0:
            return believed[0]
        if at == len(known):
            return believed[-1] * size / known[-1]
        low, high = known[at - 1], known[at]
        share = (size - low) / (high - low)
        return believed[at - 1] * (1 - share) + believed[at] * share


def measure_cost(
    runner: ModelRunner, run: Callable[[Callable[[], float]], float] = lambda timed_pass: timed_pass()
) -> StepCost:
    """Touch every weight, capture what there is to capture, and measure a pass by its number of tokens, up to four of
    a sequence, all with logits. Writes to the first blocks.

    `run` says where a pass is run: here, or between the steps of an engine that is at work.
    """
    for capture in runner.captures():
        run(functools.partial(_captured, capture))
    best = dict.fromkeys(_WARM_UP_SIZES, math.inf)
    for _ in range(_WARM_UP_ROUNDS):  # one size after the other, so that a busy moment of the machine hits all
        for size in best:
            best[size] = min(best[size], run(functools.partial(_timed, runner, _batch(runner, size))))
    cost = StepCost()
    for size, seconds in best.items():
        cost.observe(size, seconds)
    return cost


def _batch(runner: ModelRunner, size: int) -> list[Chunk]:
    """As in verification, so that it fits a bucket where passes are padded to one."""
    rows = min(size, _WARM_UP_ROWS, runner.num_blocks * runner.block_size)
    return [Chunk([0] * rows, 0, range(-(-rows // runner.block_size)), rows)] * (size // rows)


def _captured(capture: Callable[[], None]) -> float:
    capture()
    return 0.0


def _timed(runner: ModelRunner, chunks: list[Chunk]) -> float:
    started = time.perf_counter()
    runner.forward(chunks).sum().item()
    return time.perf_counter() - started
