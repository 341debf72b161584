"""The page of `benchmarks.serving`: ratios, and what they say, losses included."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import OtherLoad
from benchmarks.report import table, write_page

BASELINE = "transformers plain"
REDRAFT_PLAIN = "redraft plain"
REDRAFT_ZERO_REQUESTED = "redraft, draft loaded, requests ask for k = 0"
REDRAFT_ZERO_CHOSEN = "redraft, speculation on, controller at k = 0"
REDRAFT_NGRAM = "redraft ngram"
REDRAFT_NGRAM_DRAFT = "redraft ngram + draft"
PEER_ASSISTED = "transformers assisted"
PEER_LOOKUP = "transformers prompt lookup"
ORDER = (
    BASELINE,
    PEER_ASSISTED,
    PEER_LOOKUP,
    REDRAFT_PLAIN,
    REDRAFT_ZERO_REQUESTED,
    REDRAFT_ZERO_CHOSEN,
    REDRAFT_NGRAM,
    REDRAFT_NGRAM_DRAFT,
)  # of the rows
OVERHEAD_LIMIT = 0.05


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one variant. `verify_steps`: target passes times the sequences in them."""

    variant: str
    seconds: float
    token_ids: tuple[tuple[int, ...], ...]
    verify_steps: int
    draft_tokens: int | None = None  # None: not known (transformers does not say)
    accepted_tokens: int = 0

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.token_ids)) / self.seconds


@dataclass(frozen=True, slots=True)
class Setting:
    machine: str
    load: OtherLoad
    bandwidths_gb_s: tuple[float, ...]  # before and after
    weight_bytes: int
    models: str
    prompts: str
    new_tokens: int
    k: int
    batch: int


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one variant's ratios to another, over the cycles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


Cycle = list[Sample]  # the baseline first and last


def write_report(path: Path, setting: Setting, singles: Sequence[Cycle], batches: Sequence[Cycle]) -> None:
    title = "Serving: redraft against transformers"
    write_page(
        path,
        title,
        setting.machine + ".",
        [
            _setting(setting),
            f"## Batch 1\n\n{_table(singles)}",
            f"## Batch {setting.batch}\n\n{_table(batches)}",
            _columns(),
            f"## Reading\n\n{_reading(setting, singles, batches)}",
        ],
    )


def _setting(setting: Setting) -> str:
    speeds = " and ".join(f"{value:.1f}" for value in setting.bandwidths_gb_s)
    floor = statistics.mean(setting.bandwidths_gb_s) * 1e9 / setting.weight_bytes
    return (
        f"{setting.models}. {setting.prompts}; {setting.new_tokens} new tokens each, greedy, end-of-text ignored, "
        f"k at most {setting.k} wherever there is speculation. While measuring, {setting.load.describe()}.\n\n"
        f"Memory read {speeds} GB/s before and after. A token that reads all {setting.weight_bytes / 1e6:.0f} MB of "
        f"weights once can then come at {floor:.1f} tokens/s at most: the ceiling of plain decoding at batch 1."
    )


def _columns() -> str:
    return (
        "Ratio: speed over the mean of the two runs of transformers plain in the same cycle, median and "
        "range over the cycles. In the row of transformers plain it is its second run over its first: the noise. "
        "Tokens/s: median, prefill included, for orientation only. Tokens a pass: new tokens per target pass and "
        "sequence. Same tokens: cycles in which all tokens equal those of transformers plain (fp32 ties can differ)."
    )


def _table(cycles: Sequence[Cycle]) -> str:
    header = ("variant", "ratio", "tokens/s", "acceptance rate", "tokens a pass", "same tokens")
    names = sorted({sample.variant for sample in cycles[0]}, key=ORDER.index)
    return table(header, [_row(name, cycles) for name in names])


def _row(name: str, cycles: Sequence[Cycle]) -> tuple[str, ...]:
    samples = [_find(cycle, name) for cycle in cycles]
    tokens = sum(len(row) for sample in samples for row in sample.token_ids)
    drafted = sum(sample.draft_tokens or 0 for sample in samples)
    accepted = sum(sample.accepted_tokens for sample in samples)
    same = sum(_find(cycle, name).token_ids == cycle[0].token_ids for cycle in cycles)
    return (
        name,
        str(_ratio(cycles, name)),
        f"{statistics.median(sample.tokens_per_s for sample in samples):.1f}",
        f"{accepted / drafted:.2f}" if drafted else "",
        f"{tokens / sum(sample.verify_steps for sample in samples):.2f}",
        f"{same}/{len(cycles)}",
    )


def _find(cycle: Cycle, name: str) -> Sample:
    """The baseline's later run, if that is asked for."""
    return next(sample for sample in reversed(cycle) if sample.variant == name)


def _ratio(cycles: Sequence[Cycle], name: str, other: str = BASELINE) -> Spread:
    return Spread.of([_seconds(cycle, other, name) / _find(cycle, name).seconds for cycle in cycles])


def _seconds(cycle: Cycle, name: str, compared_with: str) -> float:
    if name != BASELINE:
        return _find(cycle, name).seconds
    first, last = cycle[0].seconds, cycle[-1].seconds
    return first if compared_with == BASELINE else (first + last) / 2


def _reading(setting: Setting, singles: Sequence[Cycle], batches: Sequence[Cycle]) -> str:
    noise = _ratio(singles, BASELINE)
    lines = [
        *(["Other processes were busy meanwhile: do not quote these figures."] if setting.load.is_noisy else []),
        f"transformers against itself, a cycle apart, spreads from {noise.low:.2f} to {noise.high:.2f}: "
        "a smaller difference than that in a single cycle means nothing.",
        *_against_peer(singles, "batch 1"),
        *_against_peer(batches, f"batch {len(batches[0][0].token_ids)}"),
        *(_overhead(singles, name) for name in (REDRAFT_ZERO_REQUESTED, REDRAFT_ZERO_CHOSEN)),
        *(_gain(singles, name, "batch 1") for name in (REDRAFT_NGRAM, REDRAFT_NGRAM_DRAFT)),
        _gain(batches, REDRAFT_NGRAM, f"batch {len(batches[0][0].token_ids)}"),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _against_peer(cycles: Sequence[Cycle], where: str) -> list[str]:
    lines = []
    names = {sample.variant for sample in cycles[0]} - {BASELINE}
    own = [name for name in names if name.startswith("redraft")]
    for is_faster, word in ((True, "faster"), (False, "slower")):
        found = sorted((name for name in own if (_ratio(cycles, name).median > 1.0) is is_faster), key=ORDER.index)
        if found:
            shown = ", ".join(f"{name} ({_ratio(cycles, name).median:.2f})" for name in found)
            lines.append(f"At {where}, {word} than transformers plain by the median: {shown}.")
    peers = sorted((name for name in names if not name.startswith("redraft")), key=ORDER.index)
    if peers:
        shown = ", ".join(f"{name} ({_ratio(cycles, name).median:.2f})" for name in peers)
        lines.append(f"At {where}, transformers' own speculation against its plain generation: {shown}.")
    return lines


def _overhead(cycles: Sequence[Cycle], name: str) -> str:
    ratio = _ratio(cycles, name, REDRAFT_PLAIN)
    cost = 1 / ratio.median - 1
    verdict = "within" if cost < OVERHEAD_LIMIT else "NOT within"
    return (
        f"{name}: {ratio} of redraft plain's speed in the same cycle, a cost of {cost:.1%}, {verdict} the "
        f"{OVERHEAD_LIMIT:.0%} allowed."
    )


def _gain(cycles: Sequence[Cycle], name: str, where: str) -> str:
    ratio = _ratio(cycles, name, REDRAFT_PLAIN)
    verdict = "speculation pays" if ratio.median > 1.0 else "speculation LOSES"
    worse = sum(_find(cycle, name).seconds > _find(cycle, REDRAFT_PLAIN).seconds for cycle in cycles)
    return (
        f"{name} at {where}: {ratio} of redraft plain; {verdict} by the median, and loses in {worse} of "
        f"{len(cycles)} cycles."
    )
