"""Quantised layers against float64 over rounded activations, and what rounding them may cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from redraft.kernels.library import GROUP, CpuKernels
from redraft.models.groups import Groups, nearest_groups
from redraft.models.packed import GroupLinear, Int8Linear, KernelLinear
from redraft.models.quantised import dequantise, quantise
from tests.linear_layers import (
    ROWS,
    SHAPES,
    check_any_company,
    check_double_precision,
    check_nothing_behind,
    linear,
    random,
)

KINDS = [None, 4, 8]


def packed_linear(layer: nn.Linear, kind: int | None, kernels: CpuKernels) -> KernelLinear:
    """In int8 with a scale per output, or in groups of so many bits."""
    if kind is None:
        return Int8Linear(layer, kernels)
    return GroupLinear(layer, nearest_groups(layer.weight, kind), kernels)


def in_groups(x: Tensor) -> Tensor:
    """[.., k] in groups of 32, filled up with zeros."""
    return nn.functional.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))


def rounded(x: Tensor) -> Tensor:
    """Activations as quantised layers take them, float64: 16 bits within a group."""
    groups = in_groups(x)
    largest = groups.abs().amax(-1, keepdim=True)
    # a tensor over a tensor: torch computes a number over a tensor by way of its reciprocal
    whole = (groups * torch.where(largest > 0, torch.full_like(largest, 32767) / largest, 0.0)).round()
    return (whole.double() * (largest / 32767).double()).flatten(-2)[..., : x.shape[-1]]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_int8_equals_double_precision_over_rounded_activations(
    kernels: CpuKernels, rows: int, k: int, n: int, bias: bool
) -> None:
    layer = linear(k, n, bias=bias)
    x = random(2, rows, k, seed=2)
    weight = dequantise(*quantise(layer.weight))
    check_double_precision(Int8Linear(layer, kernels), x, rounded(x), weight, layer.bias)


@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_an_int8_row_is_bitwise_the_same_in_any_company(kernels: CpuKernels, k: int, n: int) -> None:
    check_any_company(Int8Linear(linear(k, n, bias=True), kernels), k)


GROUP_SHAPES = [(32, 16), (64, 50), (576, 1), (608, 176), (192, 130)]


def on_grid(k: int, n: int, bits: int) -> tuple[nn.Linear, Groups]:
    """A layer whose weight lies on groups exactly, with outputs and groups of very different size."""
    layer = linear(k, n, bias=True)
    sizes = torch.logspace(-6, 2, n * k // GROUP).view(n, -1, 1)
    groups = nearest_groups((layer.weight.view(n, -1, GROUP) * sizes).flatten(1), bits)
    layer.weight.copy_(groups.dequantise())
    return layer, groups


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("k", "n"), GROUP_SHAPES)
def test_groups_equal_double_precision_over_rounded_activations(kernels: CpuKernels, k: int, n: int, bits: int) -> None:
    layer, groups = on_grid(k, n, bits)
    ours = GroupLinear(layer, groups, kernels)
    x = random(40, k, seed=3)
    taken, weight = rounded(x), groups.dequantise().double()
    expected = taken @ weight.t() + layer.bias
    # float32 sums of one term per group (two with minima), each of which may be as large as its parts
    parts = taken.abs() @ weight.abs().t() + layer.bias.abs()
    for rows in range(1, 41):
        assert ((ours(x[:rows]) - expected[:rows]).abs() <= 1e-5 * parts[:rows]).all(), f"{rows} rows at once"


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_activations_costs_at_most_half_a_step_of_each(kernels: CpuKernels, bits: int) -> None:
    layer, groups = on_grid(608, 176, bits)
    x = random(5, 608, seed=3) * torch.logspace(-12, 12, 19).repeat_interleave(GROUP)
    weight = groups.dequantise().double()
    steps = (in_groups(x).abs().amax(-1) / 32767).repeat_interleave(GROUP, -1).double()
    bound = (steps / 2) @ weight.abs().t() + 1e-5 * (x.double().abs() @ weight.abs().t() + layer.bias.abs())
    error = (GroupLinear(layer, groups, kernels)(x) - x.double() @ weight.t() - layer.bias).abs()
    assert (error <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
def test_activations_that_are_no_usual_numbers(kernels: CpuKernels, kind: int | None) -> None:
    """NaN and infinity show, in their own row only; nothing and almost nothing are nothing."""
    layer = linear(64, 48, bias=True)
    packed = packed_linear(layer, kind, kernels)
    x = random(6, 64, seed=3)
    x[1, 40], x[3, 7], x[4], x[5] = torch.nan, -torch.inf, 0.0, 1e-35
    y = packed(x)
    assert torch.equal(y[0], packed(x[:1])[0])
    assert torch.equal(y[2], packed(x[2:3])[0])
    assert y[1].isnan().all()
    assert not y[3].isfinite().any()
    assert torch.equal(y[4], layer.bias)
    assert torch.equal(y[5], layer.bias)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("k", "n"), GROUP_SHAPES)
def test_a_row_of_groups_is_bitwise_the_same_in_any_company(kernels: CpuKernels, k: int, n: int, bits: int) -> None:
    layer, groups = on_grid(k, n, bits)
    check_any_company(GroupLinear(layer, groups, kernels), k)


def test_four_bits_are_a_sixth_of_the_memory(kernels: CpuKernels) -> None:
    layer, groups = on_grid(608, 176, 4)
    panels = GroupLinear(layer, groups, kernels).weight_packed.panels
    assert panels.numel() * panels.element_size() * 8 == 5 * layer.weight.numel()
    assert panels.data_ptr() % 64 == 0


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_behind_the_rows_asked_for(kernels: CpuKernels, kind: int | None) -> None:
    check_nothing_behind(kernels, packed_linear(linear(64, 80, bias=False), kind, kernels))
