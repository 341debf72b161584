"""What a cycle came to, readable at a glance: one PNG and one HTML file that needs nothing beside it.

Both hold figures, versions and settings, never text of the traffic.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from redraft.files import write_file
from redraft_training.distill.metrics import MetricsRow
from redraft_training.evaluate import charts
from redraft_training.evaluate.charts import Panel
from redraft_training.evaluate.comparison import Comparison
from redraft_training.evaluate.replay import ReplayResult

REPORT_PNG, REPORT_HTML = "report.png", "report.html"
_TEMPLATE = "report.html.jinja"
_MAX_VALUE = 500  # characters of one provenance entry
_MAX_ENTRIES = 300


@dataclass(frozen=True)
class Report:
    """Attributes:
    published: the gate's decision; None if no gate was asked.
    reasons: the gate's, one sentence each.
    training: rows of the trainer's `metrics.csv`.
    replay_old, replay_new: realised acceptance, if it was measured.
    provenance: what the manifest keeps as `training`.
    """

    comparison: Comparison
    published: bool | None = None
    reasons: tuple[str, ...] = ()
    training: tuple[MetricsRow, ...] = ()
    replay_old: ReplayResult | None = None
    replay_new: ReplayResult | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)


def write_report(directory: Path, report: Report) -> tuple[Path, Path]:
    """Write `report.png` and `report.html` into `directory` (made if missing); return both paths. A file that is there
    already is replaced in one step."""
    directory.mkdir(parents=True, exist_ok=True)
    png, html = directory / REPORT_PNG, directory / REPORT_HTML
    named = _panels(report)
    write_file(png, charts.overview([panel for _, panel in named], _headline(report)))
    write_file(html, render_html(report).encode("utf-8"))
    return png, html


def render_html(report: Report) -> str:
    """The page, its pictures inlined."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["alpha"] = lambda value: f"{value:.3f}"
    environment.filters["signed"] = lambda value: f"{value:+.3f}"
    template = environment.from_string(files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    pictures = [(name, base64.b64encode(charts.single(panel)).decode("ascii")) for name, panel in _panels(report)]
    return template.render(
        report=report,
        comparison=report.comparison,
        pictures=pictures,
        provenance=list(_flat(report.provenance))[:_MAX_ENTRIES],
    )


def _headline(report: Report) -> str:
    comparison, gain = report.comparison, report.comparison.overall
    decision = {True: ", passed the gate", False: ", refused by the gate", None: ""}[report.published]
    return (
        f"Draft {comparison.candidate_version} against {comparison.serving_version or 'no draft'}{decision}\n"
        f"expected acceptance {gain.alpha_old:.3f} to {gain.alpha_new:.3f} "
        f"(gain {gain.gain:+.3f}, {comparison.confidence:.0%} interval {gain.low:+.3f} to {gain.high:+.3f})"
    )


def _panels(report: Report) -> list[tuple[str, Panel]]:
    """What there is to draw, with a description each; at least the comparison's own three panels."""
    comparison, rows = report.comparison, report.training
    panels: list[tuple[str, Panel]] = [
        ("Expected acceptance by domain, before and after", lambda axes: charts.alpha_by_domain(axes, comparison)),
        (
            "Expected acceptance by output position, before and after",
            lambda axes: charts.alpha_by_position(axes, comparison),
        ),
    ]
    new = report.replay_new
    if new is not None:
        panels.append(
            (
                "Histogram of accepted tokens per draft step",
                lambda axes: charts.acceptance_histogram(axes, report.replay_old, new),
            )
        )
    panels.append(("Prediction by number of drafted tokens", lambda axes: charts.speedup_by_k(axes, comparison)))
    if rows:
        panels.append(("Training loss by tokens", lambda axes: charts.loss_curve(axes, rows)))
        panels.append(("Expected acceptance during training", lambda axes: charts.alpha_curve(axes, rows)))
    return panels


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows of (dotted name, value)."""
    if isinstance(value, Mapping) and value:
        return [row for key, inner in value.items() for row in _flat(inner, f"{prefix}.{key}" if prefix else str(key))]
    if not prefix:
        return []
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return [(prefix, text if len(text) <= _MAX_VALUE else text[:_MAX_VALUE] + "…")]
