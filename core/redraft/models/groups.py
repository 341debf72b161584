"""Weights in groups of 32 along a row's inputs: w = d * q + m, as GGUF's Q4_1 and Q8_0 store them.

`d` and `m` are fp16 and q an integer (4 bits: 0 .. 15; 8 bits: -127 .. 127, and no m). The product d * q is exact in
float32, so there is one number that a group stands for, whoever computes it. A checkpoint that was made from such a
file holds exactly these numbers, and its groups can be found again; for any other the nearest are chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from redraft.kernels.library import GROUP

_SAMPLE_ROWS = 16


@dataclass(frozen=True, slots=True)
class Groups:
    """A weight [out, in] in groups, in = 32 * groups.

    Attributes:
        bits: 4 or 8.
        values: uint8 (4 bits) or int8 (8 bits) [out, groups, 32].
        scale: float16 [out, groups].
        minimum: float16 [out, groups]; zeros with 8 bits.
    """

    bits: int
    values: Tensor
    scale: Tensor
    minimum: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.values, self.scale, self.minimum

    def dequantise(self) -> Tensor:
        """The float32 weight [out, in] that the groups stand for."""
        scale, minimum = self.scale.float().unsqueeze(-1), self.minimum.float().unsqueeze(-1)
        return (self.values.float() * scale + minimum).flatten(1)


def remember_groups(linear: nn.Linear, groups: Groups) -> None:
    """Say that the groups stand for exactly the layer's weight, for whoever packs it."""
    linear.__dict__["_redraft_groups"] = groups


def groups_of(linear: nn.Linear) -> Groups | None:
    """What `remember_groups` has said."""
    found: Groups | None = linear.__dict__.get("_redraft_groups")
    return found


def nearest_groups(weight: Tensor, bits: int) -> Groups:
    """float32 [out, in], in a multiple of 32 -> its groups, rounded to the nearest."""
    rows = _grouped(weight)
    if bits == 8:
        scale, minimum = (rows.abs().amax(-1) / 127).half(), torch.zeros(rows.shape[:2], dtype=torch.float16)
    else:
        minimum = rows.amin(-1).half()
        scale = ((rows.amax(-1) - minimum.float()) / 15).half()
    return _rounded(rows, bits, scale, minimum)


def exact_groups(weight: Tensor, bits: int) -> Groups | None:
    """The groups that stand for exactly this weight; None if it has no such groups."""
    if weight.shape[1] % GROUP:
        return None
    sample = weight.shape[0] // _SAMPLE_ROWS
    if sample > 1 and exact_groups(weight[::sample], bits) is None:
        return None  # found out without a search through all of it
    rows = _grouped(weight)
    found = nearest_groups(weight, bits)
    wrong = ~_holds(found, rows)
    for scale, minimum in _candidates(rows, bits):
        if not wrong.any():
            return found
        left = rows[wrong].unsqueeze(1)
        tried = _rounded(left, bits, scale[wrong].unsqueeze(1), minimum[wrong].unsqueeze(1))
        right = _holds(tried, left).squeeze(1)
        where = wrong.clone()
        where[wrong] = right
        for ours, better in zip(found.tensors, tried.tensors, strict=True):
            ours[where] = better.squeeze(1)[right]
        wrong &= ~where
    return None if wrong.any() else found


def _candidates(rows: Tensor, bits: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales and minima [out, groups] that files are written with, the likely first: the group's extremes may lie at
    any two of the levels, and the quotient of rounded numbers may be a last place off."""
    low, high = rows.amin(-1), rows.amax(-1)
    if bits == 8:
        none = torch.zeros(low.shape, dtype=torch.float16)
        for level in range(127, 119, -1):
            for scale in _neighbours(torch.maximum(high, -low) / level):
                yield scale, none
        return
    for span in range(15, 6, -1):
        for scale in _neighbours((high - low) / span):
            yield scale, low.half()
    largest = torch.where(high > -low, high, low)
    for scale in _neighbours(largest / -8):  # Q4_0, whose scale may be negative
        yield scale, largest.half()


def _neighbours(scale: Tensor) -> list[Tensor]:
    """A scale as fp16, and the next smaller and larger."""
    half = scale.half()
    bits = half.view(torch.int16)
    return [half, (bits + 1).view(torch.float16), (bits - 1).view(torch.float16)]


def _grouped(weight: Tensor) -> Tensor:
    return weight.detach().float().reshape(weight.shape[0], -1, GROUP)


def _rounded(rows: Tensor, bits: int, scale: Tensor, minimum: Tensor) -> Groups:
    divisor = torch.where(scale != 0, scale, 1).float().unsqueeze(-1)
    levels = ((rows - minimum.float().unsqueeze(-1)) / divisor).round()
    if bits == 8:
        return Groups(8, levels.clamp(-127, 127).to(torch.int8), scale, minimum)
    return Groups(4, levels.clamp(0, 15).to(torch.uint8), scale, minimum)


def _holds(groups: Groups, rows: Tensor) -> Tensor:
    """[out, groups]: whether a group stands for just these numbers. A zero's sign does not count, it adds nothing."""
    return (groups.dequantise().reshape(rows.shape) == rows).all(-1)
