"""Linear layers for inference on a CPU, their weights re-ordered once, ahead of time.

`torch.nn.functional.linear` re-orders an fp32 weight on every call, which costs more than the product itself when there
are only a few rows: verifying 5 tokens then takes twice the time of one. Packed, it takes the time of reading the
weight once. Where the native kernels were built they do the work, and a row's result does not depend on how many rows
are beside it; elsewhere oneDNN does, through torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from redraft.kernels.decoder import LinearKind, LinearLayer
from redraft.kernels.library import PAIR, CpuKernels, PackedWeight, fill_outputs, library, pack, pack_groups, pack_int8
from redraft.kernels.memory import aligned_empty
from redraft.models.groups import Groups, groups_of
from redraft.models.quantised import layer_linears, quantise

_EXPECTED_ROWS = 8  # oneDNN chooses its layout for about so many; others stay correct


class KernelLinear(nn.Module):
    """Drop-in for a frozen fp32 `nn.Linear` on a CPU, on the native kernels. The subclasses choose how it is stored."""

    def __init__(self, weight: PackedWeight, kernels: CpuKernels) -> None:
        super().__init__()
        self._kernels = kernels
        self.out_features = weight.out_features
        self.hold(weight)

    def hold(self, weight: PackedWeight) -> None:
        """Take `weight`, the same numbers in another place, for its own."""
        self.weight_packed = weight
        # as buffers too, so that whoever adds up a module's memory finds them
        self.register_buffer("_panels", weight.panels, persistent=False)
        self.register_buffer("_scale", weight.scale, persistent=False)
        self.register_buffer("_bias", weight.bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[.., in_features] float32 -> [.., out_features] float32."""
        return self._kernels.linear(x, self.weight_packed)


class NativeLinear(KernelLinear):
    """The weight as it is."""

    def __init__(self, linear: nn.Linear, kernels: CpuKernels) -> None:
        panels, bias = pack(linear.weight.detach()), fill_outputs(linear.bias)
        super().__init__(
            PackedWeight(LinearKind.FP32, panels, linear.in_features, linear.out_features, bias=bias), kernels
        )


class Int8Linear(KernelLinear):
    """The weight rounded to int8 with one scale per output."""

    def __init__(self, linear: nn.Linear, kernels: CpuKernels) -> None:
        values, scale = quantise(linear.weight)
        panels, scales, bias = pack_int8(values), fill_outputs(scale), fill_outputs(linear.bias)
        super().__init__(
            PackedWeight(LinearKind.INT8, panels, linear.in_features, linear.out_features, scales, bias), kernels
        )


class GroupLinear(KernelLinear):
    """The weight in groups of 4 or 8 bits."""

    def __init__(self, linear: nn.Linear, groups: Groups, kernels: CpuKernels) -> None:
        kind = LinearKind.INT4 if groups.bits == 4 else LinearKind.INT8_GROUPS
        panels = pack_groups(groups.values, groups.scale, groups.minimum if groups.bits == 4 else None)
        bias = fill_outputs(linear.bias)
        super().__init__(PackedWeight(kind, panels, linear.in_features, linear.out_features, bias=bias), kernels)


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
    packed = [linear for linear in linears if isinstance(linear, KernelLinear)]
    weights = [linear.weight_packed for linear in packed]
    if not packed or len(packed) < len(linears) or len({_likeness(weight) for weight in weights}) > 1:
        return None
    if any(weight.out_features % PAIR for weight in weights[:-1]):  # a gap would be in the way
        return None
    panels = _joined([weight.panels for weight in weights])
    scales = _joined_if_any([weight.scale for weight in weights])
    biases = _joined_if_any([weight.bias for weight in weights])
    for linear, weight, ours, scale, bias in zip(packed, weights, panels, scales, biases, strict=True):
        linear.hold(replace(weight, panels=ours, scale=scale, bias=bias))
    layer = packed[0].weight_packed.layer()
    layer.n = sum(linear.weight_packed.layer().n for linear in packed)
    return layer


def _likeness(weight: PackedWeight) -> tuple[LinearKind, int, bool]:
    return weight.kind, weight.in_features, weight.bias is None


def _joined(parts: list[Tensor]) -> list[Tensor]:
    """The parts, each beginning where the one before ends; themselves if they do."""
    if [part.data_ptr() + part.nbytes for part in parts[:-1]] == [part.data_ptr() for part in parts[1:]]:
        return parts
    whole = aligned_empty(parts[0].dtype, sum(len(part) for part in parts), *parts[0].shape[1:])
    return list(torch.split(torch.cat(parts, out=whole), [len(part) for part in parts]))


def _joined_if_any(parts: list[Tensor | None]) -> list[Tensor] | list[None]:
    present = [part for part in parts if part is not None]
    return _joined(present) if present else [None] * len(parts)


def _is_fp32_on_cpu(linear: nn.Linear) -> bool:
    return linear.weight.dtype is torch.float32 and linear.weight.device.type == "cpu"


def _packed_once(linear: nn.Linear, kernels: CpuKernels | None) -> nn.Module:
    """The packed form, remembered by the linear itself for as long as another model still has it unpacked."""
    known = linear.__dict__.get("_redraft_packed")
    if not isinstance(known, nn.Module):
        groups = groups_of(linear)
        if kernels is None:
            known = OneDnnLinear(linear)
        elif groups is None:
            known = NativeLinear(linear, kernels)
        else:
            known = GroupLinear(linear, groups, kernels)
        linear.__dict__["_redraft_packed"] = known
    return known
