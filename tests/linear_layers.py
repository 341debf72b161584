"""Linear layers for the tests of their kernels, and what holds for a packed one of any kind."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from redraft.kernels.library import CpuKernels
from redraft.models.packed import KernelLinear

SHAPES = [(8, 16), (64, 48), (33, 50), (576, 1), (7, 130), (600, 176)]  # k above 256: more than one block
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 19, 25, 40]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(k: int, n: int, *, bias: bool) -> nn.Linear:
    layer = nn.Linear(k, n, bias=bias).requires_grad_(False)
    layer.weight.copy_(random(n, k))
    layer.weight[0] = 0  # an output without a scale
    if bias:
        layer.bias.copy_(random(n, seed=1))
    return layer


def check_double_precision(packed: KernelLinear, x: Tensor, taken: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Its outputs are those of float64 over the weight [n, k] as it is stored and the activations as they are taken."""
    ours, expected = packed(x), taken.double() @ weight.double().t()
    if bias is not None:
        expected += bias
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-4)
    assert ours.shape == (*x.shape[:-1], len(weight))


def check_any_company(packed: KernelLinear, k: int) -> None:
    """A row's result is bitwise the same whatever rows are beside it."""
    x = random(41, k, seed=3)
    alone = torch.cat([packed(row) for row in x.split(1)])
    for rows in range(2, 42):
        assert torch.equal(alone, torch.cat([packed(part) for part in x.split(rows)])), f"{rows} rows at once"


def check_nothing_behind(kernels: CpuKernels, packed: KernelLinear) -> None:
    """Only the rows asked for are written. No rows at all included: a head that nobody wants logits of."""
    layer = packed.weight_packed.layer()
    x = random(16, layer.k)
    for rows in range(14):
        written = torch.full((16, layer.n), 7.0)
        assert kernels._lib.redraft_linear(ctypes.byref(layer), x.data_ptr(), written.data_ptr(), rows) == 0
        assert torch.equal(written[rows:], torch.full((16 - rows, layer.n), 7.0))
        torch.testing.assert_close(written[:rows], packed(x[:rows]), rtol=0.0, atol=0.0)
