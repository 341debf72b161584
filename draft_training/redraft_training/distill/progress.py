"""The progress bar of a run, on standard error; nothing where that is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from redraft_training.distill.metrics import MetricsRow

Show = Callable[[int, MetricsRow | None], None]


@contextmanager
def training_progress(total_steps: int, *, enabled: bool) -> Iterator[Show]:
    """Yield a function that takes the number of steps done and the newest row."""
    console = Console(stderr=True)
    columns = (
        TextColumn("Distilling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (enabled and console.is_terminal)) as progress:
        task = progress.add_task("distil", total=total_steps, figures="")

        def show(step: int, row: MetricsRow | None) -> None:
            progress.update(task, completed=step, figures="" if row is None else _figures(row))

        yield show


def _figures(row: MetricsRow) -> str:
    return f"loss {row.loss:.3f}  α {row.alpha:.3f}  {row.tokens_per_s:,.0f} tokens/s"
