"""The operations story as Prometheus has it: what happened when, as a table and as a picture."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from scripts.monitoring_process import Notification, Prometheus, Series

COLLAPSED = "RedraftAcceptanceCollapsed"
_QUERIES = {
    # with as much traffic as the alert asks for
    "live": (
        "draft_version:redraft_expected_acceptance:ratio_rate10m"
        " and on (draft_version) draft_version:redraft_expected_acceptance_positions:increase10m > 50"
    ),
    "promised": "max by (draft_version) (redraft_draft_promised_expected_acceptance)",
    "share": "max by (draft_version) (redraft_draft_share)",
    "state": "max by (state) (redraft_rollout_state) == 1",
    "active": 'max by (draft_version) (redraft_draft_info{role="active"}) == 1',
    "alert": f'max by (draft_version, alertstate) (ALERTS{{alertname="{COLLAPSED}"}})',
    "alerts": "max by (alertname, alertstate) (ALERTS)",
    "tokens": "sum(rate(redraft_generation_tokens_total[15s]))",
    "failed": 'sum(redraft_requests_total{code!="OK"}) or vector(0)',
}
_LIMIT = 0.85  # acceptanceOfPromise


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that happened. `source` says whose clock and word it is."""

    unix_s: float
    what: str
    source: str


@dataclass(frozen=True, slots=True)
class Timeline:
    """What Prometheus answered, by the names of `_QUERIES`, and all moments in order."""

    started: float
    series: dict[str, list[Series]]
    moments: list[Moment]

    @classmethod
    def read(
        cls,
        prometheus: Prometheus,
        moments: Sequence[Moment],
        notifications: Sequence[Notification],
        started: float,
        ended: float,
        *,
        step: float,
    ) -> Timeline:
        """Ask Prometheus for the whole time; `moments` are those that only the script knows."""
        series = {name: prometheus.query_range(query, started, ended, step) for name, query in _QUERIES.items()}
        found = [*moments, *_from_series(series)]
        found += [
            Moment(one.received_unix_s, f"{one.labels['alertname']} {one.status}", "webhook")
            for one in notifications
            if one.labels["alertname"] != COLLAPSED
        ]
        return cls(started, series, sorted(found, key=lambda moment: moment.unix_s))

    def minutes(self, unix_s: float) -> float:
        return (unix_s - self.started) / 60.0


def _from_series(series: dict[str, list[Series]]) -> list[Moment]:
    found = []
    for one in series["alert"]:
        state, version = one.labels["alertstate"], one.labels["draft_version"]
        for begin, end in _spells(one):
            found.append(Moment(begin, f"the alert is {state} for {version}", "Prometheus"))
            if state == "firing":
                found.append(Moment(end, "it fires for the last time", "Prometheus"))
    for one in series["state"]:
        if one.labels["state"] != "idle":
            found += [Moment(begin, f"rollout: {one.labels['state']}", "Prometheus") for begin, _ in _spells(one)]
    for one in series["active"]:
        found += [Moment(begin, f"{one.labels['draft_version']} is active", "Prometheus") for begin, _ in _spells(one)]
    return found


def _spells(one: Series) -> list[tuple[float, float]]:
    """Begin and end of each time without a gap."""
    times = [at for at, _ in one.points]
    step = min((later - at for at, later in itertools.pairwise(times)), default=0.0)
    spells: list[tuple[float, float]] = []
    for at in times:
        if spells and at - spells[-1][1] <= 1.5 * step:
            spells[-1] = (spells[-1][0], at)
        else:
            spells.append((at, at))
    return spells


def save(timeline: Timeline, folder: Path) -> None:
    """Write timeline.json, timeline.md and timeline.png."""
    content: dict[str, Any] = {
        "started_unix_s": timeline.started,
        "moments": [asdict(moment) for moment in timeline.moments],
        "series": {name: [asdict(one) for one in found] for name, found in timeline.series.items()},
    }
    (folder / "timeline.json").write_text(json.dumps(content) + "\n")
    rows = [
        f"| {_clock(timeline.minutes(moment.unix_s))} | {moment.what} | {moment.source} |"
        for moment in timeline.moments
    ]
    head = ["| minutes | what | source |", "| ---: | --- | --- |"]
    (folder / "timeline.md").write_text("\n".join([*head, *rows]) + "\n")
    plot(timeline, folder / "timeline.png")


def load(path: Path) -> Timeline:
    """What `save` has written, to plot it again."""
    content = json.loads(path.read_text())
    series = {name: [Series(**one) for one in found] for name, found in content["series"].items()}
    return Timeline(content["started_unix_s"], series, [Moment(**one) for one in content["moments"]])


def _clock(minutes: float) -> str:
    return f"{int(minutes)}:{round(minutes % 1 * 60):02d}"


_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart by colour-blind eyes, too
_BANDS = {"pending": "#f0e442", "firing": "#d55e00", "shadow": "#56b4e9", "canary": "#0072b2", "runs": "#999999"}


def plot(timeline: Timeline, path: Path) -> None:
    """Four panels over one time axis."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    acceptance, bands, share, speed = figure.subplots(
        4, 1, sharex=True, gridspec_kw={"height_ratios": (3.4, 1.6, 1.1, 1.3)}
    )
    first = {one.labels["draft_version"]: one.points[0][0] for one in timeline.series["share"]}
    colours = dict(zip(sorted(first, key=first.__getitem__), _COLOURS, strict=False))
    _plot_acceptance(acceptance, timeline, colours)
    _plot_bands(bands, timeline)
    for one in timeline.series["share"]:
        share.plot(*_line(timeline, one), color=colours[one.labels["draft_version"]], drawstyle="steps-post")
    share.set_ylabel("share of\nnew requests")
    share.set_ylim(-0.05, 1.05)
    for one in timeline.series["tokens"]:
        speed.plot(*_line(timeline, one), color="black", linewidth=1)
    speed.set_ylabel("output\ntokens/s")
    speed.set_ylim(bottom=0)
    speed.set_xlabel("minutes on a clock ten times faster than production's")
    for axes in (acceptance, bands, share, speed):
        axes.grid(alpha=0.3)
        for moment in timeline.moments:
            if moment.source == "script" and moment.what.startswith("the traffic"):
                axes.axvline(timeline.minutes(moment.unix_s), color="black", linewidth=1, linestyle=":")
    figure.savefig(path, dpi=120)


def _plot_acceptance(axes: Any, timeline: Timeline, colours: dict[str, str]) -> None:
    for one in timeline.series["live"]:
        version = one.labels["draft_version"]
        axes.plot(*_line(timeline, one), color=colours[version], label=version)
    for one in timeline.series["promised"]:
        x, y = _line(timeline, one)
        colour = colours[one.labels["draft_version"]]
        axes.plot(x, y, color=colour, linewidth=1, linestyle="--")
        axes.plot(x, [_LIMIT * value for value in y], color=colour, linewidth=1, alpha=0.4)
    axes.plot([], [], color="grey", linewidth=1, linestyle="--", label="promised by its evaluation")
    axes.plot([], [], color="grey", linewidth=1, alpha=0.4, label=f"{_LIMIT:.0%} of that: the alert's limit")
    axes.set_ylabel("expected acceptance")
    axes.set_ylim(0, 1)
    axes.legend(loc="upper left", fontsize=8)
    for moment in timeline.moments:
        if moment.source == "script" and moment.what.startswith("the traffic"):
            axes.annotate(f" {moment.what}", (timeline.minutes(moment.unix_s), 0.03), fontsize=9)


def _plot_bands(axes: Any, timeline: Timeline) -> None:
    """What went on: the Jobs, the rollout, and each alert, from top to bottom in order of appearance."""
    alerts = sorted({one.labels["alertname"] for one in timeline.series["alerts"]} - {COLLAPSED})
    rows: list[tuple[str, list[tuple[str, list[tuple[float, float]]]]]] = [("Job", [("runs", _jobs(timeline))])]
    rollout = [(one.labels["state"], _spells(one)) for one in timeline.series["state"]]
    for name in (COLLAPSED, *alerts):
        own = [one for one in timeline.series["alerts"] if one.labels["alertname"] == name]
        rows.append((name.removeprefix("Redraft"), [(one.labels["alertstate"], _spells(one)) for one in own]))
    rows.append(("rollout", rollout))
    for height, (_, states) in enumerate(rows):
        for state, spells in states:
            if state in _BANDS:
                spans = [(timeline.minutes(begin), (end - begin) / 60.0) for begin, end in spells]
                axes.broken_barh(spans, (-height - 0.35, 0.7), color=_BANDS[state])
    for state, colour in _BANDS.items():
        axes.plot([], [], color=colour, linewidth=6, label=state)
    axes.set_yticks([-height for height in range(len(rows))], [name for name, _ in rows], fontsize=8)
    axes.legend(loc="lower left", fontsize=8, ncols=len(_BANDS))
    axes.set_ylim(-len(rows) - 0.5, 0.6)


def _jobs(timeline: Timeline) -> list[tuple[float, float]]:
    begins = [moment.unix_s for moment in timeline.moments if moment.what.endswith(": started")]
    ends = [moment.unix_s for moment in timeline.moments if ": ended" in moment.what]
    return list(zip(begins, ends, strict=True))


def _line(timeline: Timeline, one: Series) -> tuple[list[float], list[float]]:
    points = one.finite
    return [timeline.minutes(at) for at, _ in points], [value for _, value in points]
