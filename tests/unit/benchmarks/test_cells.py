"""Results that are kept must be found again, by what they are of and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cells import Cells, quartiles


def test_a_kept_row_is_known_to_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cells.json"
    Cells(path).keep({"batch": 1, "k": 2}, {"ms": 3.5})
    again = Cells(path)
    assert again.is_known(batch=1, k=2)
    assert not again.is_known(batch=1, k=4)
    assert not again.is_known(batch=1, k=2, model="draft")
    assert [row["ms"] for row in json.loads(path.read_text())] == [3.5]


def test_a_row_is_replaced_by_one_of_the_same_identity_only(tmp_path: Path) -> None:
    cells = Cells(tmp_path / "cells.json")
    cells.keep({"batch": 1}, {"ms": 1.0})
    cells.keep({"batch": 2}, {"ms": 2.0})
    cells.keep({"batch": 1}, {"ms": 3.0})
    assert [(row["batch"], row["ms"]) for row in cells.rows] == [(2, 2.0), (1, 3.0)]


def test_again_forgets_until_it_is_measured_anew(tmp_path: Path) -> None:
    Cells(tmp_path / "cells.json").keep({"batch": 1}, {"ms": 1.0})
    cells = Cells(tmp_path / "cells.json", again=True)
    assert not cells.is_known(batch=1)
    assert cells.find(batch=1)  # an interrupted run must not lose it
    cells.keep({"batch": 1}, {"ms": 1.0})  # even if the same comes out
    assert cells.is_known(batch=1)


@pytest.mark.parametrize(
    ("values", "expected"), [([5.0], (5.0, 5.0, 5.0)), ([3.0, 1.0], (1.5, 2.0, 2.5)), ([4, 1, 3, 2, 5], (2, 3, 4))]
)
def test_quartiles(values: list[float], expected: tuple[float, float, float]) -> None:
    assert quartiles(values) == expected
