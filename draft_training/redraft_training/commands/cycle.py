"""`redraft-train run` and `redraft-train loop`."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from redraft_training.commands.common import (
    ConfigOption,
    Exit,
    PresetOption,
    RegistryOption,
    SetOption,
    TargetOption,
    TrafficOption,
    WorkDirOption,
    clean_errors,
    out,
    say,
    settings_from,
)

if TYPE_CHECKING:
    from redraft_training.cycle import CycleResult
    from redraft_training.evaluate.comparison import Comparison


def run(
    config: ConfigOption = None,
    target: TargetOption = None,
    traffic: TrafficOption = None,
    registry: RegistryOption = None,
    work_dir: WorkDirOption = None,
    preset: PresetOption = None,
    set_: SetOption = None,
) -> None:
    """Run one retraining cycle: read the log, distil, evaluate, and publish if the gate allows.

    Meant for a scheduler: run it as often as you like. Without enough new traffic it ends at once; killed at any point
    it goes on where it was, and publishes the same draft once.

        redraft-train run --traffic traffic --registry drafts --work-dir retraining

    `redraft-train settings` lists everything that --config and --set can change.

    Exit status: 0 published; 1 an error (nothing is half done, run again); 2 wrong settings; 3 refused by the gate (the
    draft is kept in the registry with the reason); 4 not enough new traffic.
    """
    with clean_errors():
        settings = settings_from(
            config, set_, preset, target=target, traffic=traffic, registry=registry, work_dir=work_dir
        )
        from redraft_training.cycle import Outcome, run_cycle

        result = run_cycle(settings, say=say)
        show(result)
        statuses = {
            Outcome.PUBLISHED: Exit.PUBLISHED,
            Outcome.REFUSED: Exit.REFUSED,
            Outcome.NOT_ENOUGH_DATA: Exit.NOT_ENOUGH_DATA,
        }
        raise typer.Exit(statuses[result.outcome])


def loop(
    config: ConfigOption = None,
    target: TargetOption = None,
    traffic: TrafficOption = None,
    registry: RegistryOption = None,
    work_dir: WorkDirOption = None,
    preset: PresetOption = None,
    set_: SetOption = None,
    poll: Annotated[float, typer.Option(min=0.1, help="Seconds between looks at the log.")] = 30.0,
    max_cycles: Annotated[int | None, typer.Option(min=1, help="End after so many cycles. Default: never.")] = None,
) -> None:
    """Follow the log and run a cycle whenever there is enough news, or acceptance drifts down.

    After a refused draft the next cycle waits for twice as much news. An error is reported and tried again, less and
    less often. Ends at SIGTERM or SIGINT; a cycle that is under way then goes on from its last checkpoint next time.

        redraft-train loop --traffic traffic --registry drafts --work-dir retraining
    """
    with clean_errors():
        settings = settings_from(
            config, set_, preset, target=target, traffic=traffic, registry=registry, work_dir=work_dir
        )
        from redraft_training.loop import follow

        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            follow(settings, poll_s=poll, stop=threading.Event(), say=say, on_result=show, max_cycles=max_cycles)
        except KeyboardInterrupt:
            say("stopped; a cycle under way goes on from its last checkpoint when the loop is started again")


def show(result: CycleResult) -> None:
    """What a cycle came to, as a few lines and a table."""
    if result.comparison is not None:
        out.print(comparison_table(result.comparison))
    where = "" if result.version is None else f" {result.version}"
    typer.echo(f"{result.outcome.value.replace('_', ' ')}{where}: {result.reason}")
    if result.directory is not None:
        say(f"report: {result.directory / 'distill' / 'draft' / 'report.html'}")


def comparison_table(comparison: Comparison) -> Table:
    """α before and after, overall and by domain."""
    table = Table(title="Expected acceptance on held-out traffic")
    for name in ("domain", "before", "after", "gain", "interval", "positions"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    rows = [("all", comparison.overall), *((name or "(none)", gain) for name, gain in comparison.domains.items())]
    for name, gain in rows:
        table.add_row(
            name,
            f"{gain.alpha_old:.3f}",
            f"{gain.alpha_new:.3f}",
            f"{gain.gain:+.3f}",
            f"{gain.low:+.3f} .. {gain.high:+.3f}",
            str(gain.num_positions),
        )
    return table
