"""`benchmarks/results/engine.md` from the rows measured so far."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import Cells, Row, measured_on
from benchmarks.engine.forward import SAMPLERS, known_models
from benchmarks.engine.parts import PARTS
from benchmarks.engine.shares import SHARES
from benchmarks.engine.spec_bench import ALL, TASKS
from benchmarks.machine import QUIET_CORES, machine_line
from benchmarks.report import table, write_page

PART_GOALS = {"capture": 0.98, "metrics": 0.99, "gRPC": 0.95}
NOT_FORWARD_GOALS = {1: 0.08, 16: 0.15}
SPECULATION_GOAL = 0.98
SPEC_BENCH_GOALS = {0.0: 1.3, 0.7: 1.2}


def write(cells: Cells, models: str, prompts: str) -> Path:
    """Write the page beside the cells; return its path."""
    path = cells.path.with_suffix(".md")
    parts = [f"{models}. {prompts}."]
    for name in known_models(cells):
        rows = cells.find(experiment="forward", model=name)
        parts += [f"## Forward pass: {name}", measured_on(rows), _ceilings(rows), _forward(rows)]
    for experiment, (title, *intro, render) in _SECTIONS.items():
        if rows := cells.find(experiment=experiment):
            parts += [f"## {title}", measured_on(rows), *intro, render(rows)]
    noisy = [row for row in cells.rows if (row.get("other_cores") or 0.0) > QUIET_CORES]
    if noisy:
        most = max(row["other_cores"] for row in noisy)
        parts.append(
            f"**{len(noisy)} cells were measured beside other busy processes** (up to {most:.2f} cores): do not quote."
        )
    write_page(path, "Engine: where the time goes", machine_line() + ".", parts)
    return path


_STEP = (
    "Shares of the engine thread's wall time while all streams decode, with gRPC, metrics and capture on. Sampling is "
    "what is left of a step without its passes, acceptance included. The event loop's CPU time is beside these shares."
)
_PAIRS = "Tokens per second with over without, prefill included, run in turn: median and quartiles of the pairs."
_ON_OFF = f"{_PAIRS} Without: the same engine, by requests that want no drafted token."
_SPEC_BENCH = (
    "One stream, until end-of-text or 128 tokens (8 with `--quick`): tokens per second over plain decoding, the "
    "geometric mean over prompts (and their quartiles), prefill included; and the same behind the first token."
)


def _ceilings(rows: Sequence[Row]) -> str:
    bandwidths, peaks = ([row[name] for row in rows] for name in ("bandwidth_gb_s", "peak_gflop_s"))
    return (
        f"Milliseconds, median (and quartiles). Floor: the longer of bytes / bandwidth and flops / peak, measured "
        f"right before and after: {min(bandwidths):.1f} to {max(bandwidths):.1f} GB/s read, {min(peaks):.0f} to "
        f"{max(peaks):.0f} GFLOP/s. T / T(k = first): within the same batch."
    )


def _forward(rows: Sequence[Row]) -> str:
    header = ["batch", "k", "T", "floor", "bound", "T / floor", "T / T(k = first)", "linear", "attention", "rest"]
    lines = []
    for row in sorted(rows, key=lambda row: (row["batch"], row["k"])):
        low, high = row["quartiles_ms"]
        lines.append(
            [
                str(row["batch"]),
                str(row["k"]),
                f"{row['forward_ms']:.2f} ({low:.2f} to {high:.2f})",
                f"{row['floor_ms']:.2f}",
                row["bound"],
                f"{row['ratio']:.2f}",
                f"{row['to_first']:.2f}",
                *_split(row),
            ]
        )
    return table(header, lines)


def _split(row: Row) -> list[str]:
    """Linear, attention, and what is left; empty where the native pass does not tell."""
    if "linear_ms" not in row:
        return ["", "", ""]
    attention = row.get("attention_ms", 0.0)
    rest = max(0.0, row["forward_ms"] - row["linear_ms"] - attention)
    return [f"{value:.2f}" for value in (row["linear_ms"], attention, rest)]


def _sampling(rows: Sequence[Row]) -> str:
    header = ["sampler", "rows", "ms", "floor ms (logits read once)", "ratio"]
    ordered = sorted(rows, key=lambda row: (list(SAMPLERS).index(row["sampler"]), row["rows"]))
    return table(
        header,
        [
            [r["sampler"], str(r["rows"]), f"{r['ms']:.3f}", f"{r['floor_ms']:.3f}", f"{r['ms'] / r['floor_ms']:.1f}"]
            for r in ordered
        ],
    )


def _steps(rows: Sequence[Row]) -> str:
    header = ["mode, batch", "step ms", *SHARES, "not a forward", "goal", "event loop CPU"]
    lines = []
    for row in sorted(rows, key=lambda row: (row["mode"], row["batch"])):
        goal = NOT_FORWARD_GOALS.get(row["batch"])
        shown = "" if goal is None else f"{goal:.0%} {'reached' if row['not_forward'] <= goal else 'MISSED'}"
        lines.append(
            [
                f"{row['mode']}, {row['batch']}",
                f"{row['step_ms']:.2f}",
                *(f"{row['shares'][name]:.1%}" if name in row["shares"] else "" for name in SHARES),
                f"**{row['not_forward']:.1%}**",
                shown,
                f"{row['event_loop_cpu']:.1%}",
            ]
        )
    return table(header, lines)


def _parts(rows: Sequence[Row]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: PARTS.index(row["part"])):
        goal = PART_GOALS[row["part"]]
        verdict = "reached" if row["ratio"] >= goal else "MISSED"
        lines.append([f"{row['part']}, {row['streams']} streams", _pair(row), f"{goal:.2f} {verdict}"])
    return table(["part", "ratio", "goal"], lines)


def _speculation(rows: Sequence[Row]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: (row["proposer"], row["streams"])):
        verdict = "" if row["ratio"] >= SPECULATION_GOAL else "BELOW"
        speeds = [f"{row['tokens_per_s']:.1f}", f"{row['tokens_per_s_off']:.1f}"]
        lines.append([row["proposer"], str(row["streams"]), _pair(row), *speeds, f"{SPECULATION_GOAL:.2f} {verdict}"])
    return table(["proposer", "streams", "ratio", "tokens/s on", "off", "at least"], lines)


def _spec_bench(rows: Sequence[Row]) -> str:
    lines = []
    for row in sorted(rows, key=lambda r: (r["temperature"], r["proposer"], (*TASKS, ALL).index(r["task"]))):
        low, high = row["quartiles"]
        goal = SPEC_BENCH_GOALS[row["temperature"]]
        verdict = f"{goal:.1f} {'reached' if row['ratio'] >= goal else 'MISSED'}" if row["task"] == ALL else ""
        lines.append(
            [
                f"{row['temperature']:g}",
                row["proposer"],
                row["task"],
                str(row["prompts"]),
                f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})",
                f"{row['decode_ratio']:.2f}",
                verdict,
            ]
        )
    return table(["temperature", "proposer", "task", "prompts", "ratio", "without prefill", "goal"], lines)


def _pair(row: Row) -> str:
    low, high = row["quartiles"]
    return f"{row['ratio']:.3f} ({low:.3f} to {high:.3f}, {row['cycles']} pairs)"


_SECTIONS: dict[str, tuple[Any, ...]] = {
    # by experiment: a title, perhaps what its numbers are, and its table
    "sampling": ("Sampling", _sampling),
    "step": ("A step", _STEP, _steps),
    "part": ("Parts", _PAIRS, _parts),
    "speculation": ("Speculation on against off", _ON_OFF, _speculation),
    "spec_bench": ("Spec-Bench, the general draft", _SPEC_BENCH, _spec_bench),
}
