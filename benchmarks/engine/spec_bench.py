"""Spec-Bench (Xia et al. 2024) with one general draft: tokens a second over plain decoding, prompt by prompt.

Each prompt is run plain, with every proposer, and plain again, in turning order. Prefill takes as long either way, so
beside all of a completion's time stands that behind its first token.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cells import Cells, quartiles
from benchmarks.engine.models import BOTH, DRAFT, PLAIN, Models
from benchmarks.engine.plan import Plan
from benchmarks.engines import generate
from benchmarks.machine import OtherLoad
from benchmarks.prompts import BenchmarkPrompt, has_data, load_domain
from redraft.sampling.params import SamplingParams, StoppingParams
from redraft_server.engine.engine import Engine

TASKS = ("MT-bench", "translation", "summarization", "qa", "math_reasoning", "rag")
ALL = "all"
MODES = (DRAFT, BOTH)
TEMPERATURES = (0.0, 0.7)
_TOP_P = 0.95
_LONGEST_PROMPT = 1600  # tokens; the longest has some less


@dataclass(frozen=True, slots=True)
class _Speed:
    """Tokens a second: of the whole completion, and from its first token on."""

    whole: float
    decode: float


def measure_spec_bench(
    cells: Cells, models: Models, plan: Plan, data: Path | None, on_cell: Callable[[str], None]
) -> None:
    """Measure every temperature that is not known; nothing without the benchmark's prompts."""
    if not has_data(data):
        return
    prompts = _prompts(data, plan.benchmark_prompts)
    with ExitStack() as stack:
        engines = {mode: stack.enter_context(models.engine(mode, max_running=1)) for mode in (PLAIN, *MODES)}
        for temperature in TEMPERATURES:
            identity = {"experiment": "spec_bench", "temperature": temperature}
            if cells.is_known(**identity, proposer=MODES[-1], task=ALL):
                continue
            load = OtherLoad()
            load.start()
            found: dict[str, list[tuple[str, float, float]]] = {mode: [] for mode in MODES}
            for number, (task, prompt) in enumerate(prompts):
                on_cell(f"Spec-Bench, {task}, temperature {temperature}: {number + 1} of {len(prompts)}")
                ids = prompt.token_ids(models.tokenizer)[-_LONGEST_PROMPT:]
                order = MODES if number % 2 == 0 else MODES[::-1]
                plain, *speeds, plain_again = (
                    _speed(engines[mode], ids, temperature, plan.benchmark_tokens) for mode in (PLAIN, *order, PLAIN)
                )
                for mode, speed in zip(order, speeds, strict=True):
                    whole = speed.whole / statistics.fmean((plain.whole, plain_again.whole))
                    decode = speed.decode / statistics.fmean((plain.decode, plain_again.decode))
                    found[mode].append((task, whole, decode))
            load.stop()
            for mode in MODES:
                _keep(cells, {**identity, "proposer": mode}, found[mode], load.median)


def _prompts(data: Path | None, per_task: int) -> list[tuple[str, BenchmarkPrompt]]:
    """So many of each task, spread over it."""
    by_task: dict[str, list[BenchmarkPrompt]] = {task: [] for task in TASKS}
    for prompt in load_domain(data, "spec_bench", 480):
        by_task[prompt.category if prompt.category in by_task else TASKS[0]].append(prompt)
    return [
        (task, own[number * len(own) // per_task]) for number in range(per_task) for task, own in by_task.items() if own
    ]


def _speed(engine: Engine, prompt: tuple[int, ...], temperature: float, new_tokens: int) -> _Speed:
    first: list[float] = []

    def on_events() -> None:
        if not first:
            first.append(time.perf_counter())

    top_p = 1.0 if temperature == 0.0 else _TOP_P
    params = SamplingParams(temperature=temperature, top_p=top_p, seed=1)
    started = time.perf_counter()
    (done,) = generate(engine, [prompt], [params], StoppingParams(max_new_tokens=new_tokens), on_events=on_events)
    ended, count = time.perf_counter(), len(done.token_ids)
    return _Speed(count / (ended - started), max(count - 1, 1) / (ended - first[0]))


def _keep(
    cells: Cells, identity: dict[str, object], found: Sequence[tuple[str, float, float]], other_cores: float | None
) -> None:
    for task in (*TASKS, ALL):
        own = [(whole, decode) for of, whole, decode in found if task in (of, ALL)]
        if own:
            wholes, decodes = zip(*own, strict=True)
            low, _, high = quartiles(wholes)
            values = {
                "ratio": round(statistics.geometric_mean(wholes), 4),
                "quartiles": [round(low, 4), round(high, 4)],
                "decode_ratio": round(statistics.geometric_mean(decodes), 4),
                "prompts": len(own),
                "other_cores": None if other_cores is None else round(other_cores, 3),
            }
            cells.keep({**identity, "task": task}, values)
