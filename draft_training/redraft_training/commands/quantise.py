"""`redraft-train quantise`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from redraft_training.commands.common import (
    ConfigOption,
    SetOption,
    TargetOption,
    TrafficOption,
    clean_errors,
    say,
    settings_from,
)


def quantise(
    draft: Annotated[str, typer.Option(help="The draft to round: a directory or a Hugging Face id.")],
    output: Annotated[Path, typer.Option(help="Directory to write; must be new or empty.")],
    config: ConfigOption = None,
    target: TargetOption = None,
    traffic: TrafficOption = None,
    set_: SetOption = None,
) -> None:
    """Round a trained draft to int8, calibrated on logged traffic, without training it further.

    The other way is to round while training, which heals what rounding costs: `distill --set student.quantise=int8`.
    Evaluate the result before you publish it.

        redraft-train quantise --draft runs/1/draft --traffic traffic --output runs/1-int8
    """
    with clean_errors():
        settings = settings_from(config, set_, None, target=target, traffic=traffic)
        from redraft.models.ref import ModelRef
        from redraft_training.cycle_data import read_traffic
        from redraft_training.cycle_models import Models
        from redraft_training.student.quantise import quantise_checkpoint

        dataset = read_traffic(settings, Models(settings).identity)
        dataset.require(training=1)
        texts = [example.token_ids for example in dataset.training]
        quantise_checkpoint(ModelRef.parse(draft), output, texts, progress=say)
        say(f"{output}: int8, calibrated on {len(texts)} sequences")
