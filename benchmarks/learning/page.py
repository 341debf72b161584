"""`benchmarks/results/learning.md` from the results of all runs so far."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from typing import Any

from benchmarks.learning.bench import Bench, K
from benchmarks.learning.speed import MAX_DRAFT, NEW_TOKENS, NUM_PROMPTS
from benchmarks.machine import machine_line
from benchmarks.report import RESULTS, table, write_page

_COLUMNS = (
    "alpha_greedy",
    "acceptance_rate",
    "mean_acceptance_length",
    "alpha_sampled",
    "acceptance_rate_sampled",
    "mean_acceptance_length_sampled",
)
_HEADER = ("α, T = 0", "acceptance", "length", "α, T = 0.7", "acceptance", "length")
_SPEED_HEADER = ("T = 0: ratio", "tokens/s", "without", "T = 0.7: ratio", "tokens/s", "without", "machine")
_SEEDED = {
    "captured": "Captured labels against a re-run target",
    "ablation": "Objectives, a newborn draft",
    "fine_tuning": "Objectives, the draft of day 0",
    "quantised": "Int8 drafts",
}
_COST = ("new requests", "their tokens", "tokens trained on", "CPU s", "tokens/s")


def write(bench: Bench) -> None:
    """Write the page."""
    by_experiment: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in bench.results.items():
        experiment, _, rest = key.partition("/")
        by_experiment[experiment][rest] = value
    parts = [
        f"Evaluation prompts, served by the target at temperature 0 (α, acceptance rate and mean acceptance length at "
        f"k = {K}: exactly what the server does, token for token) and at 0.7 with top-p 0.95 (α teacher-forced, the "
        "other two predicted from it). CPU s: processor time of the training, on one core that other jobs shared. "
        "Results are kept from run to run; the machine named above is the last one's. Cycles began with the general "
        "draft that comes with the package; drift, learning rates, the objectives of the draft of day 0, and cycles "
        "that say so, with the *first general* draft, the one before it (docs/drafts.md)."
    ]
    if found := by_experiment.get("domains"):
        parts += [
            "## By domain and cycle",
            table(("domain / draft", *_HEADER, *_COST), _domain_rows(found)),
        ]
    if found := by_experiment.get("drift"):
        parts += ["## Drift", table(("pair / stage", "domain", *_HEADER, *_COST), _drift_rows(found))]
    if found := by_experiment.get("learning_rate"):
        header = ("SQL requests learnt", "domain", *_HEADER, *_COST)
        parts += ["## Learning rates, the draft of day 0", table(header, _drift_rows(found))]
    if found := by_experiment.get("speed"):
        parts += [
            "## Tokens a second",
            f"One stream, until end-of-text or {NEW_TOKENS} tokens, prefill included, with the draft (adaptive length, "
            f"at most {MAX_DRAFT}) over without it in turn: median and quartiles over {NUM_PROMPTS} prompts.",
            table(("domain / draft", *_SPEED_HEADER), [[key, *_speed(found[key])] for key in sorted(found)]),
        ]
    for name, title in _SEEDED.items():
        if found := by_experiment.get(name):
            parts += [f"## {title}", table(("setting", "seeds", *_HEADER, "CPU s"), seed_rows(found))]
    write_page(RESULTS / "learning.md", "How fast a draft learns", machine_line(), parts)


def _domain_rows(found: dict[str, Any]) -> list[list[str]]:
    order = {"pruned": 0, "general": 1, "first general": 2}

    def place(key: str) -> tuple[str, int]:
        domain, _, draft = key.partition("/")
        return domain, order[draft] if draft in order else len(order) + int(draft.split()[-1])

    return [[key, *_numbers(found[key]), *_cost(found[key])] for key in sorted(found, key=place)]


def _drift_rows(found: dict[str, Any]) -> list[list[str]]:
    return [
        [key, domain, *_numbers(judged), *_cost(value.get("cost", {}))]
        for key, value in sorted(found.items(), key=lambda item: _in_order(item[0]))
        for domain, judged in value.items()
        if domain != "cost"
    ]


def _in_order(key: str) -> list[tuple[int, str]]:
    """Sorts 200 before 1000."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", key)]


def _cost(value: dict[str, Any]) -> list[str]:
    """New requests and their output tokens, then what training took."""
    if not value.get("tokens"):
        return [""] * len(_COST)
    shown = [f"{value[name]:,}" for name in ("requests", "output_tokens", "tokens", "cpu_s")]
    return [*shown, f"{value['tokens'] / value['cpu_s']:.0f}"]


def seed_rows(found: dict[str, Any]) -> list[list[str]]:
    """A row per setting: mean over seeds, and the standard deviation where there are several."""
    settings: dict[str, list[dict[str, float]]] = defaultdict(list)
    for key, value in found.items():
        settings[key.rpartition("/")[0]].append(value)
    rows = []
    for setting, values in sorted(settings.items(), key=lambda item: -_mean(item[1], "alpha_greedy")):
        spread = [_mean_and_spread(values, column) for column in _COLUMNS]
        rows.append([setting, str(len(values)), *spread, f"{_mean(values, 'cpu_s'):.0f}"])
    return rows


def _numbers(judged: dict[str, float]) -> list[str]:
    return [f"{judged[column]:.3f}" for column in _COLUMNS]


def _speed(measured: dict[str, Any]) -> list[str]:
    """Ratio, tokens/s with the draft and without, greedy and sampled, and the machine."""
    shown = []
    for kind in ("greedy", "sampled"):
        found = measured[kind]
        low, high = found["quartiles"]
        shown += [f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})"]
        shown += [f"{found[name]:.1f}" for name in ("tokens_per_s", "tokens_per_s_off")]
    return [*shown, measured["machine"]]


def _mean(values: list[dict[str, float]], column: str) -> float:
    return statistics.fmean(value[column] for value in values)


def _mean_and_spread(values: list[dict[str, float]], column: str) -> str:
    mean = f"{_mean(values, column):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(value[column] for value in values):.3f}"
