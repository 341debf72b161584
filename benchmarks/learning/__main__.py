"""How fast a draft learns, into benchmarks/results/learning.json and learning.md.

    python -m benchmarks.learning --general build/learning/general/draft --only domains,drift

Hours on two cores for all of it. What is done is kept, so it may be stopped and started again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.learning import experiments
from benchmarks.learning.bench import FOLDER, Bench
from benchmarks.learning.page import write
from benchmarks.learning.speed import speed
from benchmarks.prompts import DEFAULT_DATA
from redraft.models.ref import ModelRef
from redraft_training.student.prune import init_draft

_ALL = "domains,drift,captured,ablation,fine_tuning,learning_rates,quantised,speed"


def main(
    general: Annotated[str, typer.Option(help="The general day-0 draft.")] = "demo-draft",
    data: Annotated[Path, typer.Option(help="Folder of <domain>.jsonl files.")] = DEFAULT_DATA,
    only: Annotated[str, typer.Option(help="Experiments to run, comma-separated.")] = _ALL,
) -> None:
    """Train and judge; print every result as it comes."""
    first, short, day0 = _pruned([0, 10, 20, 29]), _pruned([0, 29]), ModelRef.parse(general)
    bench = Bench()
    experiment: dict[str, Callable[[], None]] = {
        "domains": lambda: experiments.domains(bench, data, day0, first),
        "drift": lambda: experiments.drift(bench, data, day0),
        "captured": lambda: experiments.captured(bench, data, short),
        "ablation": lambda: experiments.ablation(bench, data, short),
        "fine_tuning": lambda: experiments.fine_tuning(bench, data, day0),
        "learning_rates": lambda: experiments.learning_rates(bench, data, day0),
        "quantised": lambda: experiments.quantised(bench, data, short),
        "speed": lambda: speed(bench, data, day0, first),
    }
    names = only.split(",")
    if unknown := set(names) - set(experiment):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))} is none of {_ALL}", param_hint="--only")
    for name in names:
        experiment[name]()
    write(bench)


def _pruned(layers: list[int]) -> ModelRef:
    folder = FOLDER / f"pruned-{len(layers)}"
    if not folder.exists():
        init_draft(ModelRef.parse("demo"), folder, layers=layers)
    return ModelRef.parse(f"./{folder}")


if __name__ == "__main__":
    typer.run(main)
