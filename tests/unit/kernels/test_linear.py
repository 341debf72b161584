"""The native linear layers against float64, and the property they exist for: a row does not depend on its company."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from redraft.kernels.library import CpuKernels, pack
from redraft.models.packed import NativeLinear
from tests.linear_layers import (
    ROWS,
    SHAPES,
    check_any_company,
    check_double_precision,
    check_nothing_behind,
    linear,
    random,
)


@pytest.fixture(autouse=True, params=[False, True], ids=["avx2", "avx512"])
def instructions(request: pytest.FixtureRequest, kernels: CpuKernels) -> Iterator[None]:
    if kernels.use_wide(request.param) is not request.param:
        pytest.skip("this processor has no AVX-512")
    yield
    kernels.use_wide(True)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_equals_double_precision(kernels: CpuKernels, rows: int, k: int, n: int, bias: bool) -> None:
    layer = linear(k, n, bias=bias)
    x = random(2, rows, k, seed=2)
    check_double_precision(NativeLinear(layer, kernels), x, x, layer.weight, layer.bias)


@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_row_is_bitwise_the_same_in_any_company(kernels: CpuKernels, k: int, n: int) -> None:
    check_any_company(NativeLinear(linear(k, n, bias=True), kernels), k)


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


def test_nothing_is_written_behind_the_rows_asked_for(kernels: CpuKernels) -> None:
    check_nothing_behind(kernels, NativeLinear(linear(64, 80, bias=False), kernels))
