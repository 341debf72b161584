"""Linear layers whose weights oneDNN has re-ordered once, ahead of time.

`torch.nn.functional.linear` re-orders an fp32 weight on every call, which on a CPU costs more than the product itself
when there are only a few rows: verifying 5 tokens then takes twice the time of one. With the weight packed, the time is
that of reading it. Same arithmetic type, same shapes; CPU inference only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_EXPECTED_ROWS = 8  # oneDNN chooses the layout for about so many; others stay correct


class PackedLinear(nn.Module):
    """Drop-in for a frozen fp32 `nn.Linear` on a CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _EXPECTED_ROWS)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[.., in_features] float32 -> [.., out_features] float32."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return result


def pack_linears(model: nn.Module) -> int:
    """Replace the model's fp32 CPU linears by packed ones, in place; their unpacked weights are freed unless shared.

    Returns:
        How many were replaced; 0 where oneDNN is missing or the model is not fp32 on a CPU.
    """
    if not torch.backends.mkldnn.is_available():
        return 0
    packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            weight = getattr(child, "weight", None)
            if type(child) is nn.Linear and weight.dtype is torch.float32 and weight.device.type == "cpu":
                setattr(parent, name, PackedLinear(child))
                packed += 1
    return packed
