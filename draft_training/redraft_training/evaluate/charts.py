"""The report's pictures: two drafts, told apart by colour (Okabe and Ito's, safe for the colour-blind) and by shape."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from redraft_training.distill.metrics import MetricsRow
from redraft_training.evaluate.comparison import Comparison, Gain
from redraft_training.evaluate.replay import ReplayResult

Panel = Callable[[Axes], None]

_ALPHA = "\N{GREEK SMALL LETTER ALPHA}"
OLD, NEW, PLAIN = "#E69F00", "#0072B2", "#555555"
MAX_DOMAINS = 16
_MAX_LABEL = 22
_MAX_POINTS = 2000
_DPI = 110


def overview(panels: Sequence[Panel], title: str) -> bytes:
    """All panels on one page, two abreast, as PNG."""
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(12.0, 3.7 * rows + 0.8), dpi=_DPI, layout="constrained")
    figure.suptitle(title, fontsize=13, parse_math=False)
    for index, panel in enumerate(panels):
        panel(figure.add_subplot(rows, 2, index + 1))
    return png(figure)


def single(panel: Panel) -> bytes:
    """One panel, as PNG."""
    figure = Figure(figsize=(7.0, 3.7), dpi=_DPI, layout="constrained")
    panel(figure.add_subplot())
    return png(figure)


def loss_curve(axes: Axes, rows: Sequence[MetricsRow]) -> None:
    points = [(row.tokens, row.loss) for row in _thinned(rows) if math.isfinite(row.loss)]
    axes.plot([x for x, _ in points], [y for _, y in points], color=PLAIN, linewidth=1.2)
    _label(axes, "Training: loss", "tokens trained on", "loss")


def alpha_curve(axes: Axes, rows: Sequence[MetricsRow]) -> None:
    """α on the training batches and, where it was measured, on held-out traffic."""
    batches = [(row.tokens, row.alpha) for row in _thinned(rows) if math.isfinite(row.alpha)]
    heldout = [(row.tokens, row.heldout_alpha) for row in rows if math.isfinite(row.heldout_alpha)]
    axes.plot([x for x, _ in batches], [y for _, y in batches], color=PLAIN, linewidth=1.0, label="training batches")
    axes.plot([x for x, _ in heldout], [y for _, y in heldout], color=NEW, marker="s", markersize=4, label="held-out")
    axes.set_ylim(0.0, 1.0)
    axes.legend(loc="lower right", frameon=False)
    _label(axes, f"Training: expected acceptance {_ALPHA}", "tokens trained on", _ALPHA)


def alpha_by_domain(axes: Axes, comparison: Comparison) -> None:
    """Before and after per domain, most traffic first; the bar is the gain's interval, drawn from the old α."""
    ranked = sorted(comparison.domains.items(), key=lambda item: -item[1].num_positions)
    shown: list[tuple[str, Gain]] = [("all", comparison.overall), *ranked[:MAX_DOMAINS]]
    for row, (_, gain) in enumerate(shown):
        low, high = gain.alpha_old + gain.low, gain.alpha_old + gain.high
        axes.plot([max(low, 0.0), min(high, 1.0)], [row, row], color=NEW, linewidth=5, alpha=0.3)
        axes.plot([gain.alpha_old, gain.alpha_new], [row, row], color=PLAIN, linewidth=1)
        names = ("before", "after") if row == 0 else (None, None)  # once in the legend
        axes.plot(gain.alpha_old, row, "o", color=OLD, markerfacecolor="white", markeredgewidth=2, label=names[0])
        axes.plot(gain.alpha_new, row, "s", color=NEW, label=names[1])
    axes.set_yticks(range(len(shown)), [_short(name) for name, _ in shown])
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(0.0, 1.0)
    axes.legend(loc="best", frameon=False)
    more = f", {len(ranked) - MAX_DOMAINS} more in the table" if len(ranked) > MAX_DOMAINS else ""
    _label(axes, f"{_ALPHA} by domain{more}", f"{_ALPHA} (bar: {comparison.confidence:.0%} interval of the gain)", "")


def alpha_by_position(axes: Axes, comparison: Comparison) -> None:
    names = list(comparison.positions)
    values = list(comparison.positions.values())
    ticks = range(len(names))
    axes.plot(ticks, [v.alpha_old for v in values], "o--", color=OLD, markerfacecolor="white", label="before")
    axes.plot(ticks, [v.alpha_new for v in values], "s-", color=NEW, label="after")
    axes.set_xticks(ticks, names, rotation=30 if len(names) > 6 else 0)
    axes.set_ylim(0.0, 1.0)
    axes.legend(loc="lower right", frameon=False)
    _label(axes, f"{_ALPHA} by output position", "position in the output", _ALPHA)


def acceptance_histogram(axes: Axes, old: ReplayResult | None, new: ReplayResult) -> None:
    """Share of draft steps by the number of tokens they accepted, as replayed."""
    bars = [("before", old, OLD, "//"), ("after", new, NEW, "")]
    shown = [bar for bar in bars if bar[1] is not None]
    width = 0.8 / len(shown)
    for index, (label, result, color, hatch) in enumerate(shown):
        assert result is not None
        total = max(sum(result.histogram), 1)
        at = [j + (index - (len(shown) - 1) / 2) * width for j in range(len(result.histogram))]
        axes.bar(
            at, [n / total for n in result.histogram], width, color=color, hatch=hatch, edgecolor="white", label=label
        )
    axes.set_xticks(range(len(new.histogram)))
    axes.legend(loc="best", frameon=False)
    _label(axes, "Replay: tokens accepted per draft step", "accepted tokens", "share of steps")


def speedup_by_k(axes: Axes, comparison: Comparison) -> None:
    """Predicted speed-up by k; without a cost profile, the mean acceptance length."""
    styles = (("before", comparison.speedups_old, OLD, "o--"), ("after", comparison.speedups_new, NEW, "s-"))
    measured = all(entry.speedup is not None for entry in comparison.speedups_new)
    for label, entries, color, style in styles:
        if entries:
            values = [e.mean_acceptance_length if e.speedup is None else e.speedup for e in entries]
            face = "white" if style.startswith("o") else color
            axes.plot(
                [e.num_speculative_tokens for e in entries],
                values,
                style,
                color=color,
                markerfacecolor=face,
                label=label,
            )
    axes.axhline(1.0, color=PLAIN, linewidth=0.8)
    axes.set_xticks([entry.num_speculative_tokens for entry in comparison.speedups_new])
    axes.legend(loc="best", frameon=False)
    title = "Predicted speed-up" if measured else "Predicted mean acceptance length"
    _label(axes, title, "num_speculative_tokens (k)", "times plain decoding" if measured else "tokens per step")


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def png(figure: Figure) -> bytes:
    """A finished figure as a PNG."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # a domain's name may have letters that the font lacks, or be too wide: the picture is still of use
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _thinned(rows: Sequence[MetricsRow]) -> Sequence[MetricsRow]:
    return rows[:: max(1, len(rows) // _MAX_POINTS)]


def _short(name: str) -> str:
    name = name or "(none)"
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    return name if len(name) <= _MAX_LABEL else name[: _MAX_LABEL - 1] + "…"
