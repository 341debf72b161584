"""The gate: whether a draft may go into service, from what held-out traffic says about it.

A pure function of numbers. It refuses when it cannot tell: too few positions, an interval that includes zero, a
number that is not finite. All reasons are given, not only the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from redraft.errors import ConfigError
from redraft_training.evaluate.comparison import Comparison, Gain


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over held-out positions with its confidence interval."""

    value: float
    low: float
    high: float
    num_positions: int

    def is_sound(self) -> bool:
        """Whether its numbers are finite and in order. The value may lie outside a bootstrap interval."""
        return all(map(math.isfinite, (self.value, self.low, self.high))) and self.low <= self.high


@dataclass(frozen=True, slots=True)
class GateInput:
    """What the evaluation of a candidate says, in units of expected acceptance, at each request's own sampling.

    Gains are candidate minus serving draft over the same positions (paired). Where no draft is serving, they are
    over no draft at all, whose expected acceptance is 0, so the gain is the candidate's own.
    """

    serving_version: str | None
    expected_acceptance: float
    """Of the candidate itself, in [0, 1]."""
    gain: Estimate
    domain_gains: Mapping[str, Estimate]
    """Empty name: requests that name no domain."""
    confidence: float
    """Of all intervals here, for example 0.95."""
    num_non_finite: int = 0
    """Positions at which a probability of either draft was NaN or infinite."""

    @classmethod
    def from_comparison(cls, comparison: Comparison, *, num_non_finite: int = 0) -> GateInput:
        """What `redraft_training.evaluate.comparison.compare` found."""
        return cls(
            serving_version=comparison.serving_version,
            expected_acceptance=comparison.overall.alpha_new,
            gain=_estimate(comparison.overall),
            domain_gains={name: _estimate(gain) for name, gain in comparison.domains.items()},
            confidence=comparison.confidence,
            num_non_finite=num_non_finite,
        )


@dataclass(frozen=True, slots=True)
class GateSettings:
    """What the gate asks for. Raises `ConfigError` for values that make no sense."""

    confidence: float = 0.95
    """The gain's interval must have at least this confidence, and exclude zero."""
    max_domain_loss: float = 0.02
    """No domain may lose more expected acceptance than this."""
    min_positions: int = 2000
    """Held-out positions, of all domains together."""
    min_domain_positions: int = 500
    """A domain with fewer is too noisy to be judged alone; it counts in the total."""
    min_first_acceptance: float = 0.05
    """Without a serving draft to beat: what the lower end of the interval must reach."""

    def __post_init__(self) -> None:
        if not 0.5 <= self.confidence < 1.0:
            raise ConfigError(f"confidence must be at least 0.5 and below 1, not {self.confidence}")
        for name in ("max_domain_loss", "min_first_acceptance"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must be between 0 and 1, not {getattr(self, name)}")
        for name in ("min_positions", "min_domain_positions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class GateDecision:
    """`reasons` say why not, one a line; one line says why, if `publish`."""

    publish: bool
    reasons: tuple[str, ...]

    @property
    def reason(self) -> str:
        """All reasons in one line."""
        return "; ".join(self.reasons)


def decide(evaluation: GateInput, settings: GateSettings) -> GateDecision:
    """Publish only a draft that held-out traffic shows to be better, and nowhere much worse.

    With a serving draft: the interval of the gain lies above zero, and no domain with enough positions loses more
    than `max_domain_loss` (its point estimate: asking the interval for that would refuse good drafts whenever one
    domain is thin). Without one there is nothing to lose, since the server drafts zero tokens where a draft does
    not pay; the draft must only show that it proposes at all. A number that is not finite refuses.
    """
    problems = _not_finite(evaluation)
    if not problems:
        problems = [*_too_little(evaluation, settings), *_not_better(evaluation, settings)]
        problems += _domains_worse(evaluation, settings)
    if problems:
        return GateDecision(False, tuple(problems))
    return GateDecision(True, (_praise(evaluation),))


def _not_finite(evaluation: GateInput) -> list[str]:
    problems = []
    if evaluation.num_non_finite:
        problems.append(f"{evaluation.num_non_finite} held-out positions have a probability that is not finite")
    if not math.isfinite(evaluation.expected_acceptance):
        problems.append("the expected acceptance is not a finite number")
    if not evaluation.gain.is_sound():
        problems.append("the gain is not a finite number with an interval")
    for domain, gain in sorted(evaluation.domain_gains.items()):
        if not gain.is_sound():
            problems.append(f"the gain in {_domain(domain)} is not a finite number with an interval")
    if not math.isfinite(evaluation.confidence):
        problems.append("the confidence of the intervals is not a finite number")
    return problems


def _too_little(evaluation: GateInput, settings: GateSettings) -> list[str]:
    problems = []
    if evaluation.gain.num_positions < settings.min_positions:
        problems.append(
            f"only {evaluation.gain.num_positions} held-out positions, {settings.min_positions} are needed: "
            "wait for more traffic"
        )
    if evaluation.confidence < settings.confidence:
        problems.append(f"the intervals have confidence {evaluation.confidence:g}, {settings.confidence:g} is needed")
    return problems


def _not_better(evaluation: GateInput, settings: GateSettings) -> list[str]:
    gain = evaluation.gain
    if evaluation.serving_version is None:
        if gain.low >= settings.min_first_acceptance:
            return []
        return [
            f"expected acceptance {gain.value:.4f} [{gain.low:.4f}, {gain.high:.4f}] may be below "
            f"{settings.min_first_acceptance:g}, the least for a first draft"
        ]
    if gain.low > 0.0:
        return []
    if gain.high < 0.0:
        return [f"worse than the serving draft: gain {_interval(gain)}"]
    return [f"not shown to be better than the serving draft: gain {_interval(gain)} includes zero"]


def _domains_worse(evaluation: GateInput, settings: GateSettings) -> list[str]:
    return [
        f"{_domain(domain)} loses {-gain.value:.4f} (gain {_interval(gain)}, {gain.num_positions} positions), "
        f"at most {settings.max_domain_loss:g} is allowed"
        for domain, gain in sorted(evaluation.domain_gains.items())
        if gain.num_positions >= settings.min_domain_positions and gain.value < -settings.max_domain_loss
    ]


def _praise(evaluation: GateInput) -> str:
    gain = evaluation.gain
    if evaluation.serving_version is None:
        return f"first draft: expected acceptance {gain.value:.4f} [{gain.low:.4f}, {gain.high:.4f}]"
    return f"expected acceptance {evaluation.expected_acceptance:.4f}, gain over the serving draft {_interval(gain)}"


def _interval(gain: Estimate) -> str:
    return f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"


def _domain(name: str) -> str:
    return f"domain {name}" if name else "traffic without a domain"


def _estimate(gain: Gain) -> Estimate:
    return Estimate(gain.gain, gain.low, gain.high, gain.num_positions)
