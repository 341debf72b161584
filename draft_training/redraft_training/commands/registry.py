"""`redraft-train registry`: what an operator may do with a draft registry, whether or not a server is up."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import track
from rich.table import Table

from redraft_training.commands.common import Exit, clean_errors, console, out

if TYPE_CHECKING:
    from redraft.registry.pointer import Current
    from redraft.registry.store import DraftRegistry

registry = typer.Typer(
    name="registry",
    help="Look into a draft registry, hold it at a draft, check its files, delete old drafts.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

UrlOption = Annotated[str, typer.Option("--registry", help="The draft registry: a directory or an fsspec URL.")]


@registry.command("list")
def list_drafts(url: UrlOption) -> None:
    """List the drafts, newest first, and say which one is current and whether that is pinned.

    What servers do with them (share of traffic, realised acceptance) says `redraft drafts list`.

        redraft-train registry list --registry s3://bucket/drafts
    """
    with clean_errors():
        drafts = _open(url)
        current, entries = drafts.current(), drafts.list()
    if not entries:
        typer.echo(f"{drafts.url} holds no drafts")
        return
    table = Table("version", "state", "expected", "created", "parent", "reason")
    for entry in entries:
        manifest, evaluation = entry.manifest, entry.manifest.evaluation
        table.add_row(
            entry.version,
            "current" if current is not None and entry.version == current.version else entry.state.name.lower(),
            "-" if evaluation is None else f"{evaluation.expected_acceptance:.1%}",
            f"{datetime.fromtimestamp(manifest.created_unix_s, UTC):%Y-%m-%d %H:%M:%S} UTC",
            manifest.parent_version or "-",
            entry.reason or "-",
        )
    out.print(table)
    typer.echo(_words(current))


@registry.command()
def pin(
    url: UrlOption, version: Annotated[str | None, typer.Argument(help="Version; default: the current one")] = None
) -> None:
    """Hold the registry at a draft: every server takes it at once, and nothing is tried until `unpin`.

    Training may go on meanwhile: what it publishes is stored, and stays where it is.

        redraft-train registry pin --registry drafts
    """
    with clean_errors():
        typer.echo(_words(_open(url).pin(version)))


@registry.command()
def unpin(url: UrlOption) -> None:
    """Let new drafts go into service again."""
    with clean_errors():
        typer.echo(_words(_open(url).unpin()))


@registry.command()
def reinstate(url: UrlOption, version: Annotated[str, typer.Argument(help="Version of a draft")]) -> None:
    """Take back a roll-back, so that the draft may be activated again: `redraft drafts activate VERSION`."""
    with clean_errors():
        entry = _open(url).reinstate(version)
    typer.echo(f"{entry.version} is {entry.state.name.lower()}")


@registry.command()
def verify(
    url: UrlOption,
    versions: Annotated[list[str] | None, typer.Argument(help="Versions; default: all, the refused ones too")] = None,
) -> None:
    """Read every file of the drafts and compare its SHA-256 with the manifest.

    Exit status: 0 all are whole; 1 one is damaged or missing; 2 wrong usage.
    """
    from redraft.registry.errors import CorruptDraft, DraftNotFound

    damaged = 0
    with clean_errors():
        drafts = _open(url)
        wanted = versions or sorted({*drafts.versions(), *drafts.refused_versions()})
        for version in track(wanted, "drafts", console=console, transient=True):
            try:
                drafts.verify(version)
            except (CorruptDraft, DraftNotFound) as error:
                damaged += 1
                typer.echo(f"{version}: {error}", err=True)
    typer.echo(f"{len(wanted) - damaged} of {len(wanted)} drafts are whole")
    if damaged:
        raise typer.Exit(Exit.ERROR)


@registry.command()
def prune(
    url: UrlOption,
    keep: Annotated[int, typer.Option(min=0, help="How many of the newest published, and as many of the refused.")],
) -> None:
    """Delete old drafts: all but the newest, the current one, the proven one and the one before the current.

    A training cycle does so at its end (setting keep_drafts); this is for a registry that is full now.

        redraft-train registry prune --registry s3://bucket/drafts --keep 20
    """
    with clean_errors():
        deleted = _open(url).prune(keep)
    typer.echo(f"deleted {len(deleted)} drafts{': ' if deleted else ''}{', '.join(sorted(deleted))}")


def _open(url: str) -> DraftRegistry:
    from redraft.registry.store import DraftRegistry

    return DraftRegistry(url)


def _words(current: Current | None) -> str:
    if current is None:
        return "no draft is current"
    moves = "pinned: nothing moves until `redraft-train registry unpin`" if current.pinned else "not pinned"
    return f"current: {current.version} (before: {current.previous or 'none'}), {moves}"
