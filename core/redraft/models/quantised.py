"""Int8 weights: symmetric, one scale per output, q = round(w / scale) in -127 .. 127.

A draft may be quantised as roughly as one likes: whatever it proposes is verified, so only acceptance can suffer. The
checkpoint holds the dequantised numbers, so that plain transformers computes the same; `draft_quant.json` beside them
says that the layers' matrices lie on such a grid. Their scales need not be stored: every row has an entry at -127 or
127, so `quantise` of the stored numbers finds the same grid again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from redraft.errors import ModelError

DRAFT_QUANT = "draft_quant.json"
LEVELS = 127
_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class DraftQuant:
    """How a draft's linear layers are quantised; 8 bits is all there is so far."""

    bits: int = 8

    def write(self, directory: Path) -> None:
        """Write `draft_quant.json` into a checkpoint directory."""
        content = {"schema_version": _SCHEMA_VERSION, "bits": self.bits, "scheme": "symmetric, one scale per output"}
        (directory / DRAFT_QUANT).write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> DraftQuant | None:
        """How the checkpoint is quantised; None if it is not. Raises `ModelError` for a damaged or foreign file."""
        path = directory / DRAFT_QUANT
        if not path.is_file():
            return None
        try:
            content: Any = json.loads(path.read_text(encoding="utf-8"))
            version, bits = content["schema_version"], content["bits"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ModelError(f"{path} is damaged: expected an object with schema_version and bits") from error
        if version != _SCHEMA_VERSION or bits != 8:
            raise ModelError(f"{path} asks for {bits!r} bits (schema {version!r}), this release knows 8 (schema 1)")
        return cls(8)


def quantise(weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> int8 [out, in] and float32 scales [out].

    `scale` None: the largest of the row over 127. A smaller one clips the row's largest entries.
    """
    rows = weight.detach().float()
    if scale is None:
        scale = rows.abs().amax(dim=1) / LEVELS
    divisor = torch.where(scale > 0, scale, 1.0).unsqueeze(1)
    return (rows / divisor).round().clamp(-LEVELS, LEVELS).to(torch.int8), scale.float()


def dequantise(values: Tensor, scale: Tensor) -> Tensor:
    """int8 [out, in] and scales [out] -> float32 [out, in]."""
    return values.float() * scale.unsqueeze(1)


def layer_linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear layers that are quantised, by name: all inside the model's stack of layers."""
    return [
        (f"{path}.{name}", linear)
        for path, stack in model.named_modules()
        if isinstance(stack, nn.ModuleList)
        for name, linear in stack.named_modules()
        if isinstance(linear, nn.Linear)
    ]
