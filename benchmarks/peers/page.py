"""`benchmarks/results/peers.md` from the rows measured so far."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from benchmarks.cells import Cells, Row, measured_on
from benchmarks.machine import QUIET_CORES, machine_line
from benchmarks.peers.catalogue import FLOAT, PEERS, PLAIN, REDRAFT
from benchmarks.peers.launch import NGRAM_MAX, NGRAM_MIN
from benchmarks.report import table, write_page

GOALS = (
    # (our mode, engine, mode, goal) at batch 1
    ("draft", "llama.cpp", "f32 draft", 1.5),
    ("draft", "transformers", "assisted", 3.0),
    ("draft", "vllm", "draft", 1.5),
    ("draft", "openvino", "draft", 1.3),
    ("plain", "llama.cpp", "f32 plain", 1.0),
)
SERVERS, SERVERS_GOAL = ("llama.cpp", "vllm"), 1.2  # with several streams: our best mode over the best of theirs


def write(cells: Cells, unavailable: Mapping[str, str], threads: int, num_draft_tokens: int) -> Path:
    """Write the page beside the cells; return its path."""
    path = cells.path.with_suffix(".md")
    parts = [_method(threads, num_draft_tokens)]
    if unavailable:
        lines = "\n".join(f"- **{name}**: {reason}" for name, reason in unavailable.items())
        parts.append(f"## Not measured in the last run\n\n{lines}")
    for streams in sorted({row["streams"] for row in cells.rows}):
        for temperature in sorted({row["temperature"] for row in cells.find(streams=streams)}):
            rows = cells.find(streams=streams, temperature=temperature)
            sampling = "temperature 0" if temperature == 0 else f"temperature {temperature:g}, top-p 0.95"
            parts.append(f"## {streams} at once, {sampling}\n\n{measured_on(rows)}\n\n{_table(rows)}")
    parts += [f"## Against the goals\n\n{_goals(cells)}", f"## Engines\n\n{_versions(cells)}"]
    if noisy := [row for row in cells.rows if (row["other_cores"] or 0.0) > QUIET_CORES]:
        parts.append(
            f"**{len(noisy)} of {len(cells.rows)} cells were measured beside other busy processes** (up to "
            f"{max(row['other_cores'] for row in noisy):.2f} cores): do not quote these."
        )
    write_page(path, "Peers: the same model on other engines", machine_line() + ".", parts)
    return path


def _method(threads: int, num_draft_tokens: int) -> str:
    return (
        f"Same target, draft, prompts and sampling, {threads} threads, until end-of-text or the most new tokens. Every "
        "round runs one prompt (or as many as there are streams) on redraft plain, on all modes of one engine in turn, "
        "and on redraft plain again. A cell is the ratio of a mode's tokens per second, prefill included, to redraft "
        "plain's around it, over all rounds; in redraft's own row `plain` it is the noise. Behind it: quartiles of the "
        f"single rounds. Drafts are of {num_draft_tokens} tokens at most, n-grams of {NGRAM_MIN} to {NGRAM_MAX}.\n\n"
        "The draft's head is cut to a reduced vocabulary by redraft only: the others run the same checkpoint with its "
        "whole head. All weights are fp32 where the mode names no other; llama.cpp has its draft as q8_0, and q4_1 is "
        "the file that the demo target comes from. transformers speculates for one sequence only."
    )


def _table(rows: Sequence[Row]) -> str:
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    lines = []
    for peer in PEERS:
        for mode in peer.modes:
            own = {r["domain"]: r for r in rows if r["engine"] == peer.name and r["mode"] == mode.name}
            if own:
                lines.append([f"{peer.name} {mode.name}", *_row(own, domains)])
    means = ["geometric mean"] if len(domains) > 1 else []
    return table(["engine, mode", *means, *domains, "tokens/s", "acceptance"], lines)


def _row(own: Mapping[str, Row], domains: Sequence[str]) -> list[str]:
    ratios = [row["ratio_to_plain"] for row in own.values()]
    means = [f"**{_mean(ratios):.2f}**" if len(own) == len(domains) else "incomplete"] if len(domains) > 1 else []
    accepted = [row["acceptance_rate"] for row in own.values() if row["acceptance_rate"] is not None]
    return [
        *means,
        *(_cell(own[domain]) if domain in own else "" for domain in domains),
        f"{statistics.median(row['tokens_per_s'] for row in own.values()):.1f}",
        f"{statistics.mean(accepted):.2f}" if accepted else "",
    ]


def _cell(row: Row) -> str:
    low, high = row["ratio_quartiles"]
    return f"{row['ratio_to_plain']:.2f} ({low:.2f} to {high:.2f})"


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, ratios)))


def _goals(cells: Cells) -> str:
    lines = []
    for mode, engine, peer_mode, goal in GOALS:
        ours = {
            row["domain"]: row["ratio_to_plain"]
            for row in cells.find(engine=REDRAFT, mode=mode, streams=1, temperature=0.0)
        }
        theirs = {
            row["domain"]: row["ratio_to_plain"]
            for row in cells.find(engine=engine, mode=peer_mode, streams=1, temperature=0.0)
        }
        both = [ours[domain] / theirs[domain] for domain in ours if domain in theirs]
        if both:
            reached = _mean(both)
            verdict = "reached" if reached >= goal else "MISSED"
            lines.append([f"redraft {mode} / {engine} {peer_mode}", f"{reached:.2f}", f"{goal:.1f}", verdict])
    for streams in sorted({row["streams"] for row in cells.rows if row["streams"] > 1}):
        rows = cells.find(streams=streams, temperature=0.0)
        # redraft plain is what all ratios are of
        ours = _best(rows, (REDRAFT,)) or {"engine": REDRAFT, "mode": PLAIN, "ratio_to_plain": 1.0}
        if theirs := _best(rows, SERVERS):
            ratio = ours["ratio_to_plain"] / theirs["ratio_to_plain"]
            verdict = "reached" if ratio >= SERVERS_GOAL else "MISSED"
            names = " / ".join(f"{row['engine']} {row['mode']}" for row in (ours, theirs))
            lines.append([f"{streams} streams, fp32, best modes: {names}", f"{ratio:.2f}", str(SERVERS_GOAL), verdict])
    return table(["temperature 0; one stream, mean of domains, if nothing else is said", "ratio", "goal", ""], lines)


def _best(rows: Sequence[Row], engines: Collection[str]) -> Row | None:
    """The fastest fp32 mode of these engines."""
    modes = {(peer.name, mode.name) for peer in PEERS for mode in peer.modes if mode.weights == FLOAT}
    own = [row for row in rows if row["engine"] in engines and (row["engine"], row["mode"]) in modes]
    return max(own, key=lambda row: row["ratio_to_plain"], default=None)


def _versions(cells: Cells) -> str:
    found = dict.fromkeys((row["version"], row["date"], row["commit"]) for row in cells.rows)
    lines = [f"- {version}, measured {date} beside redraft {commit}" for version, date, commit in found]
    same = cells.find(temperature=0.0, streams=1)
    counts: dict[str, list[int]] = {}
    for row in same:
        if row["same_tokens"]:
            total = counts.setdefault(f"{row['engine']} {row['mode']}", [0, 0])
            total[0] += row["same_tokens"][0]
            total[1] += row["same_tokens"][1]
    equal = ", ".join(f"{name} {a}/{b}" for name, (a, b) in counts.items())
    return "\n".join(lines) + (f"\n\nSame tokens as redraft plain, greedy, one stream: {equal}." if equal else "")
