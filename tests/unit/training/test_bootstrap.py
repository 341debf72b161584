"""The interval covers the truth as often as it says, which needs whole requests to be drawn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from redraft_training.evaluate.bootstrap import Floats, paired_bootstrap, t_quantile

TRUTH = 0.03


def requests(rng: np.random.Generator, count: int) -> list[Floats]:
    """Differences per position: requests of 3 to 40 positions that have a level of their own."""
    return [
        np.clip(TRUTH + rng.normal(0.0, 0.12) + rng.normal(0.0, 0.1, size=rng.integers(3, 41)), -1.0, 1.0)
        for _ in range(count)
    ]


def coverage(count: int, *, by_position: bool, repeats: int = 400) -> float:
    rng = np.random.default_rng(20)
    hits = 0
    for repeat in range(repeats):
        parts = requests(rng, count)
        if by_position:
            sums, counts = np.concatenate(parts), np.ones(sum(map(len, parts)))
        else:
            sums, counts = np.array([part.sum() for part in parts]), np.array([float(len(part)) for part in parts])
        found = paired_bootstrap(sums, counts, seed=repeat, num_resamples=600)
        hits += found.low <= TRUTH <= found.high
    return hits / repeats


@pytest.mark.parametrize("count", [8, 40])
def test_coverage(count: int) -> None:
    """95% nominal; the standard error of 400 repeats is 1.1%."""
    assert 0.915 <= coverage(count, by_position=False) <= 0.985


def test_resampling_positions_would_be_overconfident() -> None:
    """Why requests are drawn: the same data, position by position, covers far too rarely."""
    assert coverage(40, by_position=True, repeats=150) < 0.8


def test_the_p_value_is_uniform_without_a_difference() -> None:
    rng = np.random.default_rng(3)
    p_values = []
    for repeat in range(300):
        sums = rng.normal(0.0, 1.0, size=50)
        p_values.append(paired_bootstrap(sums, np.full(50, 10.0), seed=repeat, num_resamples=500).p_value)
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_same_seed_same_interval() -> None:
    sums, counts = np.arange(10.0) / 10, np.full(10, 3.0)
    assert paired_bootstrap(sums, counts, seed=1) == paired_bootstrap(sums, counts, seed=1)
    assert paired_bootstrap(sums, counts, seed=1) != paired_bootstrap(sums, counts, seed=2)


def test_the_mean_weighs_requests_by_their_positions() -> None:
    found = paired_bootstrap(np.array([1.0, 0.0]), np.array([1.0, 9.0]), seed=0)
    assert found.mean == 0.1
    assert found.low <= found.mean <= found.high


def test_clear_and_absent_differences() -> None:
    counts = np.full(30, 10.0)
    clear = paired_bootstrap(counts * 0.2, counts, seed=0)
    assert (clear.low, clear.high) == (pytest.approx(0.2), pytest.approx(0.2))
    assert clear.p_value < 0.001
    absent = paired_bootstrap(np.zeros(30), counts, seed=0)
    assert (absent.low, absent.high, absent.p_value) == (0.0, 0.0, 1.0)


def test_one_request_says_nothing() -> None:
    found = paired_bootstrap(np.array([5.0]), np.array([10.0]), seed=0)
    assert (found.mean, found.low, found.high, found.p_value) == (0.5, -1.0, 1.0, 1.0)


def test_more_draws_than_fit_at_once() -> None:
    """Chunked and unchunked draws are the same stream: 3 requests fit any chunk, 2000 need several."""
    rng = np.random.default_rng(0)
    sums, counts = rng.normal(0.05, 0.3, size=2000) * 10, np.full(2000, 10.0)
    found = paired_bootstrap(sums, counts, seed=0, num_resamples=1500)
    width = 2 * 1.96 * sums.std(ddof=1) / 10 / np.sqrt(2000)
    assert found.high - found.low == pytest.approx(width, rel=0.1)


@pytest.mark.parametrize(("sums", "counts"), [([], []), ([1.0], [0.0]), ([1.0, 2.0], [1.0]), ([1.0, 1.0], [1.0, -1.0])])
def test_bad_input(sums: list[float], counts: list[float]) -> None:
    with pytest.raises(ValueError, match="positive count"):
        paired_bootstrap(np.array(sums), np.array(counts), seed=0)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 10, 30, 200])
@pytest.mark.parametrize("probability", [0.9, 0.95, 0.975, 0.995])
def test_t_quantile(probability: float, degrees: int) -> None:
    rel = 0.03 if degrees == 3 else 0.01
    assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=rel)
