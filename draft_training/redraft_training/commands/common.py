"""What the commands share: options, exit statuses, and errors as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from redraft.errors import ConfigError, RedraftError

if TYPE_CHECKING:
    from redraft_training.settings import CycleSettings

console = Console(stderr=True)
"""Progress and remarks."""
out = Console(highlight=False)
"""What a command was asked for."""


class Exit(IntEnum):
    """Exit statuses, for schedulers. Only 1 is worth a retry."""

    PUBLISHED = 0
    ERROR = 1
    USAGE = 2
    REFUSED = 3
    NOT_ENOUGH_DATA = 4


ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML file with any of the settings.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="One setting, such as distill.epochs=2; may be repeated."),
]
TargetOption = Annotated[
    str | None, typer.Option(help="The target: `demo` (default), a Hugging Face id, a directory or a .gguf file.")
]
TrafficOption = Annotated[str | None, typer.Option(help="The traffic log: a directory or an fsspec URL.")]
RegistryOption = Annotated[str | None, typer.Option(help="The draft registry: a directory or an fsspec URL.")]
WorkDirOption = Annotated[
    Path | None, typer.Option(help="Local directory for checkpoints, reports and the replay memory.")
]
PresetOption = Annotated[
    str | None,
    typer.Option(help="Objective by name: word_kd, sequence_kd, gkd, distillspec, minillm, fitnets, rkd or lk."),
]


@contextmanager
def clean_errors() -> Iterator[None]:
    """Deliberate errors end the command with one line and their status."""
    try:
        yield
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(Exit.USAGE) from None
    except RedraftError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(Exit.ERROR) from None
    except OSError as error:
        # a full disk, a store that is away: the name of the file says more than a traceback
        typer.echo(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", err=True)
        raise typer.Exit(Exit.ERROR) from None


def say(message: str) -> None:
    """One line of progress."""
    console.print(message, highlight=False, markup=False, soft_wrap=True)


def settings_from(config: Path | None, overrides: list[str] | None, preset: str | None, **given: Any) -> CycleSettings:
    """The cycle's settings from a command's options. `preset` is the objective that overrides then change."""
    from transformers.utils import logging as transformers_logging

    from redraft_training.objectives.presets import preset as objective_of
    from redraft_training.settings import load_settings

    # ours say what is going on
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    objective = None if preset is None else objective_of(preset).model_dump(mode="json", exclude_unset=True)
    return load_settings(config, overrides or [], objective=objective, **given)
