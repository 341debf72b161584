"""How fast a draft learns, into benchmarks/results/learning.json and learning.md.

    python -m benchmarks.learning --general build/learning/general/draft --only domains,drift

Hours on two cores for all of it. What is done is kept, so it may be stopped and started again.
"""

from __future__ import annotations

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

_ALL = "domains,drift,captured,ablation,fine_tuning,speed"


def main(
    general: Annotated[str, typer.Option(help="The general day-0 draft.")] = "demo-draft",
    data: Annotated[Path, typer.Option(help="Folder of <domain>.jsonl files.")] = DEFAULT_DATA,
    only: Annotated[str, typer.Option(help="Experiments to run, comma-separated.")] = _ALL,
) -> None:
    """Train and judge; print every result as it comes."""
    first, short, day0 = _pruned([0, 10, 20, 29]), _pruned([0, 29]), ModelRef.parse(general)
    bench = Bench()
    for name in only.split(","):
        if name == "domains":
            experiments.domains(bench, data, day0, first)
        elif name == "drift":
            experiments.drift(bench, data, day0)
        elif name == "captured":
            experiments.captured(bench, data, short)
        elif name == "ablation":
            experiments.ablation(bench, data, short)
        elif name == "fine_tuning":
            experiments.fine_tuning(bench, data, day0)
        elif name == "speed":
            speed(bench, data, day0, first)
        else:
            raise typer.BadParameter(f"{name} is none of {_ALL}", param_hint="--only")
    write(bench)


def _pruned(layers: list[int]) -> ModelRef:
    folder = FOLDER / f"pruned-{len(layers)}"
    if not folder.exists():
        init_draft(ModelRef.parse("demo"), folder, layers=layers)
    return ModelRef.parse(f"./{folder}")


if __name__ == "__main__":
    typer.run(main)
