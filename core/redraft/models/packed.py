"""Linear layers for inference on a CPU, their weights re-ordered once, ahead of time.

`torch.nn.functional.linear` re-orders an fp32 weight on every call, which costs more than the product itself when there
are only a few rows: verifying 5 tokens then takes twice the time of one. Packed, it takes the time of reading the
weight once. Where the native kernels were built they do the work, and a row's result does not depend on how many rows
are beside it; elsewhere oneDNN does, through torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from redraft.kernels.decoder import LinearKind, LinearLayer
from redraft.kernels.library import PANEL, CpuKernels, library
from redraft.models.quantised import layer_linears, quantise

_EXPECTED_ROWS = 8  # oneDNN chooses its layout for about so many; others stay correct


class PackedLinear(nn.Module):
    """A frozen fp32 `nn.Linear` on a CPU, for the native kernels: its weights packed in panels, scales and biases (or
    None) filled up to whole ones."""

    kind: ClassVar[LinearKind]
    _packed: Tensor
    _scale: Tensor | None
    _bias: Tensor | None

    def __init__(self, linear: nn.Linear, kernels: CpuKernels, weight: Tensor, scale: Tensor | None = None) -> None:
        super().__init__()
        self._kernels = kernels
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        bias: Tensor | None = linear.bias
        self.register_buffer("_packed", kernels.pack(weight), persistent=False)
        self.register_buffer("_scale", None if scale is None else _filled(scale), persistent=False)
        self.register_buffer("_bias", None if bias is None else _filled(bias.detach()), persistent=False)


class NativeLinear(PackedLinear):
    """Drop-in for a frozen fp32 `nn.Linear` on a CPU, on the native kernels."""

    kind = LinearKind.FP32

    def __init__(self, linear: nn.Linear, kernels: CpuKernels) -> None:
        super().__init__(linear, kernels, linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[.., in_features] float32 -> [.., out_features] float32."""
        return self._kernels.linear(x, self._packed, self._bias, self.out_features)


class Int8Linear(PackedLinear):
    """Drop-in for a frozen fp32 `nn.Linear` on a CPU, its weight rounded to int8 with one scale per output."""

    kind = LinearKind.INT8

    def __init__(self, linear: nn.Linear, kernels: CpuKernels) -> None:
        super().__init__(linear, kernels, *quantise(linear.weight))

    def forward(self, x: Tensor) -> Tensor:
        """[.., in_features] float32 -> [.., out_features] float32."""
        assert self._scale is not None
        return self._kernels.linear_int8(x, self._packed, self._scale, self._bias, self.out_features)


def _filled(per_output: Tensor) -> Tensor:
    return nn.functional.pad(per_output, (0, -len(per_output) % PANEL)).contiguous()


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


def fuse(linears: Sequence[nn.Module]) -> LinearLayer | None:
    """Linears of the same input as one layer of the native kernels, their outputs one after another.

    Their weights move to lie behind one another, unless they do already, and the modules keep views of them: nothing is
    held twice, and the modules must live as long as the layer. None if they are not packed, or not alike.
    """
    packed = [linear for linear in linears if isinstance(linear, PackedLinear)]
    first = packed[0] if len(packed) == len(linears) else None
    if first is None or not all(_is_like(linear, first) for linear in packed):
        return None
    if any(linear.out_features % PANEL for linear in packed[:-1]):  # a gap would be in the way
        return None
    addresses = [_join(packed, name) for name in ("_packed", "_scale", "_bias")]
    num_panels = sum(len(linear._packed) for linear in packed)
    return LinearLayer(first.kind, *addresses, first.in_features, num_panels * PANEL)


def _is_like(a: PackedLinear, b: PackedLinear) -> bool:
    return type(a) is type(b) and a.in_features == b.in_features and (a._bias is None) is (b._bias is None)


def _join(linears: Sequence[PackedLinear], name: str) -> int | None:
    """Where the buffers `name` of the linears, moved behind one another, begin; None if they have none."""
    parts: list[Tensor | None] = [getattr(linear, name) for linear in linears]
    present = [part for part in parts if part is not None]
    if not present:
        return None
    ends = [part.data_ptr() + part.nbytes for part in present[:-1]]
    if ends != [part.data_ptr() for part in present[1:]]:
        views = torch.split(torch.cat(present), [len(part) for part in present])
        for linear, view in zip(linears, views, strict=True):
            setattr(linear, name, view)
        present = list(views)
    return present[0].data_ptr()


def _is_fp32_on_cpu(linear: nn.Linear) -> bool:
    return linear.weight.dtype is torch.float32 and linear.weight.device.type == "cpu"


def _packed_once(linear: nn.Linear, kernels: CpuKernels | None) -> nn.Module:
    """The packed form, remembered by the linear itself for as long as another model still has it unpacked."""
    known = linear.__dict__.get("_redraft_packed")
    if not isinstance(known, nn.Module):
        known = OneDnnLinear(linear) if kernels is None else NativeLinear(linear, kernels)
        linear.__dict__["_redraft_packed"] = known
    return known
