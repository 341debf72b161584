"""Predicted speed: the formula, the profile's file, and which k is best."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from redraft_training.evaluate.errors import InvalidProfile
from redraft_training.evaluate.speedup import (
    CostProfile,
    best,
    geometric_speedup,
    measure_profile,
    predict_speedups,
)
from tests.fakes import tiny_model
from tests.reference_decoding import make_runner
from tests.unit.training.evaluate_examples import draft_scores, scored

# a pass over 1 to 32 tokens costs 10 ms and 1 ms a token beyond the first; the draft costs a tenth of a plain pass
PROFILE = CostProfile(tuple((n, 0.009 + 0.001 * n) for n in (1, 2, 4, 8, 16, 32)), ((1, 0.001), (8, 0.002)), "box")


def test_the_formula() -> None:
    assert PROFILE.draft_cost() == pytest.approx(0.1)
    assert PROFILE.verify_cost(3) == pytest.approx(1.3)
    assert PROFILE.verify_cost(3, batch_size=8) == pytest.approx(0.041 / 0.017)
    a, k = 0.6, 3
    expected = (1 - a ** (k + 1)) / ((1 - a) * (0.1 * k + 1.3))
    assert geometric_speedup(a, PROFILE, k) == pytest.approx(expected)
    assert geometric_speedup(1.0, PROFILE, k) == pytest.approx(4 / 1.6)
    assert geometric_speedup(0.0, PROFILE, k) == pytest.approx(1 / 1.6)


def test_predictions_follow_the_texts_and_the_best_k_is_found() -> None:
    """Runs of three accepted tokens: k = 3 takes each run and its end in one step, more only costs."""
    alpha = [float("nan"), *([1.0, 1.0, 1.0, 0.0] * 200)]
    found = predict_speedups(draft_scores("d", scored("a", alpha)), PROFILE, max_k=6)
    assert [entry.num_speculative_tokens for entry in found] == [1, 2, 3, 4, 5, 6]
    assert found[2].speedup == pytest.approx(4 / 1.6, rel=1e-2)
    assert found[2].acceptance_rate == pytest.approx(1.0, abs=1e-2)
    assert best(found) == found[2]


def test_without_hope_or_without_a_profile_there_is_no_best_k() -> None:
    hopeless = draft_scores("d", scored("a", [float("nan"), *([0.0] * 20)]))
    assert best(predict_speedups(hopeless, PROFILE)) is None
    unknown = predict_speedups(draft_scores("d", scored("a", [float("nan"), 1.0, 1.0])), None)
    assert best(unknown) is None
    assert all(entry.speedup is None for entry in unknown)


def test_a_profile_goes_through_its_file(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    PROFILE.write(path)
    assert CostProfile.read(path) == PROFILE
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        json.dumps({"schema_version": 2, "target": [[1, 1.0]], "draft": [[1, 1.0]]}),
        json.dumps({"schema_version": 1, "target": [], "draft": [[1, 1.0]]}),
        json.dumps({"schema_version": 1, "target": [[1, 0.0]], "draft": [[1, 1.0]]}),
        json.dumps({"schema_version": 1, "target": [[0, 1.0]], "draft": [[1, 1.0]]}),
        json.dumps({"schema_version": 1, "target": [["a", 1.0]], "draft": [[1, 1.0]]}),
        '{"schema_version": 1, "target": [[1, NaN]], "draft": [[1, 1.0]]}',
    ],
)
def test_a_damaged_profile_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidProfile, match="measure it again"):
        CostProfile.read(path)


def test_a_missing_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidProfile, match="cannot read"):
        CostProfile.read(tmp_path / "none.json")


def test_measured_from_two_runners() -> None:
    target, draft = (make_runner(tiny_model("llama", vocab_size=32, layers=n)) for n in (2, 1))
    profile = measure_profile(target, draft, machine="test")
    assert [size for size, _ in profile.target] == [1, 2, 4, 8, 16, 32]
    assert CostProfile.from_json(profile.to_json()) == profile
    assert profile.verify_cost(0) == 1.0
