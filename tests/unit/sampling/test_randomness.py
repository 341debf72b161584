"""The randomness is a pure function of its counters, and good enough. Fixed keys: every p-value here is a constant."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from redraft.sampling.randomness import (
    Purpose,
    as_key_tensor,
    exponentials,
    mix64,
    row_bits,
    sequence_key,
    uniforms,
)

SUSPICIOUS = 1e-4


def grid(num_keys: int, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every key at every position, keys outermost."""
    keys = as_key_tensor([sequence_key(seed, 0) for seed in range(num_keys)])
    return keys.repeat_interleave(num_positions), torch.arange(num_positions).repeat(num_keys)


def assert_uniform(values: np.ndarray, bins: int = 64) -> None:
    counts = np.histogram(values, bins=bins, range=(0.0, 1.0))[0]
    assert stats.chisquare(counts).pvalue > SUSPICIOUS


def assert_independent(left: np.ndarray, right: np.ndarray, bins: int = 12) -> None:
    """Chi-square on the joint histogram: uniform on the square if both are uniform and independent."""
    counts = np.histogram2d(left, right, bins=bins, range=((0, 1), (0, 1)))[0]
    assert stats.chisquare(counts.ravel()).pvalue > SUSPICIOUS


def test_golden_values() -> None:
    """Stored seeds must keep giving the same text: a change here is a breaking change."""
    assert mix64(0) == 0
    assert sequence_key(0, 0) == 12035550249420947055
    assert sequence_key(2**64 - 1, 3) == 17099427627622095284
    keys, positions = as_key_tensor([7, 2**64 - 1]), torch.tensor([0, 5])
    assert row_bits(keys, positions, Purpose.RACE).tolist() == [4766917483082862312, -6779041691198104081]
    noise = exponentials(keys[:1], torch.tensor([3]), 3)[0].tolist()
    assert noise == pytest.approx([0.89586276, 5.17434216, 2.68769526], rel=1e-6)


@pytest.mark.parametrize("purpose", list(Purpose))
def test_numbers_do_not_depend_on_the_batch(purpose: Purpose) -> None:
    keys, positions = grid(5, 7)
    together = uniforms(keys, positions, purpose)
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniforms(keys[order], positions[order], purpose), together[order])
    noise = exponentials(keys, positions, 33)
    assert torch.equal(exponentials(keys[order], positions[order], 33), noise[order])
    for index in range(len(keys)):
        one = slice(index, index + 1)
        assert torch.equal(uniforms(keys[one], positions[one], purpose), together[one])
        assert torch.equal(exponentials(keys[one], positions[one], 33), noise[one])


def test_a_tokens_number_does_not_depend_on_the_vocabulary_size() -> None:
    keys, positions = grid(3, 4)
    assert torch.equal(exponentials(keys, positions, 1000)[:, :17], exponentials(keys, positions, 17))


def test_calls_leave_no_trace() -> None:
    keys, positions = grid(2, 2)
    before = torch.get_rng_state()
    first = exponentials(keys, positions, 50)
    first.mul_(0)  # a caller that scribbles over the result must not harm the next call
    assert float(exponentials(keys, positions, 50).min()) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_uniforms_lie_in_the_open_interval_and_are_uniform() -> None:
    for purpose in Purpose:
        values = uniforms(*grid(8, 8192), purpose).numpy()
        assert values.dtype == np.float64
        assert 0.0 < values.min() < 1e-3
        assert 1 - 1e-3 < values.max() < 1.0
        assert_uniform(values)
        assert stats.kstest(values, "uniform").pvalue > SUSPICIOUS


@pytest.mark.parametrize("bits", [0, -1, 1 << 62, -(1 << 63), (1 << 63) - 1])
def test_no_bit_pattern_rounds_to_an_end_of_the_interval(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redraft.sampling.randomness.row_bits", lambda *_: torch.tensor([bits]))
    value = float(uniforms(torch.tensor([0]), torch.tensor([0]), Purpose.ACCEPT))
    assert 0.0 < value < 1.0


def test_purposes_are_independent_of_each_other() -> None:
    keys, positions = grid(4, 8192)
    values = {purpose: uniforms(keys, positions, purpose).numpy() for purpose in Purpose}
    for left, right in itertools.combinations(Purpose, 2):
        assert_independent(values[left], values[right])


@pytest.mark.parametrize("lag", [1, 2, 7])
def test_positions_are_independent_of_each_other(lag: int) -> None:
    values = uniforms(*grid(4, 8192 + lag), Purpose.ACCEPT).numpy().reshape(4, -1)
    assert_independent(values[:, :-lag].ravel(), values[:, lag:].ravel())


def test_neighbouring_keys_and_samples_are_independent() -> None:
    positions = torch.arange(16384)
    for left, right in [((0, 0), (1, 0)), ((0, 0), (0, 1)), ((5, 1), (6, 0)), ((0, 0), (2**63, 0))]:
        streams = [
            uniforms(as_key_tensor([sequence_key(*which)]).expand(16384), positions, Purpose.DRAFT).numpy()
            for which in (left, right)
        ]
        assert_independent(streams[0], streams[1])


def test_keys_used_as_they_are_give_independent_streams() -> None:
    """Even raw keys 0, 1, 2, ...: the counter is mixed, so a weak key does not weaken the stream."""
    keys = torch.arange(16384)
    first = uniforms(keys, torch.zeros_like(keys), Purpose.ACCEPT).numpy()
    assert_uniform(first)
    assert_independent(first, uniforms(keys + 1, torch.zeros_like(keys), Purpose.ACCEPT).numpy())


def test_exponentials_follow_their_law() -> None:
    values = exponentials(*grid(8, 16), 4096).numpy()
    assert values.dtype == np.float32
    assert values.min() > 0
    assert np.isfinite(values).all()
    assert stats.kstest(values.ravel()[::2], "expon").pvalue > SUSPICIOUS
    assert_uniform(np.exp(-values.astype(np.float64)).ravel())
    # the small ones win races: their law once more, magnified
    small = values[values < 2.0**-10].astype(np.float64)
    assert stats.kstest(-np.expm1(-small) / -np.expm1(-(2.0**-10)), "uniform").pvalue > SUSPICIOUS


def test_exponentials_are_independent_across_tokens_positions_and_keys() -> None:
    values = np.exp(-exponentials(*grid(8, 9), 2048).numpy().astype(np.float64)).reshape(8, 9, 2048)
    assert_independent(values[:, :, :-1].ravel(), values[:, :, 1:].ravel())
    assert_independent(values[:, :-1].ravel(), values[:, 1:].ravel())
    assert_independent(values[:-1].ravel(), values[1:].ravel())
    race, accept = values[:, :, 0], uniforms(*grid(8, 9), Purpose.ACCEPT).numpy().reshape(8, 9)
    assert abs(np.corrcoef(race.ravel(), accept.ravel())[0, 1]) < 0.4


def test_the_winner_of_a_fair_race_is_uniform() -> None:
    winners = exponentials(*grid(16, 2048), 50).argmin(dim=1)
    assert stats.chisquare(np.bincount(winners.numpy(), minlength=50)).pvalue > SUSPICIOUS
    pairs = winners.reshape(16, 2048)
    joint = np.histogram2d(pairs[:, :-1].ravel(), pairs[:, 1:].ravel(), bins=10, range=((0, 50), (0, 50)))[0]
    assert stats.chisquare(joint.ravel()).pvalue > SUSPICIOUS


def test_sequence_keys_do_not_collide() -> None:
    keys = {sequence_key(seed, sample) for seed in range(2000) for sample in range(20)}
    assert len(keys) == 2000 * 20
    assert all(0 <= key < 2**64 for key in keys)
    assert len({sequence_key(2**64 - 1 - seed, 0) for seed in range(100)} | keys) == 2000 * 20 + 100


def test_without_a_seed_keys_are_fresh_and_with_one_they_are_not() -> None:
    assert len({sequence_key(None, 0) for _ in range(100)}) == 100
    assert sequence_key(3, 1) == sequence_key(3, 1)


def test_key_tensors_keep_every_bit() -> None:
    keys = [0, 1, 2**63 - 1, 2**63, 2**64 - 1]
    assert [value % 2**64 for value in as_key_tensor(keys).tolist()] == keys
