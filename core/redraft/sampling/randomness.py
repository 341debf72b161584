"""Counter-based randomness: every number is a pure function of (key, position, purpose[, token id]).

Nothing here has state, so a request's numbers never depend on its neighbours, on how many tokens were drafted, or on
how often a step was repeated. A *key* is 64 bits per sequence; a *position* is the index of the token in the
completion; a *purpose* keeps uses apart that must be independent. The mixing functions are the finalisers of
SplitMix64 (Steele et al., 2014) for single numbers and of MurmurHash3 (32 bit) for whole vocabularies.
"""

from __future__ import annotations

import secrets
from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

from redraft.kernels.library import library
from redraft.transfer import upload

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Purpose(IntEnum):
    DRAFT = 1  # which token the draft proposes
    ACCEPT = 2  # whether a drafted token is accepted
    RECOVER = 3  # which token is drawn when one is rejected, and the bonus token
    RACE = 4  # the exponential race both models share under the drafter-invariant coupling


def mix64(value: int) -> int:
    """SplitMix64 finaliser on a Python integer."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def sequence_key(seed: int | None, sample_index: int) -> int:
    """The key of one completion. Without a seed it is fresh; with one it depends on (seed, sample_index) alone."""
    if seed is None:
        return secrets.randbits(64)
    return mix64((mix64((seed + _GOLDEN) & _MASK64) + (sample_index + 1) * _GOLDEN) & _MASK64)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def as_key_tensor(keys: list[int], device: torch.device | str = "cpu") -> Tensor:
    """Unsigned 64-bit keys as the bit-equal int64 tensor [len(keys)]."""
    return upload([_signed(key) for key in keys], torch.int64, device)


def _shift_right(value: Tensor, bits: int, width: int) -> Tensor:
    # torch shifts signed integers arithmetically; the mask drops the copied sign bits
    return (value >> bits) & ((1 << (width - bits)) - 1)


def _mix64(value: Tensor) -> Tensor:
    value = (value ^ _shift_right(value, 30, 64)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shift_right(value, 27, 64)) * _signed(0x94D049BB133111EB)
    return value ^ _shift_right(value, 31, 64)


def row_bits(keys: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
    """64 random bits a row: keys [rows] int64, positions [rows] int64 -> [rows] int64."""
    kernels = library() if keys.device.type == "cpu" else None
    if kernels is not None:
        return kernels.row_bits(keys.contiguous(), positions.contiguous(), int(purpose))
    counter = _mix64(keys + (positions + 1) * _signed(_GOLDEN))
    return _mix64(counter + _signed((int(purpose) * 0xD1B54A32D192ED03) & _MASK64))


def uniforms(keys: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
    """[rows] float64 in the open interval (0, 1), 52 random bits each: with 53, adding a half could round up to 1."""
    kernels = library() if keys.device.type == "cpu" else None
    if kernels is not None:
        return kernels.uniforms(keys.contiguous(), positions.contiguous(), int(purpose))
    bits = _shift_right(row_bits(keys, positions, purpose), 12, 64)
    return (bits.double() + 0.5) * 2.0**-52


@lru_cache(maxsize=8)
def _token_counters(vocab_size: int, device: torch.device) -> Tensor:
    return (torch.arange(vocab_size, dtype=torch.int64, device=device) * 0x9E3779B1).to(torch.int32)


def _mix32_(value: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser, in place on an int32 tensor."""
    value ^= _shift_right(value, 16, 32)
    value *= 0x85EBCA6B - (1 << 32)
    value ^= _shift_right(value, 13, 32)
    value *= 0xC2B2AE35 - (1 << 32)
    value ^= _shift_right(value, 16, 32)
    return value


def exponentials(keys: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard exponential numbers E[row, token], float32 [rows, vocab_size], keyed by (key, position, token).

    32 random bits a number: the smallest value is 2^-33, so a token of probability far below 1e-9 is drawn at a
    slightly wrong rate, far below float32's own resolution of the probabilities.
    """
    bits = row_bits(keys, positions, Purpose.RACE)
    low = bits.to(torch.int32).unsqueeze(1)
    high = _shift_right(bits, 32, 64).to(torch.int32).unsqueeze(1)
    mixed = _mix32_(_token_counters(vocab_size, keys.device).unsqueeze(0) + low)
    mixed ^= high
    unsigned = _mix32_(mixed).float()
    unsigned += torch.where(unsigned < 0, 2.0**32, 0.0)
    # u close to 0 gives the small values that win races; float32 is finest there
    # u that rounds to 1 would give infinity, which loses even a race of one
    return unsigned.add_(0.5).mul_(-(2.0**-32)).log1p_().neg_().clamp_(max=32.0)
