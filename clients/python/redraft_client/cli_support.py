"""What all commands share: connection options, exit codes, one-line errors, output safe for a terminal.

Exit codes: 0 done; 1 fault of the server; 2 wrong usage, or a request that the server refuses as wrong;
3 server not reachable or full; 4 deadline passed; 5 not allowed; 130 interrupted.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Concatenate, NoReturn, ParamSpec

import typer
from rich.console import Console

from redraft_client import errors
from redraft_client.channel import API_KEY_VARIABLE, DEFAULT_ADDRESS, DEFAULT_TIMEOUT, Tls
from redraft_client.client import Client

EXIT_SERVER_ERROR = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 3
EXIT_DEADLINE = 4
EXIT_NOT_ALLOWED = 5
EXIT_INTERRUPTED = 130

_EXIT_CODES: tuple[tuple[type[errors.RedraftClientError], int, str], ...] = (
    (errors.InvalidArgumentError, EXIT_USAGE, ""),
    (errors.NotFoundError, EXIT_USAGE, "see `redraft models` or `redraft drafts list`"),
    (errors.FailedPreconditionError, EXIT_USAGE, ""),
    (errors.AlreadyExistsError, EXIT_USAGE, ""),
    (errors.AbortedError, EXIT_USAGE, "look at `redraft drafts list` and try again"),
    (errors.UnimplementedError, EXIT_USAGE, "this server does not have the feature"),
    (
        errors.UnavailableError,
        EXIT_UNAVAILABLE,
        "is the server running? check --address, REDRAFT_ADDRESS and the TLS options",
    ),
    (errors.ResourceExhaustedError, EXIT_UNAVAILABLE, "try again later"),
    (errors.DeadlineExceededError, EXIT_DEADLINE, "raise --timeout or ask for fewer tokens"),
    (errors.UnauthenticatedError, EXIT_NOT_ALLOWED, f"set {API_KEY_VARIABLE} to a valid key"),
    (errors.PermissionDeniedError, EXIT_NOT_ALLOWED, f"use a key with this right in {API_KEY_VARIABLE}"),
    (errors.RedraftClientError, EXIT_SERVER_ERROR, "see the server's log"),
)

_P = ParamSpec("_P")


def out_console() -> Console:
    """Console on the present stdout (made anew, so that a redirected stdout is honoured)."""
    return Console(highlight=False, markup=False, emoji=False)


def fail(message: str, code: int) -> NoReturn:
    """Prints one line on stderr and ends with the exit code."""
    typer.echo(f"error: {safe_text(message)}", err=True)
    raise typer.Exit(code)


def fail_with(error: errors.RedraftClientError) -> NoReturn:
    """Ends with the line and exit code of a client error."""
    code, advice = next((c, a) for kind, c, a in _EXIT_CODES if isinstance(error, kind))
    fail(describe(error, advice), code)


def describe(error: errors.RedraftClientError, advice: str = "") -> str:
    """One line: what went wrong, the fields at fault, and what to do."""
    parts = [" ".join(error.message.split())]
    if isinstance(error, errors.InvalidArgumentError):
        parts += [f"{v.field}: {v.description}" for v in error.field_violations if v.description not in error.message]
    elif isinstance(error, errors.FailedPreconditionError):
        parts += [text for text in error.violations if text not in error.message]
    elif isinstance(error, errors.ResourceExhaustedError | errors.UnavailableError) and error.retry_after:
        advice = f"{advice}; the server asks to wait {error.retry_after:g} s"
    line = "; ".join(parts)
    return f"{line} ({advice})" if advice else line


_CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def safe_text(text: str) -> str:
    """The text without control characters: a model's output must not steer the reader's terminal."""
    return text.translate(_CONTROL)


def write(text: str) -> None:
    """Writes text as it arrives: cleaned for a terminal, untouched into a pipe or file."""
    sys.stdout.write(safe_text(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _connection_options(
    address: Annotated[
        str, typer.Option("--address", "-a", envvar="REDRAFT_ADDRESS", help="host:port of the server")
    ] = DEFAULT_ADDRESS,
    timeout: Annotated[float, typer.Option(min=0.001, help="Deadline of the call in seconds")] = DEFAULT_TIMEOUT,
    tenant: Annotated[str | None, typer.Option(envvar="REDRAFT_TENANT", help="Whom the calls are made for")] = None,
    tls: Annotated[bool, typer.Option("--tls", help="Connect with TLS")] = False,
    tls_ca: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="PEM file of the CA to trust; implies --tls"),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="PEM file of the client's certificate")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="PEM file of the client's key")
    ] = None,
    tls_server_name: Annotated[
        str | None, typer.Option(help="Name in the server's certificate, if it is not the address's (port-forward)")
    ] = None,
) -> Client:
    return Client(
        address,
        tls=_tls(tls, tls_ca, tls_cert, tls_key, tls_server_name),
        # The API key comes only from the environment: a flag would show it in the process list.
        tenant=tenant,
        timeout=timeout,
    )


def _tls(tls: bool, ca: Path | None, cert: Path | None, key: Path | None, server_name: str | None) -> Tls | None:
    if not (tls or ca or cert or key or server_name):
        return None
    try:
        return Tls(
            root_certificates=ca.read_bytes() if ca else None,
            certificate_chain=cert.read_bytes() if cert else None,
            private_key=key.read_bytes() if key else None,
            server_name=server_name,
        )
    except ValueError:
        fail("--tls-cert and --tls-key go together", EXIT_USAGE)


def connected(command: Callable[Concatenate[Client, _P], None]) -> Callable[..., None]:
    """Gives a command the connection options and, in their place, a Client as first argument; turns client
    errors into one line and an exit code."""
    options = inspect.signature(_connection_options, eval_str=True).parameters
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

    @functools.wraps(command)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> None:
        connection = {name: kwargs.pop(name) for name in options}
        with handled_errors(), _connection_options(**connection) as client:  # type: ignore[arg-type]
            command(client, *args, **kwargs)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *options.values())]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by typer
    return wrapper


class handled_errors:  # noqa: N801  # used like a function
    """Context manager that ends the command with the right line and exit code."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, errors.RedraftClientError):
            fail_with(error)
        if isinstance(error, KeyboardInterrupt):
            raise typer.Exit(EXIT_INTERRUPTED)
