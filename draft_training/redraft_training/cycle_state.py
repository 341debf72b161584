"""What a cycle keeps in its work directory, so that a killed one goes on where it was.

work_dir/lock            held by the process at work
work_dir/replay/         the replay memory
work_dir/cycle/          the cycle under way
    cycle.json           what it was begun with
    memory/, dataset/    what it learns from; the traffic itself, so both are gone at its end
    registry/<version>/  drafts from the registry
    base/                the newborn draft, where the registry had none
    distill/             checkpoints, metrics.csv, draft/ with the report
    trained.json, comparison.json, decision.json, result.json: a stage's result, written at its end
work_dir/last/           what is left of the last cycle: JSON files, metrics, the draft and its report
work_dir/failed/         the same of the last one whose training diverged
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redraft.errors import RedraftError
from redraft.files import write_file
from redraft.traffic.erasure import Erasures
from redraft_training.dataset.replay import erase_remembered
from redraft_training.dataset.store import erase_dataset, num_covered

SCHEMA_VERSION = 1
CYCLE, TRAINED, COMPARISON = "cycle.json", "trained.json", "comparison.json"
DECISION, RESULT = "decision.json", "result.json"
_TRAFFIC = ("memory", "dataset")
_BULKY = ("registry", "base", "distill/base", "distill/checkpoints")


class WorkDirBusy(RedraftError):
    """Another process is at work in the directory."""


@dataclass(frozen=True, slots=True)
class Erased:
    """Examples that had to go: from the replay memory, from the cycle under way, from a data set of `distill`."""

    replay: int
    cycle: int
    by_hand: int


class Workspace:
    """The directories of one work directory. Everything but `locked` is for the holder of the lock."""

    def __init__(self, work_dir: Path) -> None:
        self._work_dir = work_dir
        self.directory = work_dir / "cycle"
        self.dataset, self.memory = self.directory / "dataset", self.directory / "memory"
        self.replay = work_dir / "replay"
        self.distill = self.directory / "distill"
        self.last = work_dir / "last"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out. The kernel lets go when the holder dies. Raises WorkDirBusy."""
        self._work_dir.mkdir(parents=True, exist_ok=True)
        with (self._work_dir / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WorkDirBusy(
                    f"another cycle is at work in {self._work_dir}: wait for its end, or use another --work-dir"
                ) from None
            yield

    @property
    def is_under_way(self) -> bool:
        """Whether there is a cycle to go on with."""
        return (self.directory / CYCLE).exists()

    def fetched(self, version: str) -> Path:
        """Where a draft of the registry goes."""
        return self.directory / "registry" / version

    def begin(self, content: Mapping[str, Any]) -> None:
        """An empty cycle in place of whatever was under way."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        os.chmod(self.directory, 0o700)  # it holds traffic
        self.write(CYCLE, content)

    def read(self, name: str) -> dict[str, Any] | None:
        """A stage's result; None if the stage has none, or one that this code does not know."""
        try:
            content = json.loads((self.directory / name).read_text(encoding="utf-8"))
            if content.pop("schema_version") != SCHEMA_VERSION:
                return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return dict(content)

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Keep a stage's result, whole or not at all."""
        text = json.dumps({"schema_version": SCHEMA_VERSION, **content}, indent=2) + "\n"
        write_file(self.directory / name, text.encode())

    def forget(self, name: str) -> None:
        """Have a stage done again."""
        (self.directory / name).unlink(missing_ok=True)

    def erase(self, erasures: Erasures) -> Erased:
        """Take out of the traffic kept here what the erasures cover.

        A cycle that learns from any of it begins anew; of one that has its result, only the memory is still needed.
        May be interrupted and called again. Raises OSError, and DatasetUnreadable for a file that cannot be searched.
        """
        if not erasures:
            return Erased(0, 0, 0)
        in_cycle = num_covered(self.memory, erasures) + num_covered(self.dataset, erasures)
        if in_cycle and self.read(RESULT) is None:
            shutil.rmtree(self.directory)
        elif in_cycle:
            shutil.rmtree(self.dataset, ignore_errors=True)
            erase_dataset(self.memory, erasures)
        by_hand = erase_dataset(self._work_dir / "dataset", erasures)
        return Erased(erase_remembered(self.replay, erasures), in_cycle, by_hand)

    def finish(self) -> None:
        """The cycle becomes the last one. May be interrupted and called again."""
        self._retire(self.last)

    def fail(self) -> None:
        """The cycle cannot go on: the next one begins anew."""
        self._retire(self._work_dir / "failed")

    def _retire(self, place: Path) -> None:
        for name in (*_TRAFFIC, *_BULKY):
            shutil.rmtree(self.directory / name, ignore_errors=True)
        for leftover in list(self.directory.rglob(".*")):  # of writes that were killed
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        shutil.rmtree(place, ignore_errors=True)
        self.directory.rename(place)
