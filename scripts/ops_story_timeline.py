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
_ALERT = f'max by (alertstate) (ALERTS{{alertname="{COLLAPSED}"}})'
_QUERIES = {
    "live": "draft_version:redraft_expected_acceptance:ratio_rate10m",
    "promised": "max by (draft_version) (redraft_draft_promised_expected_acceptance)",
    "share": "max by (draft_version) (redraft_draft_share)",
    "state": "max by (state) (redraft_rollout_state) == 1",
    "active": 'max by (draft_version) (redraft_draft_info{role="active"}) == 1',
    "alert": _ALERT,
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
        state = one.labels["alertstate"]
        for begin, end in _spells(one):
            found.append(Moment(begin, f"the alert is {state}", "Prometheus"))
            if state == "firing":
                found.append(Moment(end, "the alert fires for the last time", "Prometheus"))
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
_BANDS = {"pending": "#f0e442", "firing": "#d55e00", "shadow": "#56b4e9", "canary": "#0072b2"}


def plot(timeline: Timeline, path: Path) -> None:
    """Four panels over one time axis."""
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    acceptance, alert, share, speed = figure.subplots(
        4, 1, sharex=True, gridspec_kw={"height_ratios": (3.2, 1.3, 1.3, 1.6)}
    )
    versions = sorted({one.labels["draft_version"] for one in timeline.series["share"]}, key=_first(timeline))
    colours = dict(zip(versions, _COLOURS, strict=False))
    _plot_acceptance(acceptance, timeline, colours)
    bands = [("rollout", "state", "state", ("shadow", "canary")), (COLLAPSED, "alert", "alertstate", tuple(_BANDS))]
    _plot_bands(alert, timeline, bands)
    for one in timeline.series["share"]:
        version = one.labels["draft_version"]
        share.plot(*_line(timeline, one), color=colours[version], drawstyle="steps-post")
    share.set_ylabel("share of\nnew requests")
    share.set_ylim(-0.05, 1.05)
    for one in timeline.series["tokens"]:
        speed.plot(*_line(timeline, one), color="black", linewidth=1)
    speed.set_ylabel("output tokens/s")
    speed.set_ylim(bottom=0)
    speed.set_xlabel("minutes; a tenth of production's")
    for axes in (acceptance, alert, share, speed):
        axes.grid(alpha=0.3)
        for moment in timeline.moments:
            if moment.source == "script":
                axes.axvline(timeline.minutes(moment.unix_s), color="grey", linewidth=1, linestyle=":")
    for moment in timeline.moments:
        if moment.source == "script":
            at = (timeline.minutes(moment.unix_s), 1.01)
            acceptance.annotate(
                moment.what.partition(":")[0] if "changes" in moment.what else moment.what,
                at,
                xycoords=("data", "axes fraction"),
                rotation=30,
                fontsize=8,
            )
    figure.savefig(path, dpi=120)


def _plot_acceptance(axes: Any, timeline: Timeline, colours: dict[str, str]) -> None:
    for one in timeline.series["live"]:
        version = one.labels["draft_version"]
        axes.plot(*_line(timeline, one), color=colours.get(version, "grey"), label=version)
    for one in timeline.series["promised"]:
        x, y = _line(timeline, one)
        axes.plot(x, y, color=colours[one.labels["draft_version"]], linewidth=1, linestyle="--")
        axes.plot(
            x, [_LIMIT * value for value in y], color=colours[one.labels["draft_version"]], linewidth=1, alpha=0.4
        )
    axes.plot([], [], color="grey", linewidth=1, linestyle="--", label="promised by its evaluation")
    axes.plot([], [], color="grey", linewidth=1, alpha=0.4, label=f"{_LIMIT:.0%} of that: the alert's limit")
    axes.set_ylabel("expected acceptance")
    axes.legend(loc="lower left", fontsize=8)


def _plot_bands(axes: Any, timeline: Timeline, rows: Sequence[tuple[str, str, str, tuple[str, ...]]]) -> None:
    shown: set[str] = set()
    for height, (_, query, label, states) in enumerate(rows):
        for one in timeline.series[query]:
            state = one.labels[label]
            if state not in states:
                continue
            spells = [(timeline.minutes(begin), (end - begin) / 60.0) for begin, end in _spells(one)]
            name = {} if state in shown else {"label": state}
            axes.broken_barh(spells, (height - 0.35, 0.7), color=_BANDS[state], **name)
            shown.add(state)
    axes.set_yticks(range(len(rows)), [title.removeprefix("Redraft") for title, *_ in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.legend(loc="upper left", fontsize=8, ncols=4)


def _line(timeline: Timeline, one: Series) -> tuple[list[float], list[float]]:
    points = one.finite
    return [timeline.minutes(at) for at, _ in points], [value for _, value in points]


def _first(timeline: Timeline) -> Any:
    first = {one.labels["draft_version"]: one.points[0][0] for one in timeline.series["share"]}
    return first.__getitem__
