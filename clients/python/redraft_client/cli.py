"""The command `redraft`: talk to a redraft server from a terminal."""

import dataclasses
import json
from typing import Annotated

import typer
from rich.table import Table

from redraft_client.cli_chat import chat_command
from redraft_client.cli_drafts import drafts_app
from redraft_client.cli_keys import keys_app
from redraft_client.cli_stats import stats_command
from redraft_client.cli_support import connected, out_console, write
from redraft_client.client import Client
from redraft_client.types import GenerateParams, GenerationResult, Message, Prompt

app = typer.Typer(
    name="redraft",
    help="Talk to a redraft server.\n\nExit codes: 0 done; 1 fault of the server; 2 wrong usage or refused "
    "request; 3 server not reachable or full; 4 deadline passed; 5 not allowed; 130 interrupted. "
    "The API key is read from the environment variable REDRAFT_API_KEY.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("chat")(chat_command)
app.command("stats")(stats_command)
app.add_typer(drafts_app, name="drafts")
app.add_typer(keys_app, name="keys")


@app.command()
@connected
def generate(
    client: Client,
    prompt: Annotated[str, typer.Argument(help="Text to answer, or with --raw to continue")],
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens to generate")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy; default 1")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus mass, more than 0, at most 1")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Keep the k most probable tokens; 0 is off")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Same seed, same text, whatever the draft")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the completion; may be given several times")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat/--raw", help="Use the model's chat template, or the plain text")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole result as JSON at the end")] = False,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print text while it comes")] = True,
    domain: Annotated[str | None, typer.Option(help="What kind of traffic this is, for the traffic log")] = None,
    draft_tokens: Annotated[int | None, typer.Option(min=0, help="Most drafted tokens per verify step")] = None,
    speculation: Annotated[bool, typer.Option("--speculation/--no-speculation", help="Let the draft help")] = True,
) -> None:
    """Generate text for one prompt."""
    source: Prompt = [Message("user", prompt)] if chat else prompt
    params = GenerateParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop_sequences=stop,
        max_draft_tokens=draft_tokens,
        domain=domain,
        speculation=None if speculation else False,
    )
    if as_json:
        write(_to_json(client.generate(source, **params)) + "\n")
    elif stream:
        with client.stream(source, **params) as chunks:
            for chunk in chunks:
                write(chunk.text)
        write("\n")
    else:
        write(client.generate(source, **params).text + "\n")


def _to_json(result: GenerationResult) -> str:
    speculation = result.speculation
    document = dataclasses.asdict(result)
    document["completion"]["speculation"] |= {
        "acceptance_rate": speculation.acceptance_rate,
        "mean_acceptance_length": speculation.mean_acceptance_length,
    }
    return json.dumps(document, ensure_ascii=False, indent=2)


@app.command()
@connected
def models(client: Client) -> None:
    """List the models that the server has loaded."""
    table = Table("model", "revision", "context", "weights", "proposer", "draft tokens", "draft version")
    for model in client.list_models():
        table.add_row(
            model.id,
            model.revision[:12],
            str(model.context_length),
            model.quantization,
            model.proposer,
            str(model.max_draft_tokens),
            model.draft_version or "-",
        )
    out_console().print(table)


if __name__ == "__main__":
    app()
