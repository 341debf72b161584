"""The demo's picture: acceptance and speed by stage, a line per domain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from scripts.demo_client import Measurement

_COLOURS = {"sql": "#0072b2", "support": "#d55e00"}  # told apart by colour-blind eyes, too


def plot(rows: Sequence[Measurement], path: Path) -> None:
    """Write a PNG with two panels."""
    stages = list(dict.fromkeys(row.stage for row in rows))
    figure = Figure(figsize=(10, 4), layout="constrained")
    acceptance, speed = figure.subplots(1, 2)
    for domain in dict.fromkeys(row.domain for row in rows):
        own = [row for row in rows if row.domain == domain]
        x = [stages.index(row.stage) for row in own]
        style = {"marker": "o", "color": _COLOURS[domain], "label": domain}
        acceptance.plot(x, [row.acceptance_rate for row in own], **style)
        speed.plot(x, [row.tokens_per_s / row.tokens_per_s_plain for row in own], **style)
    acceptance.set_title("acceptance rate")
    acceptance.set_ylim(0, 1)
    speed.set_title("speed, in that of plain decoding")
    speed.axhline(1.0, color="grey", linewidth=1, linestyle="--")
    for axes in (acceptance, speed):
        axes.set_xticks(range(len(stages)), stages, rotation=15)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
