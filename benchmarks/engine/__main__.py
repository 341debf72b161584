"""Where redraft's time goes, into benchmarks/results/engine.json and engine.md.

    python -m benchmarks.engine --only forward,step

About half an hour on two quiet cores for all of it, most of it speculation at many streams. What is done is kept, so it
may be stopped and started again. `--quick` tries everything out in a minute, into build/bench.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.cells import Cells
from benchmarks.engine.forward import measure_forward, measure_sampling
from benchmarks.engine.models import Models
from benchmarks.engine.page import write
from benchmarks.engine.parts import measure_parts, measure_speculation
from benchmarks.engine.plan import QUICK, Plan
from benchmarks.engine.shares import measure_shares
from benchmarks.engine.spec_bench import measure_spec_bench
from benchmarks.machine import wait_passively
from benchmarks.prompts import DataOption, load_prompts
from benchmarks.report import RESULTS
from redraft.models.rounding import WeightFormat
from redraft_server.garbage import settle

EXPERIMENTS = "forward,sampling,step,parts,speculation,spec_bench"
QUICK_FOLDER = Path("build", "bench")


def main(
    only: Annotated[str, typer.Option(help="Experiments to run, comma-separated.")] = EXPERIMENTS,
    target: Annotated[str, typer.Option(help="The target: demo, a directory, or a Hugging Face id.")] = "demo",
    draft: Annotated[str, typer.Option(help="Its draft, named likewise.")] = "demo-draft",
    weights: Annotated[WeightFormat, typer.Option(help="How the target's weights are kept.")] = WeightFormat.FULL,
    again: Annotated[bool, typer.Option("--again", help="Measure known cells anew.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help=f"Few and short runs, into {QUICK_FOLDER}.")] = False,
    data: DataOption = None,
) -> None:
    """Measure what is not known yet; write the page."""
    console = Console(stderr=True)
    names = only.split(",")
    if unknown := set(names) - set(EXPERIMENTS.split(",")):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))} is none of {EXPERIMENTS}", param_hint="--only")
    plan = QUICK if quick else Plan()
    page_name = "engine" if weights is WeightFormat.FULL else f"engine-{weights}"
    cells = Cells((QUICK_FOLDER if quick else RESULTS) / f"{page_name}.json", again=again or quick)
    models = Models.load(target, draft, weights)
    settle()  # as the server does

    def on_cell(name: str) -> None:
        console.print(name, highlight=False)

    experiments: dict[str, Callable[[], None]] = {
        "forward": lambda: measure_forward(cells, models, plan, on_cell),
        "sampling": lambda: measure_sampling(cells, models, plan, on_cell),
        "step": lambda: measure_shares(cells, models, plan, data, on_cell),
        "parts": lambda: measure_parts(cells, models, plan, data, on_cell),
        "speculation": lambda: measure_speculation(cells, models, plan, data, on_cell),
        "spec_bench": lambda: measure_spec_bench(cells, models, plan, data, on_cell),
    }
    for name in names:
        experiments[name]()
    kind = models.target.loaded.dtype if weights is WeightFormat.FULL else weights
    loaded = f"{models.target.loaded.name} with draft {models.draft.loaded.name}, {kind}"
    page = write(cells, loaded.replace("torch.", ""), f"Streams are of {load_prompts(data, 8).source}")
    typer.echo(page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    wait_passively()
    typer.run(main)
