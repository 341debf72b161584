"""`redraft-train distill`: train a draft, without a registry."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from redraft.errors import ConfigError
from redraft.files import write_file
from redraft_training.commands.common import (
    ConfigOption,
    PresetOption,
    SetOption,
    TargetOption,
    TrafficOption,
    clean_errors,
    say,
    settings_from,
)

if TYPE_CHECKING:
    from redraft_training.cycle_models import Models
    from redraft_training.dataset.read import Dataset
    from redraft_training.settings import CycleSettings


def distill(
    output: Annotated[Path, typer.Option(help="Directory for checkpoints, metrics.csv and, in draft/, the draft.")],
    draft: Annotated[str | None, typer.Option(help="Draft to begin from. Default: prune the target.")] = None,
    config: ConfigOption = None,
    target: TargetOption = None,
    traffic: TrafficOption = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="Learn from text instead: JSON lines with prompt and response, or chat messages."),
    ] = None,
    synthesise: Annotated[
        int | None, typer.Option(min=1, help="Without traffic: let the target write so many prompts and answer them.")
    ] = None,
    preset: PresetOption = None,
    set_: SetOption = None,
) -> None:
    """Train a draft and write it to a directory, without gate and registry.

    Killed, it goes on from its last checkpoint when run again with the same arguments; what it learns from is kept in
    OUTPUT/dataset. Learns from one source:

        redraft-train distill --traffic traffic --output runs/1

        redraft-train distill --synthesise 500 --output runs/cold-start

        redraft-train distill --texts reasoning.jsonl --preset sequence_kd --output runs/2

    Prune, distil and quantise to int8 in one:

        redraft-train distill --traffic traffic --set student.num_layers=4 --set student.quantise=int8 --output runs/3
    """
    with clean_errors():
        if sum(source is not None for source in (traffic, texts, synthesise)) > 1:
            raise ConfigError("give one source to learn from: --traffic, --texts or --synthesise")
        settings = settings_from(config, set_, preset, target=target, traffic=traffic, draft=draft, work_dir=output)
        from redraft_training.cycle_models import Models
        from redraft_training.training_run import train

        models = Models(settings)
        result = train(settings, models, _kept_dataset(settings, models, texts, synthesise, output), output)
        say(
            f"{result.draft}: {result.steps} steps, {result.tokens:,} tokens, {result.seconds:.0f} s, "
            f"held-out expected acceptance {result.best_alpha:.3f} ({result.stopped})"
        )


def _kept_dataset(
    settings: CycleSettings, models: Models, texts: Path | None, synthesise: int | None, output: Path
) -> Dataset:
    """The data set of the run that was begun in `output`, else a new one. Raises ConfigError if that had another."""
    from redraft_training.cycle_data import forget_erased
    from redraft_training.cycle_state import Workspace
    from redraft_training.dataset.store import load_dataset, save_dataset

    source = {
        "traffic": settings.traffic if texts is None and synthesise is None else None,
        "texts": None if texts is None else str(texts),
        "synthesise": synthesise,
        "data": settings.data.model_dump(mode="json"),
    }
    directory, about = output / "dataset", output / "source.json"
    if directory.is_dir():
        if json.loads(about.read_text(encoding="utf-8")) != source:
            raise ConfigError(f"{output} was begun with other data or another selection: choose another --output")
        if source["traffic"] is not None:
            gone = forget_erased(settings, Workspace(output), say)
            if gone.by_hand:
                raise ConfigError(
                    f"{gone.by_hand} of the examples that {output} was begun with were erased from the log since: "
                    "choose another --output"
                )
        return load_dataset(directory, models.identity)
    dataset = _dataset(settings, models, texts, synthesise)
    output.mkdir(parents=True, exist_ok=True)
    write_file(about, json.dumps(source).encode())
    save_dataset(directory, dataset, models.identity)
    return dataset


def _dataset(settings: CycleSettings, models: Models, texts: Path | None, synthesise: int | None) -> Dataset:
    from redraft.sampling.params import SamplingParams
    from redraft_training.cycle_data import read_traffic
    from redraft_training.dataset.read import split
    from redraft_training.dataset.synthesise import SynthesisSettings
    from redraft_training.dataset.synthesise import synthesise as let_target_write
    from redraft_training.dataset.texts import read_texts

    if texts is not None:
        examples, report = read_texts(texts, models.tokenizer, SamplingParams(temperature=0.0))
        say(f"{len(examples)} of {report.lines} lines are of use")
    elif synthesise is not None:
        made = let_target_write(
            models.target_runner(), models.tokenizer, SynthesisSettings(synthesise), created_unix_s=time.time()
        )
        say(f"{len(made.examples)} of {made.num_tried} prompts that the target wrote are of use")
        examples = list(made.examples)
    else:
        dataset = read_traffic(settings, models.identity)
        dataset.require(training=1)
        return dataset
    dataset = split(examples, settings.data.held_out_share)
    dataset.require(training=1)
    return dataset
