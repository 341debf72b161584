"""`redraft-train init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from redraft.errors import ConfigError
from redraft_training.commands.common import clean_errors


def init(
    target: Annotated[str, typer.Option(help="The target: `demo`, a Hugging Face id, a directory or a .gguf file.")],
    output: Annotated[Path, typer.Option(help="Directory to write; must be new or empty.")],
    layers: Annotated[
        str | None, typer.Option(help="Target layers to keep: 0-based, ascending, comma-separated.")
    ] = None,
    num_layers: Annotated[
        int | None, typer.Option(help="How many to keep instead, evenly spaced from first to last.")
    ] = None,
) -> None:
    """Make a first draft by keeping only some of the target's layers.

    The draft keeps the target's embedding, head and tokenizer. It is the starting point of distillation: until
    it is trained, few of its proposals are accepted.

    Example, 4 of the demo model's 30 layers:

        redraft-train init --target demo --layers 0,10,20,29 --output drafts/first

    or, evenly spaced:

        redraft-train init --target demo --num-layers 4 --output drafts/first
    """
    with clean_errors():
        if (layers is None) == (num_layers is None):
            raise ConfigError("give either --layers (such as 0,10,20,29) or --num-layers (such as 4)")
        chosen = None if layers is None else _parse_layers(layers)
        from redraft.models.ref import ModelRef
        from redraft_training.student.prune import init_draft

        kept = init_draft(ModelRef.parse(target), output, layers=chosen, num_layers=num_layers)
    typer.echo(f"{output}: a draft of layers {', '.join(map(str, kept))}")


def _parse_layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--layers {text!r}: expected numbers such as 0,10,20,29") from None
