"""`redraft-train dataset` and `redraft-train settings`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from redraft_training.commands.common import (
    ConfigOption,
    SetOption,
    TargetOption,
    TrafficOption,
    clean_errors,
    out,
    say,
    settings_from,
)


def dataset(
    config: ConfigOption = None,
    target: TargetOption = None,
    traffic: TrafficOption = None,
    set_: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead.")] = False,
) -> None:
    """Say what a cycle would learn from: examples and tokens by domain, and what was skipped and why. Trains nothing.

    redraft-train dataset --traffic traffic --set "data.domains=[sql,support]"
    """
    with clean_errors():
        settings = settings_from(config, set_, None, target=target, traffic=traffic)
        from redraft_training.cycle_data import read_traffic
        from redraft_training.cycle_models import Models

        found = read_traffic(settings, Models(settings).identity).report
        if as_json:
            typer.echo(json.dumps(found.to_json(), indent=2))
            return
        table = Table(title=f"{found.records} records")
        for name in ("domain", "part", "examples", "output tokens", "labelled positions"):
            table.add_column(name, justify="left" if name in ("domain", "part") else "right")
        for part, shares in (("training", found.training), ("held out", found.held_out)):
            for domain, share in shares.items():
                row = (share.examples, share.output_tokens, share.positions)
                table.add_row(domain or "(none)", part, *(f"{count:,}" for count in row))
        out.print(table)
        for kind, counts in (("skipped", found.skipped), ("files not read", found.problems)):
            if counts:
                say(f"{kind}: " + ", ".join(f"{count} {reason}" for reason, count in counts.items()))


def settings() -> None:
    """Print every setting with its default and meaning, as a YAML file for --config.

        redraft-train settings > retraining.yaml

    Change what you like, delete what you leave alone, and give it to the other commands. Single settings are changed
    with --set: `--set distill.epochs=2 --set "data.domains=[sql,support]"`.
    """
    from redraft_training.settings_text import as_yaml

    typer.echo(as_yaml(), nl=False)
