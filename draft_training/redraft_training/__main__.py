"""`redraft-train`: make, train, judge and publish drafts."""

from __future__ import annotations

import typer

from redraft_training.commands.cycle import loop, run
from redraft_training.commands.data import dataset, settings
from redraft_training.commands.evaluate import evaluate, publish, report
from redraft_training.commands.init import init
from redraft_training.commands.quantise import quantise
from redraft_training.commands.registry import registry
from redraft_training.commands.sweep import sweep
from redraft_training.commands.traffic import traffic
from redraft_training.commands.train import distill

app = typer.Typer(
    name="redraft-train",
    help="Keep the draft model of a target sharp: learn from its traffic, judge, publish.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback()
def _main() -> None:
    """Keep the draft model of a target sharp: learn from its traffic, judge, publish.

    `run` is the whole cycle for a scheduler, `loop` the same without one. The others are its parts.
    """


for command in (init, run, loop, dataset, distill, quantise, evaluate, publish, report, sweep, settings):
    app.command()(command)
app.add_typer(registry)
app.add_typer(traffic)


if __name__ == "__main__":
    app()
