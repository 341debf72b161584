"""The native linear layers against float64, and the property they exist for: a row does not depend on its company."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from redraft.kernels.library import CpuKernels, pack
from redraft.models.groups import GROUP, Groups, nearest_groups
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
    expected = x.double() @ meaning(layer, kind).double().t()
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_pack_is_aligned_and_fills_the_last_panels_with_zeros(dtype: torch.dtype) -> None:
    values = torch.arange(1, 61).to(dtype).view(20, 3)
    packed = pack(values)
    assert packed.dtype is dtype
    assert packed.shape == (4, 3, 8)
    assert packed.data_ptr() % 64 == 0
    assert packed[0].t().tolist() == values[:8].tolist()
    assert packed[2, :, :4].t().tolist() == values[16:].tolist()
    assert not packed[2, :, 4:].any()
    assert not packed[3].any()


@pytest.mark.parametrize("kind", [NativeLinear, Int8Linear, 4, 8])
@pytest.mark.parametrize(("k", "n"), [(64, 50), (608, 176), (1536, 48)])
def test_avx512_gives_bitwise_the_same(
    kernels: CpuKernels, kind: type[NativeLinear] | type[Int8Linear] | int, k: int, n: int
) -> None:
    packed = packed_linear(linear(k, n, bias=True), kind, kernels)
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
def test_groups_give_bitwise_what_their_float32_numbers_give(kernels: CpuKernels, k: int, n: int, bits: int) -> None:
    layer, groups = on_grid(k, n, bits)
    x = random(40, k, seed=3)
    ours, reference = GroupLinear(layer, groups, kernels), NativeLinear(layer, kernels)
    assert reference(x).isfinite().all()
    for rows in range(1, 41):
        assert torch.equal(ours(x[:rows]), reference(x[:rows])), f"{rows} rows at once"


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
