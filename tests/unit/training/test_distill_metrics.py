"""The metrics file: one line a step, whatever crashed in between; and the learning rate's curve."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest

from redraft_training.distill.errors import TrainingError
from redraft_training.distill.metrics import MetricsRow, MetricsWriter, read_metrics
from redraft_training.distill.schedule import learning_rate_at

ROW = MetricsRow(1, 0, 2.5, 0.25, math.nan, 1e-3, 0.5, 100, 50.0, 2.0)


def row(step: int, **changes: float) -> MetricsRow:
    return replace(ROW, step=step, tokens=100 * step, **changes)  # type: ignore[arg-type]


def write(directory: Path, steps: range, last_step: int) -> None:
    with MetricsWriter(directory, last_step=last_step) as writer:
        for step in steps:
            writer.write(row(step))


def test_rows_come_back(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, last_step=0) as writer:
        writer.write(row(1, heldout_alpha=0.5))
        writer.write(row(2, alpha=math.nan))
        # each is on disk at once
        assert len(read_metrics(tmp_path / "metrics.csv")) == 2
    rows = read_metrics(tmp_path / "metrics.csv")
    assert rows[0] == row(1, heldout_alpha=0.5)
    assert math.isnan(rows[1].alpha)
    assert math.isnan(rows[1].heldout_alpha)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1] == "1,0,2.5,0.25,0.5,0.001,0.5,100,50,2"


def test_resuming_drops_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8), last_step=0)
    write(tmp_path, range(5, 10), last_step=4)
    assert [made.step for made in read_metrics(tmp_path / "metrics.csv")] == list(range(1, 10))
    write(tmp_path, range(1, 3), last_step=0)
    assert [made.step for made in read_metrics(tmp_path / "metrics.csv")] == [1, 2]


@pytest.mark.parametrize("torn", ["3,0,2.", "3,0,2.5,0.25,,0.001,0.5,300,50,2", "", "3"])
def test_a_torn_line_is_no_row(tmp_path: Path, torn: str) -> None:
    """The second ends like a whole number but may have had more digits."""
    write(tmp_path, range(1, 3), last_step=0)
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text() + torn)
    assert [made.step for made in read_metrics(path)] == [1, 2]
    write(tmp_path, range(3, 4), last_step=5)
    assert [made.step for made in read_metrics(path)] == [1, 2, 3]
    assert path.read_text().count("\n") == 4


class FullDisk(io.StringIO):
    name = "metrics.csv"

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetricsWriter(tmp_path, last_step=0) as writer, monkeypatch.context() as patch:
        patch.setattr(writer, "_file", FullDisk())
        with pytest.raises(TrainingError, match=r"metrics.csv: No space left on device; the checkpoints are intact"):
            writer.write(ROW)


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none.csv") == ()


def test_learning_rate_rises_and_falls() -> None:
    for decay, half in (("cosine", 0.5), ("linear", 0.5)):
        assert learning_rate_at(0.0, 2.0, 0.2, decay) == 0.0  # type: ignore[arg-type]
        assert learning_rate_at(0.1, 2.0, 0.2, decay) == pytest.approx(1.0)  # type: ignore[arg-type]
        assert learning_rate_at(0.2, 2.0, 0.2, decay) == pytest.approx(2.0)  # type: ignore[arg-type]
        assert learning_rate_at(0.6, 2.0, 0.2, decay) == pytest.approx(2.0 * half)  # type: ignore[arg-type]
        assert learning_rate_at(1.0, 2.0, 0.2, decay) == pytest.approx(0.0, abs=1e-12)  # type: ignore[arg-type]
        assert learning_rate_at(1.2, 2.0, 0.2, decay) == pytest.approx(0.0, abs=1e-12)  # type: ignore[arg-type]
    assert learning_rate_at(0.4, 1.0, 0.0, "cosine") > learning_rate_at(0.4, 1.0, 0.0, "linear")
