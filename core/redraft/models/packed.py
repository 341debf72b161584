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
from redraft.models.quantised import layer_linears, quantise

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


class Int8Linear(nn.Module):
    """Drop-in for a frozen fp32 `nn.Linear` on a CPU, its weight rounded to int8 with one scale per output."""

    def __init__(self, linear: nn.Linear, kernels: CpuKernels) -> None:
        super().__init__()
        self._kernels = kernels
        self.out_features = linear.out_features
        values, scale = quantise(linear.weight)
        filled = -linear.out_features % PANEL
        self._packed: Tensor
        self._scale: Tensor
        self._bias: Tensor | None
        self.register_buffer("_packed", kernels.pack(values), persistent=False)
        self.register_buffer("_scale", nn.functional.pad(scale, (0, filled)).contiguous(), persistent=False)
        bias: Tensor | None = linear.bias
        if bias is not None:
            bias = nn.functional.pad(bias.detach(), (0, filled)).contiguous()
        self.register_buffer("_bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[.., in_features] float32 -> [.., out_features] float32."""
        return self._kernels.linear_int8(x, self._packed, self._scale, self._bias, self.out_features)


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

    A linear that two models share, as a draft does its target's head, is packed once for both.

    Returns:
        How many were replaced; 0 for a model that is not fp32 on a CPU, or without any packed product at hand.
    """
    kernels = library()
    if kernels is None and not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return 0
    packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and _is_fp32_on_cpu(child):
                setattr(parent, name, _packed_once(child, kernels))
                packed += 1
    return packed


def pack_linears_int8(model: nn.Module, *, head: nn.Module | None) -> int:
    """Replace the fp32 CPU linears of the model's layers, and `head` if it is one of its own, by int8 ones, in place.

    Returns:
        How many were replaced; 0 without the native kernels, where `pack_linears` will do in fp32.
    """
    kernels = library()
    if kernels is None:
        return 0
    wanted = {id(linear) for _, linear in layer_linears(model)} | {id(head)}
    packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and id(child) in wanted and _is_fp32_on_cpu(child):
                setattr(parent, name, Int8Linear(child, kernels))
                packed += 1
    return packed


def _is_fp32_on_cpu(linear: nn.Linear) -> bool:
    return linear.weight.dtype is torch.float32 and linear.weight.device.type == "cpu"


def _packed_once(linear: nn.Linear, kernels: CpuKernels | None) -> nn.Module:
    """The packed form, remembered by the linear itself for as long as another model still has it unpacked."""
    known = linear.__dict__.get("_redraft_packed")
    if not isinstance(known, nn.Module):
        known = OneDnnLinear(linear) if kernels is None else NativeLinear(linear, kernels)
        linear.__dict__["_redraft_packed"] = known
    return known
