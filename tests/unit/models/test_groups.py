"""Groups of 32: rounding, and finding again what a file's weights were."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from redraft.models.groups import Groups, exact_groups, nearest_groups
from tests.linear_layers import random


@pytest.mark.parametrize("bits", [4, 8])
def test_nearest_is_within_half_a_step(bits: int) -> None:
    weight = random(20, 96)
    groups = nearest_groups(weight, bits)
    step = groups.scale.float().repeat_interleave(32, dim=1)
    # half a step, and what fp16 cuts off the scale and the minimum
    assert ((groups.dequantise() - weight).abs() <= 0.5 * step + 15 * step / 1024 + weight.abs() / 1024).all()
    assert groups.values.shape == (20, 3, 32)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_twice_is_rounding_once(bits: int) -> None:
    once = nearest_groups(random(20, 96), bits).dequantise()
    again = exact_groups(once, bits)
    assert again is not None
    assert torch.equal(again.dequantise(), once)


@pytest.mark.parametrize(
    ("kind", "bits"), [(GGMLQuantizationType.Q4_1, 4), (GGMLQuantizationType.Q4_0, 4), (GGMLQuantizationType.Q8_0, 8)]
)
def test_weights_of_a_gguf_file_are_found_again_exactly(kind: GGMLQuantizationType, bits: int) -> None:
    stored = dequantize(quantize(random(64, 192).numpy(), kind), kind)
    weight = torch.from_numpy(np.ascontiguousarray(stored, dtype=np.float32))
    groups = exact_groups(weight, bits)
    assert groups is not None
    assert torch.equal(groups.dequantise(), weight)


def with_one_value(groups: Groups) -> Groups:
    return Groups(groups.bits, groups.values * 0, groups.scale, groups.minimum)


def with_zeros(groups: Groups) -> Groups:
    return Groups(groups.bits, groups.values * 0, groups.scale * 0, groups.minimum * 0)


@pytest.mark.parametrize("change", [with_one_value, with_zeros])
def test_degenerate_groups_are_found(change: Callable[[Groups], Groups]) -> None:
    weight = change(nearest_groups(random(8, 64), 4)).dequantise()
    groups = exact_groups(weight, 4)
    assert groups is not None
    assert torch.equal(groups.dequantise(), weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_one_number_off_the_grid_is_noticed(bits: int) -> None:
    weight = nearest_groups(random(40, 64), bits).dequantise()
    weight[33, 5] = torch.nextafter(weight[33, 5], torch.tensor(torch.inf))
    assert exact_groups(weight, bits) is None


def test_other_weights_have_no_groups() -> None:
    assert exact_groups(random(40, 64), 4) is None
    assert exact_groups(random(40, 64), 8) is None
    assert exact_groups(torch.zeros(4, 33), 4) is None
