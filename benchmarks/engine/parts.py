"""What the parts around the model cost, and what speculation brings: the same engine with and without, in turn."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from prometheus_client import CollectorRegistry

from benchmarks.cells import Cells
from benchmarks.engine.alternate import Run, alternate
from benchmarks.engine.models import DRAFT, NGRAM, PLAIN, Models
from benchmarks.engine.plan import Plan
from benchmarks.engine.served import served
from benchmarks.engines import generate
from benchmarks.machine import OtherLoad
from benchmarks.peers.workers.protocol import Request
from benchmarks.prompts import load_mixed
from redraft.sampling.params import SamplingParams, StoppingParams
from redraft.telemetry.metrics import ServerMetrics
from redraft.traffic.writer import TrafficWriter
from redraft_server.engine.engine import Engine

PARTS = ("capture", "metrics", "gRPC")
_CLOSE_TIMEOUT_S = 30.0

Prompts = Sequence[tuple[int, ...]]


def measure_parts(cells: Cells, models: Models, plan: Plan, data: Path | None, on_cell: Callable[[str], None]) -> None:
    """Speed with a part over speed without it, plain decoding, many streams."""
    prompts = [prompt[-plan.part_prompt_tokens :] for prompt in _prompts(models, data, plan.part_streams)]
    for part in PARTS:
        identity = {"experiment": "part", "part": part, "streams": plan.part_streams}
        if cells.is_known(**identity):
            continue
        on_cell(f"{part}, {plan.part_streams} streams")
        with ExitStack() as stack:
            off, on = _part(stack, part, models, prompts, plan.part_tokens)
            _keep(cells, identity, off, on, plan.part_cycles)


def measure_speculation(
    cells: Cells, models: Models, plan: Plan, data: Path | None, on_cell: Callable[[str], None]
) -> None:
    """Speed with an adaptive proposer over speed without drafting, greedy, by number of streams.

    Both are runs of one engine, off with requests that want no drafted token: two engines of the same code differ by
    three to six percent, whichever is asked, by where their threads and memory happen to lie.
    """
    most = max(plan.streams)
    with ExitStack() as stack:
        for mode in (DRAFT, NGRAM):
            engine = stack.enter_context(models.engine(mode, max_running=most))
            for streams in plan.streams:
                identity = {"experiment": "speculation", "proposer": mode, "streams": streams}
                if cells.is_known(**identity):
                    continue
                on_cell(f"speculation with {mode}, {streams} streams")
                off, on = (
                    _cycling(engine, models, data, streams, plan.speculation_tokens, plan.speculation_cycles, limit)
                    for limit in (0, None)
                )
                _keep(cells, identity, off, on, plan.speculation_cycles)


def _part(stack: ExitStack, part: str, models: Models, prompts: Prompts, new_tokens: int) -> tuple[Run, Run]:
    """Without the part and with it."""
    metrics = ServerMetrics(CollectorRegistry(), "benchmark")

    def engine(with_metrics: bool = True, writer: TrafficWriter | None = None) -> Engine:
        return stack.enter_context(
            models.engine(PLAIN, max_running=len(prompts), metrics=metrics if with_metrics else None, writer=writer)
        )

    def direct(one: Engine) -> Run:
        return lambda cycle: _speed(one, prompts, new_tokens)

    if part == "metrics":
        return direct(engine(with_metrics=False)), direct(engine())
    if part == "capture":
        writer = TrafficWriter(stack.enter_context(tempfile.TemporaryDirectory()), metrics)
        stack.callback(writer.close, _CLOSE_TIMEOUT_S)
        return direct(engine()), direct(engine(writer=writer))
    one = engine()
    client = stack.enter_context(served(one)).client
    request = Request([list(prompt) for prompt in prompts], new_tokens, 0.0, 1.0, 0)

    def streamed(cycle: int) -> float:
        answer = client.generate(request)
        return float(sum(map(len, answer["token_ids"])) / answer["seconds"])

    return direct(one), streamed


def _cycling(
    engine: Engine,
    models: Models,
    data: Path | None,
    streams: int,
    new_tokens: int,
    cycles: int,
    max_draft_tokens: int | None,
) -> Run:
    """Other prompts every cycle, so that a few streams see all domains."""
    prompts = _prompts(models, data, max(streams, cycles))

    def run(cycle: int) -> float:
        turned = [prompts[(cycle + index) % len(prompts)] for index in range(streams)]
        return _speed(engine, turned, new_tokens, max_draft_tokens)

    return run


def _speed(engine: Engine, prompts: Prompts, new_tokens: int, max_draft_tokens: int | None = None) -> float:
    """Tokens per second, prefill included."""
    started = time.perf_counter()
    completed = generate(
        engine,
        prompts,
        [SamplingParams(temperature=0.0)] * len(prompts),
        StoppingParams(max_new_tokens=new_tokens, ignore_eos=True),
        max_draft_tokens=max_draft_tokens,
    )
    return sum(len(one.token_ids) for one in completed) / (time.perf_counter() - started)


def _keep(cells: Cells, identity: dict[str, object], off: Run, on: Run, cycles: int) -> None:
    load = OtherLoad()
    load.start()
    pairs = alternate(off, on, cycles)
    load.stop()
    busy = None if load.median is None else round(load.median, 3)
    cells.keep(identity, {**pairs.values(), "other_cores": busy})


def _prompts(models: Models, data: Path | None, count: int) -> list[tuple[int, ...]]:
    return [prompt.token_ids(models.tokenizer) for prompt in load_mixed(data, count)]
