"""`redraft keys`: make API keys for a server's keys file (docs/deploy.md). Nothing is sent anywhere."""

import hashlib
import json
import re
import secrets
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Annotated

import typer

from redraft_client.cli_support import EXIT_USAGE, fail

keys_app = typer.Typer(help="Make API keys for a server's keys file.", no_args_is_help=True)

KEY_PREFIX = "redraft_"
"""By which scanners for leaked secrets can tell what it is."""


class Role(Enum):
    """user: may generate, and read what there is. admin: may also change which draft serves."""

    USER = "user"
    ADMIN = "admin"


@keys_app.command("new")
def new_command(
    tenant: Annotated[str, typer.Option(help="Whose key it is: 1 to 64 characters out of A-Z a-z 0-9 . _ -")],
    role: Annotated[Role, typer.Option(help="admin may also change which draft serves")] = Role.USER,
    days: Annotated[int | None, typer.Option(min=1, max=36500, help="Days until it expires; default: never")] = None,
) -> None:
    """Make a key. It is shown once, on stderr; its entry for the keys file goes to stdout."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", tenant):
        fail("--tenant must be 1 to 64 characters out of A-Z a-z 0-9 . _ -", EXIT_USAGE)
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    entry = {"sha256": hashlib.sha256(key.encode()).hexdigest(), "role": role.value}
    if days is not None:
        entry["expires"] = f"{datetime.now(UTC) + timedelta(days=days):%Y-%m-%dT%H:%M:%SZ}"
    typer.echo(f"the key, shown only now (REDRAFT_API_KEY for clients):\n{key}", err=True)
    typer.echo(f"tenants:\n  {json.dumps(tenant)}:\n    keys:\n      - {json.dumps(entry)}")
