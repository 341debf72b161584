"""Two variants in turn: what one costs or brings is the ratio within a pair of runs, not across an hour."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.cells import quartiles

Run = Callable[[int], float]
"""Does the work of one run, given the number of the cycle, and returns tokens per second."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Tokens per second of both variants, cycle by cycle."""

    off: tuple[float, ...]
    on: tuple[float, ...]

    def values(self) -> dict[str, object]:
        """The row's entries: speed on over speed off, median and quartiles over the cycles."""
        low, ratio, high = quartiles([on / off for on, off in zip(self.on, self.off, strict=True)])
        return {
            "ratio": round(ratio, 4),
            "quartiles": [round(low, 4), round(high, 4)],
            "cycles": len(self.on),
            "tokens_per_s": round(quartiles(self.on)[1], 2),
            "tokens_per_s_off": round(quartiles(self.off)[1], 2),
        }


def alternate(off: Run, on: Run, cycles: int) -> Pairs:
    """Run both once to warm up, then off-on, on-off, off-on, ..."""
    off(0), on(0)
    pairs: list[tuple[float, float]] = []
    for cycle in range(cycles):
        if cycle % 2 == 0:
            pairs.append((off(cycle), on(cycle)))
        else:
            speed = on(cycle)
            pairs.append((off(cycle), speed))
    return Pairs(tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))
