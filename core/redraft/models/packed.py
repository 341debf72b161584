"""Linear layers for inference on a CPU, their weights re-ordered once, ahead of time.

`torch.nn.functional.linear` re-orders an fp32 weight on every call, which costs more than the product itself when there
are only a few rows: verifying 5 tokens then takes twice the time of one. Packed, it takes the time of reading the
weight once. Where the native kernels were built they do the work, and a row's result does not depend on how many rows
are beside it; elsewhere oneDNN does, through torch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from redraft.kernels.library import PANEL, CpuKernels, library

_EXPECTED_ROWS = 8  # oneDNN chooses its layout for about so many; others stay correct


class NativeLinear(nn.Module):
    """Drop-in for a frozen fp32 `nn.Linear` on a CPU, on the native kernels."""

    def __init__(self, linear: nn.Linear, kernels: CpuKernels) -> None:
        super().__init__()
        self._kernels = kernels
        self.out_features = linear.out_features
        self._packed: Tensor
        self._bias: Tensor | None
        self.register_buffer("_packed", kernels.pack(linear.weight.detach()), persistent=False)
        bias: Tensor | None = linear.bias
        if bias is not None:
            bias = nn.functional.pad(bias.detach(), (0, -linear.out_features % PANEL)).contiguous()
        self.register_buffer("_bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[.., in_features] float32 -> [.., out_features] float32."""
        return self._kernels.linear(x, self._packed, self._bias, self.out_features)


class OneDnnLinear(nn.Module):
    """Drop-in for a frozen fp32 `nn.Linear` on a CPU, on oneDNN's packed weights."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _EXPECTED_ROWS)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[.., in_features] float32 -> [.., out_features] float32."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return result


def pack_linears(model: nn.Module) -> int:
    """Replace the model's fp32 CPU linears by packed ones, in place; their unpacked weights are freed unless shared.

    Returns:
        How many were replaced; 0 for a model that is not fp32 on a CPU, or without any packed product at hand.
    """
    kernels = library()
    if kernels is None and not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return 0
    packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear:
                continue
            if child.weight.dtype is torch.float32 and child.weight.device.type == "cpu":
                setattr(parent, name, OneDnnLinear(child) if kernels is None else NativeLinear(child, kernels))
                packed += 1
    return packed
