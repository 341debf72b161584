"""Results on disk as a flat list of rows, so that what was measured once is not measured again."""

from __future__ import annotations

import datetime
import json
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.machine import processor
from redraft.files import write_file

Row = dict[str, Any]


class Cells:
    """The rows of one JSON file. A row's identity is the entries it is looked up by; the others are its values."""

    def __init__(self, path: Path, *, again: bool = False) -> None:
        """`again`: take what is there for unknown until it has been measured anew."""
        self.path = path
        self.rows: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        self._fresh: list[Row] = [] if again else list(self.rows)

    def find(self, **identity: object) -> list[Row]:
        """All rows with these entries."""
        return [row for row in self.rows if _has(row, identity)]

    def is_known(self, **identity: object) -> bool:
        """Whether there is such a row."""
        return any(_has(row, identity) for row in self._fresh)

    def keep(self, identity: Mapping[str, object], values: Mapping[str, object]) -> None:
        """Add a row, or replace the one of this identity; written at once, with machine, day and commit."""
        row = {**identity, **values, "machine": processor(), "date": _today(), "commit": _commit()}
        for rows in (self.rows, self._fresh):
            rows[:] = [*(other for other in rows if not _has(other, identity)), row]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f" {json.dumps(one)}" for one in self.rows)
        write_file(self.path, f"[\n{lines}\n]\n".encode())


def measured_on(rows: Sequence[Row]) -> str:
    """A sentence for a page: rows of several machines may stand in one file."""
    return "On " + "; ".join(dict.fromkeys(row["machine"] for row in rows)) + "."


def _has(row: Row, entries: Mapping[str, object]) -> bool:
    return all(name in row and row[name] == value for name, value in entries.items())


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


@cache
def _commit() -> str:
    """Of the code measured, with a + if it was changed since; empty outside a repository."""
    try:
        words = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
        return subprocess.run(
            words, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile, interpolated."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return at(0.25), at(0.5), at(0.75)
