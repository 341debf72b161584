"""A GPU's passes and steps: captured as graphs, launched one by one, and the two floors beside them.

    python -m benchmarks.gpu --draft build/demo-draft

Times are absolute, by the device's clock: a rented GPU has no neighbours. Without a GPU `--device cpu` runs the same
code, which says that it works and nothing about speed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track

from benchmarks.engine.floors import Ceilings, Footprint
from benchmarks.machine import machine_line
from benchmarks.report import RESULTS, table, write_page
from redraft.models.buckets import BucketLimits
from redraft.models.draft import load_draft
from redraft.models.loader import LoadedModel, load_model
from redraft.models.ref import ModelRef
from redraft.models.runner import Chunk, ModelRunner
from redraft.sampling.params import SamplingParams
from redraft.speculation.draft_model import DraftModelProposer
from redraft.speculation.state import SequenceState
from redraft.speculation.step import Work, begin_step
from redraft.transfer import Stopwatch

_BLOCK_SIZE = 16
_ROUNDS, _WARM_UP = 20, 3
_SAMPLERS = {"greedy": SamplingParams(temperature=0.0), "top-p 0.95": SamplingParams(temperature=0.7, top_p=0.95)}


@dataclass(frozen=True)
class Subject:
    """A model with graphs and without. Their KV is apart, their weights are one."""

    name: str
    graphs: ModelRunner
    launches: ModelRunner
    footprint: Footprint


def main(
    target: Annotated[str, typer.Option(help="The target: demo, a directory, or a Hugging Face id.")] = "demo",
    draft: Annotated[str, typer.Option(help="Its draft.")] = "build/demo-draft",
    device: Annotated[str, typer.Option(help="Where it runs.")] = "cuda",
    batches: Annotated[str, typer.Option(help="Numbers of sequences, separated by commas.")] = "1,4,16",
    rows: Annotated[str, typer.Option(help="Tokens of each, separated by commas.")] = "1,2,4,8",
    context: Annotated[int, typer.Option(min=1, help="Tokens before them.")] = 512,
    output: Annotated[Path, typer.Option(help="Where the page goes.")] = RESULTS / "gpu.md",
) -> None:
    """Measure passes and steps on a GPU; write a Markdown page."""
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        typer.echo("torch sees no GPU: run this where there is one, or try it out with --device cpu", err=True)
        raise typer.Exit(2)
    sizes = [int(each) for each in batches.split(",")]
    lengths = [int(each) for each in rows.split(",")]
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    loaded = load_model(ModelRef.parse(target), dtype=dtype, device=place)
    smaller = load_draft(ModelRef.parse(draft), loaded)
    vocab_size = int(loaded.config.vocab_size)
    limits = BucketLimits(max(sizes), max(lengths))
    width = -(-(context + max(lengths) * (_WARM_UP + _ROUNDS + 1)) // _BLOCK_SIZE)  # blocks of a sequence

    def subject(name: str, model: LoadedModel, ids: torch.Tensor | None = None) -> Subject:
        def runner(buckets: BucketLimits | None) -> ModelRunner:
            return ModelRunner(
                model.model,
                num_blocks=max(sizes) * width,
                block_size=_BLOCK_SIZE,
                vocab_size=vocab_size,
                output_ids=ids,
                buckets=buckets,
            )

        graphs = runner(limits)
        return Subject(name, graphs, runner(None), Footprint.of(model, graphs))

    subjects = [subject("target", loaded), subject("draft", smaller.loaded, smaller.output_ids)]
    for each in subjects:
        for capture in track(each.graphs.captures(), f"Capturing the {each.name}"):
            capture()
    ceilings = _ceilings(place, dtype)
    parts = [
        f"Memory {ceilings.bandwidth_gb_s:,.0f} GB/s, matrix products {ceilings.peak_gflop_s / 1e3:,.1f} TFLOP/s, "
        f"both measured here, in {str(dtype).removeprefix('torch.')}. {context} tokens before each pass.",
        "## Passes\n\n" + _passes(subjects, sizes, lengths, context, ceilings),
        "## Steps\n\n" + _steps(subjects, sizes, max(lengths) - 1, context, width),
    ]
    name = torch.cuda.get_device_name() if place.type == "cuda" else "no GPU"
    write_page(output, "On a GPU", f"{name}; {machine_line()}.", parts)
    typer.echo(output.read_text(encoding="utf-8"))


def _passes(
    subjects: Sequence[Subject], batches: Sequence[int], rows: Sequence[int], context: int, ceilings: Ceilings
) -> str:
    lines = []
    for subject in subjects:
        for batch in batches:
            for length in rows:
                chunks = _chunks(batch, length, context)
                times = [
                    1e3 * _seconds(runner.device, lambda r=runner, c=chunks: r.forward(c))  # type: ignore[misc]
                    for runner in (subject.graphs, subject.launches)
                ]
                floor = subject.footprint.floor(batch, length, context, ceilings)
                shown = [f"{each:.3f}" for each in (*times, 1e3 * floor.seconds)]
                lines.append([subject.name, str(batch), str(length), *shown, floor.bound])
    header = ["model", "sequences", "tokens each", "graph, ms", "launches, ms", "floor, ms", "bound by"]
    return table(header, lines)


def _steps(subjects: Sequence[Subject], batches: Sequence[int], k: int, context: int, width: int) -> str:
    """Whole steps, from the call until the verdicts are on the host, plain and with k drafted tokens."""
    target, draft = subjects
    lines = []
    for batch in batches:
        for name, params in _SAMPLERS.items():
            for drafted in (0, k):
                proposer = DraftModelProposer(draft.graphs, version="bench", max_catch_up=batch * context + batch)
                states = _states(batch, context, params, width)
                work = [Work(state, 1, drafted) for state in states]

                def step(work: list[Work] = work, proposer: DraftModelProposer = proposer) -> None:
                    begin_step(work, target.graphs, proposer).finish()

                lines.append([name, str(batch), str(drafted), f"{1e3 * _seconds(target.graphs.device, step):.3f}"])
    return table(["sampling", "sequences", "drafted", "step, ms"], lines)


def _chunks(batch: int, rows: int, context: int) -> list[Chunk]:
    """What is in the context does not matter to the time."""
    width = -(-(context + rows) // _BLOCK_SIZE)
    return [
        Chunk(range(3, 3 + rows), context, range(index * width, (index + 1) * width), rows) for index in range(batch)
    ]


def _states(batch: int, context: int, params: SamplingParams, width: int) -> list[SequenceState]:
    states = []
    for index in range(batch):
        state = SequenceState([3 + index] * context, context, params, key=index, num_computed=context - 1)
        state.block_ids = list(range(index * width, (index + 1) * width))
        states.append(state)
    return states


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    """Median by the device's clock."""
    taken = []
    for number in range(_WARM_UP + _ROUNDS):
        watch = Stopwatch(device)
        watch.mark()
        run()
        watch.mark()
        if number >= _WARM_UP:
            taken += watch.laps()
    return statistics.median(taken)


def _ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Reading memory and multiplying matrices, both far larger than any cache of a GPU."""
    if device.type != "cuda":
        return Ceilings.measure()
    buffer = torch.ones(2**30, dtype=dtype, device=device)
    square = torch.ones(8192, 8192, dtype=dtype, device=device)
    reading = _seconds(device, lambda: buffer.amax())
    multiplying = _seconds(device, lambda: square @ square)
    return Ceilings(buffer.nbytes / reading / 1e9, 2 * 8192**3 / multiplying / 1e9)


if __name__ == "__main__":
    typer.run(main)
