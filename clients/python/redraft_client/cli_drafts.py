"""`redraft drafts`: see and change which draft serves."""

from typing import Annotated

import typer
from rich.table import Table

from redraft_client.cli_support import EXIT_USAGE, connected, fail, out_console
from redraft_client.client import Client
from redraft_client.types import Draft, DraftSwap

drafts_app = typer.Typer(help="See and change which draft serves.", no_args_is_help=True)

_ExpectedActive = Annotated[str, typer.Option("--if-active", help="Do it only if this version is active now")]


@drafts_app.command("list")
@connected
def list_command(client: Client) -> None:
    """List the drafts, newest first."""
    _print_drafts(client.list_drafts())


@drafts_app.command("show")
@connected
def show_command(
    client: Client,
    version: Annotated[str, typer.Argument(help="Version; default: the active draft")] = "",
) -> None:
    """Show all that is known of one draft."""
    draft = client.get_draft(version)
    table = Table(show_header=False)
    for name, value in _facts(draft).items():
        table.add_row(name, value)
    out_console().print(table)


@drafts_app.command("activate")
@connected
def activate_command(
    client: Client,
    version: Annotated[str, typer.Argument(help="Version to activate")],
    expected_active: _ExpectedActive = "",
) -> None:
    """Let a draft serve all traffic."""
    _print_swap(client.activate_draft(version, expected_active=expected_active))


@drafts_app.command("rollback")
@connected
def rollback_command(client: Client, expected_active: _ExpectedActive = "") -> None:
    """Withdraw the draft being tried, or the active one; what served before serves again."""
    _print_swap(client.rollback_draft(expected_active=expected_active))


@drafts_app.command("split")
@connected
def split_command(
    client: Client,
    shares: Annotated[list[str], typer.Argument(help="VERSION=SHARE, shares 0 to 1 that add up to 1")],
) -> None:
    """Share the traffic between drafts until one is activated, for example: split v7=0.95 v8=0.05."""
    _print_drafts(client.set_traffic_split(dict(_parse_share(share) for share in shares)))


def _parse_share(text: str) -> tuple[str, float]:
    version, _, share = text.rpartition("=")
    try:
        return version, float(share)
    except ValueError:
        fail(f"{text!r} is not VERSION=SHARE", EXIT_USAGE)


def _print_drafts(drafts: tuple[Draft, ...]) -> None:
    table = Table("version", "state", "share", "expected", "realised", "drafted tokens", "created", "reason")
    for draft in drafts:
        facts = _facts(draft)
        table.add_row(
            *(
                facts[key]
                for key in (
                    "version",
                    "state",
                    "share",
                    "expected acceptance",
                    "realised acceptance",
                    "drafted tokens",
                    "created",
                    "reason",
                )
            )
        )
    out_console().print(table)


def _print_swap(swap: DraftSwap) -> None:
    before = swap.previous.version if swap.previous else "none"
    out_console().print(f"active: {swap.active.version or 'none'} (before: {before})")


def _facts(draft: Draft) -> dict[str, str]:
    return {
        "version": draft.version,
        "parent": draft.parent_version or "-",
        "state": draft.state.value,
        "reason": draft.refusal_reason or "-",
        "share": f"{draft.share:.1%}",
        "expected acceptance": _ratio(draft.expected_acceptance),
        "realised acceptance": _ratio(draft.realised_acceptance),
        "drafted tokens": str(draft.draft_tokens),
        "created": f"{draft.create_time:%Y-%m-%d %H:%M:%S} UTC" if draft.create_time else "-",
        "target fingerprint": draft.target_fingerprint,
        "tokenizer fingerprint": draft.tokenizer_fingerprint,
    }


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
