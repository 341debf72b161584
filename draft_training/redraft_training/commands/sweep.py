"""`redraft-train sweep`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from redraft.errors import ConfigError
from redraft_training.commands.common import (
    ConfigOption,
    PresetOption,
    SetOption,
    TargetOption,
    TrafficOption,
    clean_errors,
    out,
    say,
    settings_from,
)


def sweep(
    output: Annotated[Path, typer.Option(help="Directory for the drafts, sweep.json and sweep.png.")],
    layers: Annotated[str, typer.Option(help="Depths to try, comma-separated.")] = "2,4,6",
    vocab: Annotated[str, typer.Option(help="Output vocabularies to try; `all` for the target's.")] = "8192,all",
    width: Annotated[str, typer.Option(help="MLP channels to try; `all` for the target's.")] = "all",
    config: ConfigOption = None,
    target: TargetOption = None,
    traffic: TrafficOption = None,
    preset: PresetOption = None,
    set_: SetOption = None,
) -> None:
    """Find the size of draft that pays on this machine: acceptance and predicted speed-up by depth, width, vocabulary.

    Each size is trained on the same traffic; give a short training, such as --set distill.epochs=1. Run it on the
    machine that will serve, and on an idle one: what a pass costs is measured.

        redraft-train sweep --traffic traffic --layers 2,4,6 --vocab 8192,16384,all --output sweep
    """
    with clean_errors():
        settings = settings_from(config, set_, preset, target=target, traffic=traffic)
        from redraft_training.sweep import Capacity
        from redraft_training.sweep import sweep as measure

        sizes = [
            Capacity(depth, channels, ids)
            for depth, channels, ids in itertools.product(
                _numbers("--layers", layers), _sizes("--width", width), _sizes("--vocab", vocab)
            )
        ]
        points = measure(settings, sizes, output, say=say)
        table = Table(title="Which draft pays")
        for name in ("draft", "parameters", "alpha", "draft pass", "best k", "acceptance length", "predicted speed-up"):
            table.add_column(name, justify="left" if name == "draft" else "right")
        for point in sorted(points, key=lambda point: -point.speedup):
            table.add_row(
                point.capacity.name,
                f"{point.num_parameters:,}",
                f"{point.alpha:.3f}",
                f"{point.draft_cost:.2f}",
                str(point.best_k),
                f"{point.mean_acceptance_length:.2f}",
                f"{point.speedup:.2f}",
            )
        out.print(table)
        say(f"{output / 'sweep.json'}, {output / 'sweep.png'}")


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name} {text!r}: expected numbers such as 2,4") from None


def _sizes(name: str, text: str) -> list[int | None]:
    parts = text.split(",")
    if any(part != "all" and not part.isdecimal() for part in parts):
        raise ConfigError(f"{name} {text!r}: expected numbers or `all`, such as 8192,all")
    return [None if part == "all" else int(part) for part in parts]
