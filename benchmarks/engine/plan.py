"""How much is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of all experiments. Streams are requests at once; cycles are pairs of runs, in alternating order."""

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    rows: tuple[int, ...] = (1, 2, 4, 5, 8)
    context: int = 128  # tokens before a pass
    passes: int = 15
    step_batches: tuple[int, ...] = (1, 16)
    step_tokens: int = 64
    part_streams: int = 16  # of capture, metrics, gRPC
    part_prompt_tokens: int = 32  # short: their time is the same with and without
    part_tokens: int = 64
    part_cycles: int = 12
    streams: tuple[int, ...] = (1, 2, 4, 8, 16, 32)  # of speculation
    speculation_tokens: int = 64
    speculation_cycles: int = 6
    benchmark_prompts: int = 4  # of each of Spec-Bench's tasks
    benchmark_tokens: int = 128


QUICK = Plan(
    batches=(1, 4),
    rows=(1, 5),
    context=32,
    passes=3,
    step_batches=(1, 2),
    step_tokens=8,
    part_streams=2,
    part_prompt_tokens=16,
    part_tokens=8,
    part_cycles=2,
    streams=(1, 2),
    speculation_tokens=8,
    speculation_cycles=2,
    benchmark_prompts=1,
    benchmark_tokens=8,
)
