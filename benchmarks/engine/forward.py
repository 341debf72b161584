"""T(b, k): a forward pass over k new tokens of each of b sequences, beside its floor, and what sampling its rows costs.

Passes of one batch size alternate over k, so that T(b, k) / T(b, 1) is not a matter of when. The draft is measured
warm, over and over, and after a pass of the target, which throws it out of the caches as it does when serving.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cells import Cells, quartiles
from benchmarks.engine.floors import Ceilings, Footprint
from benchmarks.engine.models import Models
from benchmarks.engine.plan import Plan
from benchmarks.engine.share_clock import Probe, ShareClock
from benchmarks.machine import OtherLoad
from redraft.kernels.library import CpuKernels
from redraft.models.runner import Chunk, ModelRunner
from redraft.sampling.params import SamplingParams
from redraft.sampling.processors import SamplingRow, probabilities

TARGET, DRAFT_WARM, DRAFT_COLD = "target", "draft, warm", "draft, after target"
SAMPLERS = {"greedy": SamplingParams(temperature=0.0), "top-p 0.95": SamplingParams(temperature=0.7, top_p=0.95)}
_SPLIT_PASSES = 3
_KERNELS = (("linear_ms", ("linear",)), ("attention_ms", ("attention",)))


@dataclass(frozen=True)
class Subject:
    """A model under measurement. `before` runs ahead of every pass, untimed."""

    name: str
    runner: ModelRunner
    footprint: Footprint
    before: Callable[[], object] = lambda: None


def measure_forward(cells: Cells, models: Models, plan: Plan, on_cell: Callable[[str], None]) -> None:
    """Measure every cell that is not known."""
    target = Subject(TARGET, models.target.runner, Footprint.of(models.target.loaded, models.target.runner))
    draft = Footprint.of(models.draft.loaded, models.draft.runner)
    evict = _pass(target.runner, 1, 1, 0)
    for subject in (
        target,
        Subject(DRAFT_WARM, models.draft.runner, draft),
        Subject(DRAFT_COLD, models.draft.runner, draft, evict),
    ):
        for batch in plan.batches:
            identities = [_identity(subject, batch, rows) for rows in plan.rows]
            if not all(cells.is_known(**identity) for identity in identities):
                on_cell(f"{subject.name}, batch {batch}")
                _measure_batch(cells, subject, batch, plan)


def measure_sampling(cells: Cells, models: Models, plan: Plan, on_cell: Callable[[str], None]) -> None:
    """Logits to probabilities, by rows; the floor is reading the logits once."""
    vocab_size = models.tokenizer.vocab_size
    for rows in sorted({batch * tokens for batch in plan.step_batches for tokens in plan.rows}):
        logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0)) * 3
        for name, params in SAMPLERS.items():
            identity = {"experiment": "sampling", "sampler": name, "rows": rows}
            if cells.is_known(**identity):
                continue
            on_cell(f"sampling {name}, {rows} rows")
            described = [SamplingRow(params)] * rows
            ceilings = Ceilings.measure()
            low, median, high = quartiles(
                [_timed(lambda d=described, x=logits: probabilities(x, d)) for _ in range(plan.passes)]  # type: ignore[misc]
            )
            floor = logits.nbytes / ceilings.bandwidth_gb_s / 1e9
            values = {"ms": _ms(median), "quartiles_ms": [_ms(low), _ms(high)], "floor_ms": _ms(floor)}
            cells.keep(identity, values)


def _measure_batch(cells: Cells, subject: Subject, batch: int, plan: Plan) -> None:
    passes = {rows: _pass(subject.runner, batch, rows, plan.context) for rows in plan.rows}
    load = OtherLoad()
    seconds: dict[int, list[float]] = {rows: [] for rows in plan.rows}
    load.start()
    before = Ceilings.measure()
    for number in range(plan.passes + 1):
        for rows, run in passes.items():
            subject.before()
            taken = _timed(run)
            if number > 0:  # the first is a warm-up
                seconds[rows].append(taken)
    after = Ceilings.measure()
    load.stop()
    ceilings = Ceilings(
        (before.bandwidth_gb_s + after.bandwidth_gb_s) / 2, (before.peak_gflop_s + after.peak_gflop_s) / 2
    )
    one = quartiles(seconds[plan.rows[0]])[1]
    for rows, run in passes.items():
        low, median, high = quartiles(seconds[rows])
        floor = subject.footprint.floor(batch, rows, plan.context, ceilings)
        cells.keep(
            _identity(subject, batch, rows),
            {
                "forward_ms": _ms(median),
                "quartiles_ms": [_ms(low), _ms(high)],
                "floor_ms": _ms(floor.seconds),
                "ratio": round(median / floor.seconds, 3),
                "bound": floor.bound,
                "to_first": round(median / one, 3),
                **_split(run),
                "bandwidth_gb_s": round(ceilings.bandwidth_gb_s, 1),
                "peak_gflop_s": round(ceilings.peak_gflop_s, 1),
                "other_cores": None if load.median is None else round(load.median, 3),
            },
        )


def _pass(runner: ModelRunner, batch: int, rows: int, context: int) -> Callable[[], object]:
    """A pass over `rows` tokens of each sequence; what comes before them is computed now."""
    width = -(-(context + rows) // runner.block_size)
    random = torch.Generator().manual_seed(batch)
    tokens = torch.randint(runner.vocab_size, (batch, context + rows), generator=random).tolist()
    tables = [range(index * width, (index + 1) * width) for index in range(batch)]
    if context:
        for sequence, table in zip(tokens, tables, strict=True):
            runner.forward([Chunk(sequence[:context], 0, table, 0)])
    chunks = [Chunk(sequence[context:], context, table, rows) for sequence, table in zip(tokens, tables, strict=True)]
    return lambda: float(runner.forward(chunks)[0, 0])  # the number waits for the device


def _split(run: Callable[[], object]) -> dict[str, float]:
    """Milliseconds in the kernels for linear layers and attention; nothing where a pass calls none of them."""
    clock = ShareClock()
    with clock.watching([Probe(share, CpuKernels, names) for share, names in _KERNELS]), _whole_passes(clock):
        for _ in range(_SPLIT_PASSES):
            run()
    return {share: _ms(clock.seconds[share] / _SPLIT_PASSES) for share, _ in _KERNELS if clock.calls[share]}


@contextmanager
def _whole_passes(clock: ShareClock) -> Iterator[None]:
    """Within the block, add to the clock what a native pass over a whole model says of its parts."""
    kernels: Any = CpuKernels
    original = kernels.decode

    def decode(*args: Any) -> tuple[int, int]:
        spent: tuple[int, int] = original(*args)
        for (share, _), nanoseconds in zip(_KERNELS, spent, strict=True):
            clock.seconds[share] += nanoseconds / 1e9
            clock.calls[share] += 1
        return spent

    kernels.decode = decode
    try:
        yield
    finally:
        kernels.decode = original


def _timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _identity(subject: Subject, batch: int, rows: int) -> dict[str, object]:
    return {"experiment": "forward", "model": subject.name, "batch": batch, "k": rows}


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def known_models(cells: Cells) -> Sequence[str]:
    """Models that there are passes of, in the order of measuring."""
    return [name for name in (TARGET, DRAFT_WARM, DRAFT_COLD) if cells.find(experiment="forward", model=name)]
