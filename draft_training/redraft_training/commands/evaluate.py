"""`redraft-train evaluate`, `report` and `publish`."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from redraft.errors import ConfigError
from redraft_training.commands.common import (
    ConfigOption,
    Exit,
    RegistryOption,
    SetOption,
    TargetOption,
    TrafficOption,
    clean_errors,
    out,
    say,
    settings_from,
)
from redraft_training.commands.cycle import comparison_table


def evaluate(
    draft: Annotated[str, typer.Option(help="The draft to judge: a directory or a model's name.")],
    output: Annotated[Path, typer.Option(help="Directory for comparison.json, report.html and report.png.")],
    against: Annotated[
        str | None, typer.Option(help="The draft to compare with: a directory or a model's name.")
    ] = None,
    registry: Annotated[
        str | None, typer.Option(help="Compare with the current draft of this registry instead, as publish wants it.")
    ] = None,
    config: ConfigOption = None,
    target: TargetOption = None,
    traffic: TrafficOption = None,
    replay: Annotated[
        int, typer.Option(min=0, help="Also generate from so many held-out prompts, as the server would.")
    ] = 0,
    set_: SetOption = None,
) -> None:
    """Measure a draft on the held-out traffic: expected acceptance by domain and position, with intervals.

    Compares with --against, with the current draft of --registry, or else with no speculation at all. With --replay the
    prompts are decoded again by the server's own step, for realised acceptance and predicted speed.

        redraft-train evaluate --draft runs/1/draft --traffic traffic --registry drafts --output runs/1/report

        redraft-train publish --draft runs/1/draft --comparison runs/1/report/comparison.json --registry drafts
    """
    with clean_errors():
        if against is not None and registry is not None:
            raise ConfigError("give either --against or --registry")
        settings = settings_from(config, set_, None, target=target, traffic=traffic)
        from redraft.models.ref import ModelRef
        from redraft.registry.store import DraftRegistry
        from redraft_training.cycle_models import Models
        from redraft_training.evaluation_run import current_draft, draft_name, judge

        models = Models(settings)
        with TemporaryDirectory(prefix="redraft-") as fetched:
            baseline = None
            if against is not None:
                baseline = draft_name(ModelRef.parse(against)), ModelRef.parse(against)
            elif registry is not None:
                baseline = current_draft(DraftRegistry(registry), models.identity, Path(fetched))
            comparison = judge(settings, models, ModelRef.parse(draft), baseline, output, num_replayed=replay)
        out.print(comparison_table(comparison))
        say(f"gap recovered: {comparison.gap_recovered:.1%}")
        best = comparison.best_new
        if best is not None:
            say(
                f"best k {best.num_speculative_tokens}: predicted mean acceptance length "
                f"{best.mean_acceptance_length:.2f}, predicted speed-up {best.speedup:.2f}"
            )
        elif replay:
            say("predicted: no faster than plain decoding at any k, on this machine")
        say(f"report: {output / 'report.html'}")


def report(
    directory: Annotated[Path, typer.Argument(help="Of a cycle (WORK_DIR/last) or an evaluation.")],
    output: Annotated[Path | None, typer.Option(help="Where to write. Default: the same directory.")] = None,
) -> None:
    """Draw report.html and report.png again from a cycle's or an evaluation's files.

    redraft-train report retraining/last --output report
    """
    with clean_errors():
        from redraft_training.distill.metrics import METRICS_FILE, read_metrics
        from redraft_training.evaluate.comparison import Comparison
        from redraft_training.evaluate.report import Report, write_report

        path = directory / "comparison.json"
        if not path.is_file():
            raise ConfigError(f"{directory} has no comparison.json: give a cycle's directory, or run evaluate")
        metrics = directory / "distill" / METRICS_FILE
        gate = _decision(directory / "decision.json")
        png, html = write_report(
            output or directory,
            Report(
                comparison=Comparison.from_json(path.read_text(encoding="utf-8")),
                published=gate.get("publish"),
                reasons=tuple(gate.get("reasons", ())),
                training=read_metrics(metrics),
            ),
        )
        say(f"{html}, {png}")


def _decision(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # an evaluation has none
    return content if isinstance(content, dict) else {}


def publish(
    draft: Annotated[Path, typer.Option(help="Directory of the draft.")],
    comparison: Annotated[Path, typer.Option(help="comparison.json of its evaluation against the current draft.")],
    config: ConfigOption = None,
    target: TargetOption = None,
    registry: RegistryOption = None,
    set_: SetOption = None,
) -> None:
    """Put a draft that was trained and evaluated by hand through the gate, and publish it if it passes.

    The comparison must be with the draft that is current: `redraft-train evaluate --registry` makes it.

        redraft-train publish --draft runs/1/draft --comparison runs/1/report/comparison.json --registry drafts

    Exit status: 0 published, 3 refused by the gate (kept in the registry with the reason).
    """
    with clean_errors():
        settings = settings_from(config, set_, None, target=target, registry=registry)
        from redraft_training.evaluation_run import publish_by_hand

        publication = publish_by_hand(settings, draft, comparison)
        typer.echo(f"{publication.outcome.value} {publication.manifest.version}: {publication.reason}")
        if publication.not_current_because:
            say(f"not current: {publication.not_current_because}")
        if publication.outcome.value == "refused":
            raise typer.Exit(Exit.REFUSED)
