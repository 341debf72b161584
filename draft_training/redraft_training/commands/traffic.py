"""`redraft-train traffic`: what is in the traffic log, and taking out of it what must not stay."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from redraft.errors import ConfigError
from redraft_training.commands.common import Exit, clean_errors, console, out, say

if TYPE_CHECKING:
    from redraft.traffic.sweep import SweepReport

traffic = typer.Typer(
    name="traffic",
    help="Look into the traffic log, delete from it, and let it expire.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

LogOption = Annotated[str, typer.Option("--traffic", help="The traffic log: a directory or an fsspec URL.")]
_DAY_S = 86_400.0


@traffic.command()
def delete(
    log: LogOption,
    request_id: Annotated[list[str] | None, typer.Option(help="All records of this request; may be repeated.")] = None,
    tenant: Annotated[
        list[str] | None, typer.Option(help="All records of this tenant; may be repeated. '' for those of none.")
    ] = None,
    before: Annotated[
        str | None,
        typer.Option(help="Only what was finished before: 2026-11-24 or 2026-11-24T13:30 (UTC). Default: now."),
    ] = None,
    work_dir: Annotated[
        list[Path] | None,
        typer.Option(
            help="Also from what a trainer keeps: its --work-dir, or the --output of distill. May be repeated."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count, and change nothing.")] = False,
) -> None:
    """Delete records by request, by tenant, by age, from every shard of the log.

    A shard is written anew without them, in one step; killed, run it again. What is asked for stays on record in the
    log: no reader returns it any more, even where a server writes it later, and each trainer takes it out of its replay
    memory and its cycle when it next runs. Drafts that have learnt from it stay.

        redraft-train traffic delete --traffic traffic --request-id 7f3a --request-id 81c0 --dry-run

        redraft-train traffic delete --traffic s3://bucket/traffic --tenant acme --work-dir retraining

        redraft-train traffic delete --traffic traffic --before 2026-11-01

    Exit status: 0 done; 1 some of it could not be done (each file is named), run it again; 2 wrong usage.
    """
    with clean_errors():
        from redraft.traffic.erasure import Erasure
        from redraft.traffic.sweep import count, erase

        if not request_id and not tenant and before is None:
            raise ConfigError("say what to delete: --request-id, --tenant or --before")
        erasure = Erasure(_time(before), frozenset(request_id or ()), frozenset(tenant or ()))
        with _progress() as on_shard, _usable(log):
            report = (count if dry_run else erase)(log, erasure, on_shard=on_shard)
        _show(report, "would delete" if dry_run else "deleted")
        is_done = not report.failed
        for directory in () if dry_run else work_dir or ():
            is_done = _erase_copies(directory, log) and is_done
        if not dry_run:
            say(
                "servers may still hold records of it, for traffic_log.roll_seconds or while a store is away: nothing "
                "reads them when they come, and `redraft-train traffic expire` takes them out"
            )
        if not is_done:
            raise typer.Exit(Exit.ERROR)


@traffic.command()
def expire(
    log: LogOption,
    days: Annotated[float, typer.Option(min=0.0, help="Delete shards that were written longer ago than this.")],
) -> None:
    """Delete old shards, and what was deleted before but written by a server since.

    For a scheduler, where the servers' own traffic_log.retention_days is null.

        redraft-train traffic expire --traffic s3://bucket/traffic --days 30

    Exit status: 0 done; 1 some of it could not be done, run it again; 2 wrong usage.
    """
    with clean_errors():
        from redraft.traffic.retention import apply_retention
        from redraft.traffic.sweep import sweep

        with _usable(log):
            expired = apply_retention(log, days * _DAY_S, None, time.time())
        typer.echo(
            f"deleted {len(expired.deleted_shards):,} shards older than {days:g} days; "
            f"{expired.remaining_bytes / 1e6:,.1f} MB are left"
        )
        for path in expired.failed:
            say(f"not deleted: {path}")
        with _progress() as on_shard:
            report = sweep(log, on_shard=on_shard)
        if report.erased or report.failed:
            _show(report, "deleted")
        if expired.failed or report.failed:
            raise typer.Exit(Exit.ERROR)


@traffic.command()
def stats(log: LogOption) -> None:
    """Say what is in the log: records by tenant, how old, how large, and what cannot be read.

    redraft-train traffic stats --traffic traffic
    """
    with clean_errors():
        from redraft.traffic.stats import log_stats

        with _progress() as on_shard, _usable(log):
            found = log_stats(log, on_shard=on_shard)
        table = Table(title=f"{found.shards:,} shards, {found.num_bytes / 1e6:,.1f} MB")
        table.add_column("tenant")
        table.add_column("records", justify="right")
        for name, records in found.tenants.most_common():
            table.add_row(name or "(none)", f"{records:,}")
        out.print(table)
        if found.tenants:
            say(f"finished {_date(found.oldest_unix_s)} to {_date(found.newest_unix_s)}")
        if found.erased:
            say(f"{found.erased:,} of them are to go: run `redraft-train traffic expire`")
        _show_others(found.unfinished, found.foreign)
        if found.unreadable:
            say(f"{found.unreadable:,} shards could not be read")


def _time(text: str | None) -> float:
    """Unix seconds of a date or time; without a zone it is UTC. Raises ConfigError."""
    if text is None:
        return time.time()
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"--before {text!r}: expected a date such as 2026-11-24 or 2026-11-24T13:30") from None
    seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if seconds > time.time():
        raise ConfigError(f"--before {text!r} lies in the future, and what is not there yet cannot be deleted")
    return seconds


def _date(unix_s: float) -> str:
    return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d %H:%M}"


@contextmanager
def _usable(log: str) -> Iterator[None]:
    """Raises ConfigError for what is no log: a typing error must not look like a log without such records."""
    from redraft.object_store import is_local
    from redraft.traffic.layout import open_root

    try:
        filesystem, root = open_root(log)
        if is_local(filesystem) and not Path(root).is_dir():
            raise ConfigError(f"--traffic {log}: there is no such directory")
        yield
    except (ValueError, ImportError) as error:  # of fsspec, for the URL
        raise ConfigError(f"cannot use --traffic {log} as a traffic log: {error}") from error


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("shards"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("shards", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show(report: SweepReport, verb: str) -> None:
    typer.echo(
        f"{verb} {report.erased:,} of {report.records:,} records in {report.shards:,} shards: "
        f"{report.rewritten:,} shards written anew, {report.deleted:,} deleted"
    )
    _show_others(report.unfinished, report.foreign)
    for path, reason in report.failed.items():
        say(f"may still hold records of it ({reason}): {path}")


def _show_others(unfinished: int, foreign: int) -> None:
    if unfinished:
        say(f"{unfinished:,} temporary files: being written, or left by a crash and deleted an hour later")
    if foreign:
        say(f"{foreign:,} files are not of the log; they were not searched")


def _erase_copies(directory: Path, log: str) -> bool:
    """Take what is on record out of a work directory; False if a trainer is at work in it."""
    from redraft.traffic.erasure import erasures_of
    from redraft_training.cycle_state import WorkDirBusy, Workspace

    if not directory.is_dir():
        raise ConfigError(f"--work-dir {directory} is no directory")
    workspace = Workspace(directory)
    try:
        with workspace.locked():
            gone = workspace.erase(erasures_of(log))
    except WorkDirBusy:
        say(f"{directory}: a cycle is at work in it, and forgets at its next start; or run this again")
        return False
    typer.echo(
        f"{directory}: {gone.replay:,} examples left the replay memory, {gone.cycle:,} the cycle under way, "
        f"{gone.by_hand:,} the data set"
    )
    return True
