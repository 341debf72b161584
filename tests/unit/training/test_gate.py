"""The gate refuses whatever it cannot tell, and says why."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from redraft.errors import ConfigError
from redraft_training.evaluate.comparison import Comparison, Gain
from redraft_training.gate import Estimate, GateInput, GateSettings, decide

SETTINGS = GateSettings()
BETTER = Estimate(value=0.05, low=0.02, high=0.08, num_positions=4000)
EVALUATION = GateInput(
    serving_version="v1",
    expected_acceptance=0.55,
    gain=BETTER,
    domain_gains={"sql": replace(BETTER, num_positions=2000), "python": replace(BETTER, value=-0.01, low=-0.03)},
    confidence=0.95,
)
FIRST = replace(EVALUATION, serving_version=None, gain=Estimate(0.3, 0.28, 0.32, 4000), domain_gains={})


def decided(evaluation: GateInput, **changes: Any) -> tuple[bool, str]:
    decision = decide(replace(evaluation, **changes), SETTINGS)
    return decision.publish, decision.reason


def test_a_better_draft_is_published() -> None:
    assert decided(EVALUATION) == (
        True,
        "expected acceptance 0.5500, gain over the serving draft +0.0500 [+0.0200, +0.0800]",
    )


@pytest.mark.parametrize(
    ("low", "high", "why"),
    [
        (-0.001, 0.08, "includes zero"),
        (0.0, 0.08, "includes zero"),
        (-0.05, 0.0, "includes zero"),
        (-0.05, -0.01, "worse than the serving draft"),
    ],
)
def test_the_interval_must_exclude_zero(low: float, high: float, why: str) -> None:
    publish, reason = decided(EVALUATION, gain=Estimate((low + high) / 2, low, high, 4000))
    assert not publish
    assert why in reason


def test_a_domain_that_loses_too_much_refuses() -> None:
    lost = Estimate(value=-0.021, low=-0.03, high=-0.01, num_positions=500)
    publish, reason = decided(EVALUATION, domain_gains={"sql": BETTER, "python": lost})
    assert not publish
    assert reason.startswith("domain python loses 0.0210")
    assert decided(EVALUATION, domain_gains={"python": replace(lost, value=-0.02)})[0]  # the margin is allowed
    assert decided(EVALUATION, domain_gains={"python": replace(lost, num_positions=499)})[0]  # too few to judge
    assert "traffic without a domain" in decided(EVALUATION, domain_gains={"": lost})[1]


def test_too_few_positions_and_too_narrow_intervals_refuse_with_all_reasons() -> None:
    decision = decide(
        replace(EVALUATION, gain=Estimate(0.0, -0.1, 0.1, 1999), confidence=0.9), GateSettings(min_positions=2000)
    )
    assert not decision.publish
    assert [reason.split()[0] for reason in decision.reasons] == ["only", "the", "not"]
    assert "1999" in decision.reason
    assert decided(EVALUATION, gain=replace(BETTER, num_positions=2000), confidence=0.99)[0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["value", "low", "high"])
def test_what_is_not_finite_refuses_wherever_it_is(value: float, field: str) -> None:
    bad = replace(BETTER, **{field: value})
    thin = replace(bad, num_positions=1)  # also where the domain would not be judged
    for change in ({"gain": bad}, {"domain_gains": {"sql": BETTER, "python": thin}}):
        publish, reason = decided(EVALUATION, **change)
        assert not publish
        assert "not a finite number" in reason
    assert not decided(EVALUATION, expected_acceptance=value)[0]
    assert not decided(EVALUATION, confidence=value)[0]
    assert not decided(FIRST, gain=bad)[0]


def test_positions_that_are_not_finite_refuse() -> None:
    assert decided(EVALUATION, num_non_finite=1) == (
        False,
        "1 held-out positions have a probability that is not finite",
    )


def test_an_interval_upside_down_refuses() -> None:
    assert not decided(EVALUATION, gain=replace(BETTER, low=0.09))[0]


def test_a_first_draft_must_show_that_it_proposes() -> None:
    assert decided(FIRST) == (True, "first draft: expected acceptance 0.3000 [0.2800, 0.3200]")
    publish, reason = decided(FIRST, gain=Estimate(0.06, 0.049, 0.07, 4000))
    assert not publish
    assert "may be below 0.05" in reason
    assert not decided(FIRST, gain=Estimate(0.3, 0.28, 0.32, 10))[0]


@pytest.mark.parametrize(
    "change",
    [
        {"confidence": 1.0},
        {"confidence": 0.4},
        {"confidence": math.nan},
        {"max_domain_loss": -0.1},
        {"max_domain_loss": math.nan},
        {"min_first_acceptance": 2.0},
        {"min_positions": 0},
        {"min_domain_positions": 0},
    ],
)
def test_settings_are_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        GateSettings(**change)


def test_from_the_evaluation() -> None:
    overall = Gain(0.5, 0.55, 0.02, 0.08, 0.001, 4000, 50)
    sql = Gain(0.6, 0.5, -0.15, -0.05, 0.001, 900, 12)
    comparison = Comparison("v2", "v1", overall, {"sql": sql}, {}, {}, (), (), confidence=0.95, seed=0)
    evaluation = GateInput.from_comparison(comparison)
    assert (evaluation.serving_version, evaluation.expected_acceptance, evaluation.confidence) == ("v1", 0.55, 0.95)
    assert evaluation.gain == Estimate(pytest.approx(0.05), 0.02, 0.08, 4000)
    assert evaluation.domain_gains == {"sql": Estimate(pytest.approx(-0.1), -0.15, -0.05, 900)}
    decision = decide(evaluation, SETTINGS)
    assert (decision.publish, len(decision.reasons)) == (False, 1)
    assert GateInput.from_comparison(comparison, num_non_finite=3).num_non_finite == 3


def test_a_draft_that_is_no_better_is_refused_at_the_stated_confidence() -> None:
    """The whole rule on planted noise: of 400 equally good drafts at most 2.5% (one side of 95%) pass, plus noise."""
    random = np.random.default_rng(0)
    passed = 0
    for _ in range(400):
        sample = random.normal(0.0, 0.2, 2500)
        error = 1.96 * sample.std() / math.sqrt(len(sample))
        mean = float(sample.mean())
        gain = Estimate(mean, mean - error, mean + error, len(sample))
        passed += decide(replace(EVALUATION, gain=gain, domain_gains={}), SETTINGS).publish
    assert 0 < passed <= 20  # 10 expected; P(more than 20) < 0.1%
