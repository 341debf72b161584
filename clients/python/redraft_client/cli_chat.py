"""`redraft chat`: a conversation in the terminal."""

from collections.abc import Callable
from typing import Annotated

import typer

from redraft_client import errors
from redraft_client.cli_support import connected, describe, write
from redraft_client.client import Client
from redraft_client.types import GenerateParams, GenerationResult, Message

_HELP = "/quit ends, /reset forgets the conversation, /stats shows figures of the last answer."


@connected
def chat_command(
    client: Client,
    system: Annotated[str | None, typer.Option(help="System message")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens per answer")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy; default 1")] = None,
) -> None:
    """Chat with the model; Ctrl-C stops an answer, Ctrl-D or /quit ends."""
    typer.echo(_HELP)
    params = GenerateParams(max_new_tokens=max_new_tokens, temperature=temperature)
    Conversation(client, system, params).run(lambda: input("> "))


class Conversation:
    """The loop: reads lines, keeps the history, streams answers."""

    def __init__(self, client: Client, system: str | None, params: GenerateParams) -> None:
        self._client = client
        self._params = params
        self._opening = [Message("system", system)] if system else []
        self._history = list(self._opening)
        self._last: GenerationResult | None = None

    def run(self, read_line: Callable[[], str]) -> None:
        """Until /quit or the end of input. An error in one answer does not end the conversation, except when
        the server cannot be reached or refuses the key."""
        while True:
            try:
                line = read_line().strip()
            except (EOFError, KeyboardInterrupt):
                write("\n")
                return
            if line == "/quit":
                return
            if line == "/reset":
                self._history = list(self._opening)
                typer.echo("forgotten")
            elif line == "/stats":
                typer.echo(_stats_line(self._last))
            elif line.startswith("/"):
                typer.echo(_HELP)
            elif line:
                self._answer(line)

    def _answer(self, line: str) -> None:
        """Streams one answer; keeps it in the history only if it is complete."""
        turn = Message("user", line)
        try:
            with self._client.stream([*self._history, turn], **self._params) as stream:
                for chunk in stream:
                    write(chunk.text)
                self._last = stream.result
        except KeyboardInterrupt:
            write("\n(stopped)\n")
            return
        except (errors.UnavailableError, errors.UnauthenticatedError, errors.PermissionDeniedError):
            raise
        except errors.RedraftClientError as error:
            typer.echo(f"error: {describe(error)}", err=True)
            return
        write("\n")
        self._history += [turn, Message("assistant", self._last.text)]


def _stats_line(result: GenerationResult | None) -> str:
    if result is None:
        return "no answer yet"
    stats, timings = result.speculation, result.timings
    rate = "-" if stats.acceptance_rate is None else f"{stats.acceptance_rate:.1%}"
    length = "-" if stats.mean_acceptance_length is None else f"{stats.mean_acceptance_length:.2f}"
    speed = f"{result.usage.completion_tokens / timings.total:.1f}" if timings.total else "-"
    usage = result.usage
    return (
        f"{usage.prompt_tokens} prompt + {usage.completion_tokens} new tokens, {speed} tokens/s, "
        f"first token after {timings.time_to_first_token:.3f} s; draft {stats.draft_version or '-'}, "
        f"acceptance rate {rate}, mean acceptance length {length}"
    )
