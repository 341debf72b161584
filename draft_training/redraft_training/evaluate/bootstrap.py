"""Paired bootstrap of a difference of means over positions, resampling requests.

The positions of one request are not independent (a request on which the draft is good is good throughout), so whole
requests are drawn, with all their positions and samples; resampling positions would claim far too much certainty.
Both drafts are scored on the same positions and only their difference is looked at, which takes out how hard a request
is. The interval is the percentile one, its tails widened for the number of requests: bare percentile intervals are too
short by sqrt((n-1)/n) and by normal instead of t quantiles (Hesterberg 2015, "What Teachers Should Know About the
Bootstrap", section 5.3: the expanded percentile interval).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

DEFAULT_RESAMPLES = 10_000
_DRAWS_AT_ONCE = 1 << 20  # indices of requests drawn at a time: 8 MB
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean difference with its confidence interval.

    `p_value`: two-sided, of no difference; 1 with fewer than two requests, for which the interval is [-1, 1].
    """

    mean: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(
    differences: Floats,
    counts: Floats,
    *,
    seed: int,
    confidence: float = 0.95,
    num_resamples: int = DEFAULT_RESAMPLES,
) -> Interval:
    """Interval of Σ differences / Σ counts.

    Args:
        differences: [requests] sum over a request's positions of candidate minus baseline, each within [-1, 1].
        counts: [requests] its number of positions, all positive.
        seed: the same input and seed give the same interval.

    Raises ValueError if there is no request, or the arguments do not fit together.
    """
    if len(differences) != len(counts) or not len(counts) or not (counts > 0).all():
        raise ValueError("one difference and one positive count per request, and at least one request")
    if not 0.0 < confidence < 1.0 or num_resamples < 1:
        raise ValueError("confidence lies between 0 and 1, and there is at least one resample")
    mean = float(differences.sum() / counts.sum())
    num_requests = len(counts)
    if num_requests < 2:
        return Interval(mean, -1.0, 1.0, 1.0)
    means = _resampled_means(differences, counts, np.random.default_rng(seed), num_resamples)
    tail = _expanded_tail((1.0 - confidence) / 2.0, num_requests)
    low, high = np.quantile(means, [tail, 1.0 - tail]).tolist()
    # one more on both counts: a p-value of 0 is more than so many draws can say
    below, above = int((means <= 0.0).sum()), int((means >= 0.0).sum())
    p_value = min(1.0, 2.0 * (min(below, above) + 1) / (num_resamples + 1))
    return Interval(mean, low, high, p_value)


def _resampled_means(differences: Floats, counts: Floats, rng: np.random.Generator, num_resamples: int) -> Floats:
    """[num_resamples]: the mean over as many requests, drawn with replacement."""
    num_requests = len(counts)
    means = np.empty(num_resamples)
    step = max(1, _DRAWS_AT_ONCE // num_requests)
    for first in range(0, num_resamples, step):
        rows = min(step, num_resamples - first)
        drawn = rng.integers(num_requests, size=(rows, num_requests))
        means[first : first + rows] = differences[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return means


def _expanded_tail(tail: float, num_requests: int) -> float:
    """The share to cut from each side so that a normal percentile interval has the width of a t interval."""
    inflated = math.sqrt(num_requests / (num_requests - 1)) * t_quantile(1.0 - tail, num_requests - 1)
    return _NORMAL.cdf(-inflated)


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t: exact for 1 and 2 degrees of freedom, else the Cornish-Fisher series (Abramowitz and
    Stegun 26.7.5), off by less than 0.6% from 3 degrees on at a probability of 0.975."""
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        return (2.0 * probability - 1.0) / math.sqrt(2.0 * probability * (1.0 - probability))
    z = _NORMAL.inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(degrees) ** (order + 1) for order, term in enumerate(terms))
