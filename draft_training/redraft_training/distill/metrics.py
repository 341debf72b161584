"""A run's figures as `metrics.csv`, one row an optimiser step: what the training curve is drawn from.

A resumed run continues the file: rows past the checkpoint and a line torn by a crash are dropped first, so that no step
is there twice. If the `tensorboard` package is installed, the same figures go to `tensorboard/` beside the file.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from redraft.files import write_file
from redraft_training.distill.errors import TrainingError

METRICS_FILE = "metrics.csv"


@dataclass(frozen=True, slots=True)
class MetricsRow:
    """One optimiser step, over all ranks.

    Attributes:
        step: optimiser steps taken, this one included.
        loss: of the objective, mean over the step's positions.
        alpha: expected acceptance on the step's own batches, before the step; NaN where the objective does not say.
        heldout_alpha: on the held-out sample, after the step; NaN if it was not measured there.
        grad_norm: before clipping.
        tokens: run through the student since the run began.
        seconds: of training since the run began, all sessions of a resumed run together.
    """

    step: int
    epoch: int
    loss: float
    alpha: float
    heldout_alpha: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_s: float
    seconds: float


_COLUMNS = tuple(field.name for field in fields(MetricsRow))
_INTEGERS = frozenset({"step", "epoch", "tokens"})


class MetricsWriter:
    """Appends rows to `directory/metrics.csv`; keeps those up to `last_step` of an earlier session.

    Every row is one flushed write, so that a killed run loses at most the row being written.
    """

    def __init__(self, directory: Path, *, last_step: int) -> None:
        path = directory / METRICS_FILE
        directory.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(path) if row.step <= last_step]
        _rewrite(path, kept)
        self._file: TextIO = path.open("a", encoding="utf-8", newline="")
        self._csv = csv.writer(self._file, lineterminator="\n")
        self._board = _tensorboard(directory / "tensorboard", last_step)

    def write(self, row: MetricsRow) -> None:
        """Append a row. Raises `TrainingError` if it cannot be written."""
        try:
            self._csv.writerow(_cells(row))
            self._file.flush()
        except OSError as error:
            raise TrainingError(
                f"cannot write {self._file.name}: {error.strerror}; the checkpoints are intact, so run it again"
            ) from error
        if self._board is not None:
            for name in _COLUMNS[2:]:
                value = getattr(row, name)
                if not math.isnan(value):
                    self._board.add_scalar(f"train/{name}", value, row.step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> tuple[MetricsRow, ...]:
    """The rows of a metrics file, without what a crash left unfinished; none if there is no file."""
    if not path.exists():
        return ()
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        # a line without its end was being written when the process died
        for cells in csv.DictReader(line for line in file if line.endswith("\n")):
            row = _parse(cells)
            if row is not None:
                rows.append(row)
    return tuple(rows)


def _parse(cells: dict[str, Any]) -> MetricsRow | None:
    try:
        values = {name: int(cells[name]) if name in _INTEGERS else float(cells[name] or "nan") for name in _COLUMNS}
    except (KeyError, TypeError, ValueError):
        return None
    return MetricsRow(**values)  # type: ignore[arg-type]  # integers where the fields are


def _cells(row: MetricsRow) -> list[str]:
    values = astuple(row)
    return [str(v) if isinstance(v, int) else "" if math.isnan(v) else f"{v:.8g}" for v in values]


def _rewrite(path: Path, rows: Iterable[MetricsRow]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(_cells(row) for row in rows)
    write_file(path, text.getvalue().encode())


def _tensorboard(directory: Path, last_step: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter  # untyped
    return writer(str(directory), purge_step=last_step + 1)
