"""The native linear layers against float64, and the property they exist for: a row does not depend on its company."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from redraft.kernels.library import GROUP, CpuKernels, pack
from redraft.models.groups import Groups, nearest_groups
from redraft.models.packed import GroupLinear, Int8Linear, KernelLinear, NativeLinear
from redraft.models.quantised import dequantise, quantise

SHAPES = [(8, 16), (64, 48), (33, 50), (576, 1), (7, 130), (600, 176)]  # k above 256: more than one block
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 19, 25, 40]


@pytest.fixture(autouse=True, params=[False, True], ids=["avx2", "avx512"])
def instructions(request: pytest.FixtureRequest, kernels: CpuKernels) -> Iterator[None]:
    if kernels.use_wide(request.param) is not request.param:
        pytest.skip("this processor has no AVX-512")
    yield
    kernels.use_wide(True)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(k: int, n: int, *, bias: bool) -> nn.Linear:
    layer = nn.Linear(k, n, bias=bias).requires_grad_(False)
    layer.weight.copy_(random(n, k))
    layer.weight[0] = 0  # an output without a scale
    if bias:
        layer.bias.copy_(random(n, seed=1))
    return layer


def packed_linear(
    layer: nn.Linear, kind: type[NativeLinear] | type[Int8Linear] | int, kernels: CpuKernels
) -> KernelLinear:
    """Packed as this class does it, or in groups of so many bits."""
    if isinstance(kind, int):
        return GroupLinear(layer, nearest_groups(layer.weight, kind), kernels)
    return kind(layer, kernels)


def meaning(layer: nn.Linear, kind: type[KernelLinear]) -> Tensor:
    """The float32 weight that the packed form stands for."""
    return dequantise(*quantise(layer.weight)) if kind is Int8Linear else layer.weight


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
@pytest.mark.parametrize("kind", [NativeLinear, Int8Linear])
def test_linear_equals_double_precision(
    kernels: CpuKernels, kind: type[NativeLinear] | type[Int8Linear], rows: int, k: int, n: int, bias: bool
) -> None:
    layer = linear(k, n, bias=bias)
    x = random(2, rows, k, seed=2)
    ours = kind(layer, kernels)(x)
    taken = rounded(x) if kind is Int8Linear else x.double()
    expected = taken @ meaning(layer, kind).double().t()
    if bias:
        expected += layer.bias
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-4)
    assert ours.shape == (2, rows, n)


@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize("kind", [NativeLinear, Int8Linear])
def test_row_is_bitwise_the_same_in_any_company(
    kernels: CpuKernels, kind: type[NativeLinear] | type[Int8Linear], k: int, n: int
) -> None:
    packed = kind(linear(k, n, bias=True), kernels)
    x = random(41, k, seed=3)
    alone = torch.cat([packed(row) for row in x.split(1)])
    for rows in range(2, 42):
        together = torch.cat([packed(part) for part in x.split(rows)])
        assert torch.equal(alone, together), f"{rows} rows at once"


def test_pack_is_aligned_and_fills_the_last_panels_with_zeros() -> None:
    values = torch.arange(1.0, 61).view(20, 3)
    packed = pack(values)
    assert packed.shape == (4, 3, 8)
    assert packed.data_ptr() % 64 == 0
    assert packed[0].t().tolist() == values[:8].tolist()
    assert packed[2, :, :4].t().tolist() == values[16:].tolist()
    assert not packed[2, :, 4:].any()
    assert not packed[3].any()


@pytest.mark.parametrize(("k", "n"), [(64, 50), (608, 176), (1536, 48)])
def test_avx512_gives_bitwise_the_same(kernels: CpuKernels, k: int, n: int) -> None:
    packed = NativeLinear(linear(k, n, bias=True), kernels)
    x = random(40, k, seed=3)
    for rows in range(1, 41):
        results = [packed(x[:rows]) for wanted in (False, True) if kernels.use_wide(wanted) is wanted]
        assert all(torch.equal(results[0], other) for other in results), f"{rows} rows at once"


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


@pytest.mark.parametrize("kind", [Int8Linear, 4, 8])
def test_activations_that_are_no_usual_numbers(kernels: CpuKernels, kind: type[Int8Linear] | int) -> None:
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
    packed = GroupLinear(layer, groups, kernels)
    x = random(40, k, seed=3)
    alone = torch.cat([packed(row) for row in x.split(1)])
    for rows in range(2, 41):
        assert torch.equal(alone, torch.cat([packed(part) for part in x.split(rows)])), f"{rows} rows at once"


def test_four_bits_are_a_sixth_of_the_memory(kernels: CpuKernels) -> None:
    layer, groups = on_grid(608, 176, 4)
    panels = GroupLinear(layer, groups, kernels).weight_packed.panels
    assert panels.numel() * panels.element_size() * 8 == 5 * layer.weight.numel()
    assert panels.data_ptr() % 64 == 0


@pytest.mark.parametrize("kind", [NativeLinear, Int8Linear, 4, 8])
def test_nothing_is_written_behind_the_rows_asked_for(
    kernels: CpuKernels, kind: type[NativeLinear] | type[Int8Linear] | int
) -> None:
    """No rows at all included: a head that nobody wants logits of."""
    plain = linear(64, 80, bias=False)
    packed = packed_linear(plain, kind, kernels)
    layer, x = packed.weight_packed.layer(), random(16, 64)
    for rows in range(14):
        written = torch.full((16, 80), 7.0)
        assert kernels._lib.redraft_linear(ctypes.byref(layer), x.data_ptr(), written.data_ptr(), rows) == 0
        assert torch.equal(written[rows:], torch.full((16 - rows, 80), 7.0))
        torch.testing.assert_close(written[:rows], packed(x[:rows]), rtol=0.0, atol=0.0)
