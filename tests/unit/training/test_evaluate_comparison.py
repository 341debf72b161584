"""Pairing, gains, and what gate and manifest get."""

from __future__ import annotations

import numpy as np
import pytest

from redraft_training.evaluate.comparison import Comparison, compare
from redraft_training.evaluate.errors import EvaluationError, NothingToScore
from redraft_training.evaluate.scores import DraftScores
from redraft_training.evaluate.speedup import CostProfile
from redraft_training.gate import GateInput, GateSettings, decide
from tests.unit.training.evaluate_examples import draft_scores, scored

NAN = float("nan")
PROFILE = CostProfile(((1, 0.010), (32, 0.020)), ((1, 0.001), (8, 0.002)))


def sampled(version: str, *, sql: float, chat: float, seed: int, count: int = 60) -> DraftScores:
    """Requests of two domains with α scattered around the given levels."""
    rng = np.random.default_rng(seed)
    parts = []
    for index in range(count):
        domain, level = (("sql", sql), ("chat", chat))[index % 2]
        alpha = np.clip(rng.normal(level, 0.1, size=20), 0.0, 1.0)
        alpha[0] = np.nan
        parts.append(scored(f"r{index}", alpha.tolist(), domain=domain))
    return draft_scores(version, *parts)


@pytest.fixture(scope="module")
def found() -> Comparison:
    return compare(
        sampled("new", sql=0.7, chat=0.4, seed=1), sampled("old", sql=0.4, chat=0.4, seed=2), profile=PROFILE
    )


def test_gain_overall_and_by_domain(found: Comparison) -> None:
    assert found.overall.low < 0.15 < found.overall.high
    assert found.overall.low > 0.0
    assert found.overall.gain == pytest.approx(found.overall.alpha_new - found.overall.alpha_old)
    assert found.domains["sql"].low > 0.2
    assert found.domains["chat"].low < 0.0 < found.domains["chat"].high
    assert found.domains["sql"].num_positions == 30 * 19
    assert found.domains["sql"].num_requests == 30
    assert found.gap_recovered == pytest.approx(found.overall.gain / (1.0 - found.overall.alpha_old))
    assert found.best_new is not None
    assert found.best_old is not None
    assert found.best_new.speedup > found.best_old.speedup  # type: ignore[operator]
    assert sum(entry.num_positions for entry in found.positions.values()) == found.overall.num_positions


def test_json_round_trip(found: Comparison) -> None:
    assert Comparison.from_json(found.to_json()) == found


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 2}', '{"schema_version": 1, "overall": 3}'])
def test_damaged_json_is_refused(text: str) -> None:
    with pytest.raises(EvaluationError, match="evaluate again"):
        Comparison.from_json(text)


def test_the_order_of_examples_does_not_matter(found: Comparison) -> None:
    new, old = sampled("new", sql=0.7, chat=0.4, seed=1), sampled("old", sql=0.4, chat=0.4, seed=2)
    again = compare(draft_scores("new", *reversed(new.examples)), old, profile=PROFILE)
    assert (again.overall, again.domains) == (found.overall, found.domains)


def test_only_common_positions_count() -> None:
    new = draft_scores("new", scored("a", [NAN, 1.0, 0.5, NAN]), scored("b", [NAN, 1.0]), scored("c", [NAN, 0.0]))
    old = draft_scores("old", scored("a", [NAN, 0.5, NAN, 0.0]), scored("c", [NAN, 0.0]), scored("d", [NAN, 1.0]))
    found = compare(new, old)
    assert (found.overall.alpha_old, found.overall.alpha_new) == (0.25, 0.5)
    assert (found.overall.num_positions, found.overall.num_requests) == (2, 2)


def test_samples_of_a_request_are_one_draw() -> None:
    parts = [scored("a", [NAN, 0.5, 0.5], sample_index=index) for index in range(8)]
    found = compare(draft_scores("new", *parts), draft_scores("old", *parts))
    assert (found.overall.num_requests, found.overall.num_positions) == (1, 16)
    assert (found.overall.low, found.overall.high) == (-1.0, 1.0)


def test_without_a_serving_draft_the_baseline_is_no_speculation() -> None:
    found = compare(sampled("new", sql=0.7, chat=0.4, seed=1), None)
    assert found.serving_version is None
    assert found.overall.alpha_old == 0.0
    assert found.gap_recovered == pytest.approx(found.overall.alpha_new)
    assert found.speedups_old == ()
    summary = found.to_summary(4)
    assert (summary.baseline_version, summary.baseline_expected_acceptance, summary.gain_low) == (None, None, None)


def test_nothing_in_common() -> None:
    with pytest.raises(NothingToScore, match="in common"):
        compare(draft_scores("new", scored("a", [NAN, 1.0])), draft_scores("old", scored("b", [NAN, 1.0])))
    with pytest.raises(EvaluationError, match="different outputs"):
        compare(draft_scores("new", scored("a", [NAN, 1.0])), draft_scores("old", scored("a", [NAN, 1.0, 1.0])))


def test_a_perfect_serving_draft_leaves_no_gap() -> None:
    perfect = [scored(str(i), [NAN, 1.0, 1.0]) for i in range(3)]
    assert compare(draft_scores("new", *perfect), draft_scores("old", *perfect)).gap_recovered == 0.0


def test_what_the_manifest_keeps(found: Comparison) -> None:
    summary = found.to_summary(4)
    assert summary.expected_acceptance == found.overall.alpha_new
    assert summary.per_domain == {name: gain.alpha_new for name, gain in found.domains.items()}
    assert (summary.baseline_version, summary.gain_low) == ("old", found.overall.low)
    assert summary.mean_acceptance_length == found.speedups_new[3].mean_acceptance_length
    assert found.to_summary(100).mean_acceptance_length == found.speedups_new[-1].mean_acceptance_length


def test_the_gate_takes_it(found: Comparison) -> None:
    settings = GateSettings(min_positions=100, min_domain_positions=100)
    assert decide(GateInput.from_comparison(found), settings).publish
    worse = compare(sampled("old", sql=0.4, chat=0.4, seed=2), sampled("new", sql=0.7, chat=0.4, seed=1))
    assert not decide(GateInput.from_comparison(worse), settings).publish
