"""The capacity sweep: which size of draft pays on this machine?

Every candidate is pruned, distilled on the same data for the same number of tokens, scored on the same held-out
traffic, and timed beside the target. A deeper draft or a larger vocabulary is accepted more often and costs more a
step; the predicted speed-up weighs the two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from redraft.errors import ConfigError
from redraft.files import write_file
from redraft.models.runner import ModelRunner
from redraft_training.cycle_data import read_traffic
from redraft_training.cycle_models import Models, directory_ref
from redraft_training.dataset.read import Dataset
from redraft_training.evaluate.charts import png
from redraft_training.evaluate.speedup import CostProfile, measure_profile
from redraft_training.evaluation_run import compared
from redraft_training.settings import CycleSettings
from redraft_training.training_run import train


@dataclass(frozen=True, slots=True)
class Capacity:
    """One size: layers, MLP channels (None: all) and output vocabulary (None: all)."""

    num_layers: int
    intermediate_size: int | None
    vocab_size: int | None

    @property
    def name(self) -> str:
        width = "" if self.intermediate_size is None else f"-w{self.intermediate_size}"
        return f"l{self.num_layers}{width}-v{self.vocab_size or 'all'}"


@dataclass(frozen=True, slots=True)
class Point:
    """What a size comes to. `draft_cost`: a draft pass in plain target passes; `best_k` maximises the speed-up, which
    is below 1 where no draft is faster."""

    capacity: Capacity
    num_parameters: int
    alpha: float
    draft_cost: float
    best_k: int
    mean_acceptance_length: float
    speedup: float


def sweep(
    settings: CycleSettings,
    capacities: Sequence[Capacity],
    output: Path,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> list[Point]:
    """Train and measure every size; write `sweep.json` and `sweep.png` to `output`.

    What is measured already is kept, so a sweep that was killed goes on; with other settings it needs another
    directory. Raises ConfigError for one that holds another sweep, and what `train` raises.
    """
    _claim(output, settings)
    models = Models(settings)
    dataset = read_traffic(settings, models.identity)
    dataset.require(training=1, held_out=1)
    target = models.target()
    runner = models.runner(target)
    points = []
    for capacity in capacities:
        directory = output / capacity.name
        path = directory / "point.json"
        if path.is_file():
            points.append(_read_point(path))
            continue
        say(f"size {len(points) + 1} of {len(capacities)}: {capacity.name}")
        point = _measured(settings, capacity, dataset, directory, target, runner)
        write_file(path, json.dumps(asdict(point), indent=2).encode())
        points.append(point)
    write_file(output / "sweep.json", (json.dumps([asdict(point) for point in points], indent=2) + "\n").encode())
    _plot(points, output / "sweep.png")
    return points


def _measured(
    settings: CycleSettings, capacity: Capacity, dataset: Dataset, directory: Path, target: Any, runner: ModelRunner
) -> Point:
    student = settings.student.model_copy(
        update={
            "layers": None,
            "num_layers": capacity.num_layers,
            "intermediate_size": capacity.intermediate_size,
            "vocab_size": capacity.vocab_size,
        }
    )
    models = Models(settings.model_copy(update={"student": student, "draft": None}))
    result = train(settings, models, dataset, directory)
    ref = directory_ref(result.draft)
    draft = models.draft_runner(ref, target)
    profile: CostProfile = measure_profile(runner, draft)
    comparison = compared(models, dataset, (capacity.name, ref), None, profile=profile)
    # below 1 too: by how much a size does not pay is what the sweep is asked
    best = max(comparison.speedups_new, key=lambda entry: entry.speedup or 0.0)
    return Point(
        capacity,
        models.num_parameters(result.draft),
        comparison.overall.alpha_new,
        profile.draft_cost(),
        best.num_speculative_tokens,
        best.mean_acceptance_length,
        best.speedup or 0.0,
    )


def _claim(output: Path, settings: CycleSettings) -> None:
    """Note in `output` what is measured there. Points of different settings would say nothing beside each other."""
    values = settings.model_dump(mode="json", exclude={"work_dir", "registry", "gate"})
    path = output / "settings.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != values:
        raise ConfigError(f"{output} holds a sweep with other settings: choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(values, indent=2).encode())


def _read_point(path: Path) -> Point:
    content = json.loads(path.read_text(encoding="utf-8"))
    return Point(**{**content, "capacity": Capacity(**content["capacity"])})


def _plot(points: Sequence[Point], path: Path) -> None:
    """α and predicted speed-up against what a draft pass costs, a dot per size."""
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
        for axes, name, values in zip(
            figure.subplots(1, 2),
            ("expected acceptance", "predicted speed-up over plain decoding"),
            ([point.alpha for point in points], [point.speedup for point in points]),
            strict=True,
        ):
            axes.scatter([point.draft_cost for point in points], values)
            for point, value in zip(points, values, strict=True):
                axes.annotate(point.capacity.name, (point.draft_cost, value), textcoords="offset points", xytext=(4, 4))
            axes.set_xlabel("draft pass, in target passes")
            axes.set_ylabel(name)
            axes.grid(alpha=0.3)
        write_file(path, png(figure))
