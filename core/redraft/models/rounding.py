"""A target's weights in 8 or 4 bits: kept where the checkpoint lies on such a grid, rounded to the nearest elsewhere.

Either way the result is a model of float32 numbers, the ones that the groups stand for, and training or plain
transformers can have it as an ordinary checkpoint. The kernels multiply the groups by activations of 16 bits
(`kernels/integer.c`), two digits closer to it than bfloat16 would be. One made from a GGUF file of Q4_0, Q4_1 or Q8_0
tensors lies on the grid and stays the model it is; another becomes a new one, with a fingerprint of its own.

`python -m redraft.models.rounding MODEL DIRECTORY --weights int4` writes such a model down, to train drafts for it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from redraft.kernels.library import GROUP
from redraft.models.groups import exact_groups, nearest_groups, remember_groups
from redraft.models.heads import output_head
from redraft.models.quantised import layer_linears

_HEAD_BITS = 8  # a head of 4 bits changes what a small model says


class WeightFormat(StrEnum):
    """How the weights of a model's linear layers are kept."""

    FULL = "full"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def bits(self) -> int:
        """Of the layers, at most. Raises ValueError for `FULL`."""
        return {WeightFormat.INT8: 8, WeightFormat.INT4: 4}[self]


def to_groups(model: PreTrainedModel, weights: WeightFormat) -> bool:
    """Put the linears of a float32 model on a CPU into groups, in place, an embedding tied to the head included.

    A linear whose inputs are no multiple of 32 is left as it is.

    Returns:
        Whether every number stayed what it was.
    """
    head = output_head(model)
    linears = {id(linear): (linear, weights.bits) for _, linear in layer_linears(model)}
    if type(head) is nn.Linear:
        linears[id(head)] = (head, max(weights.bits, _HEAD_BITS))
    results = [_linear_to_groups(linear, bits) for linear, bits in linears.values()]
    return all(results)


def rounded_fingerprint(fingerprint: str, weights: WeightFormat) -> str:
    """`sha256:<hex>` of the model that rounding makes of the one with `fingerprint`."""
    content = {"weights": fingerprint, "rounded": weights.value, "group": GROUP, "schema_version": 1}
    return "sha256:" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def _linear_to_groups(linear: nn.Linear, bits: int) -> bool:
    weight = linear.weight
    if weight.shape[1] % GROUP:
        return True
    groups = exact_groups(weight, 4) or exact_groups(weight, 8)
    is_exact = groups is not None
    if groups is None:
        groups = nearest_groups(weight, bits)
        weight.copy_(groups.dequantise())
    remember_groups(linear, groups)
    return is_exact


def main(argv: Sequence[str]) -> int:
    """Write a model whose weights are rounded, as a checkpoint directory."""
    from redraft.errors import RedraftError
    from redraft.models.checkpoint_files import copy_tokenizer
    from redraft.models.loader import load_model
    from redraft.models.ref import ModelRef

    parser = argparse.ArgumentParser(prog="python -m redraft.models.rounding", description=main.__doc__)
    parser.add_argument("model")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--weights", type=WeightFormat, choices=[WeightFormat.INT8, WeightFormat.INT4], required=True)
    arguments = parser.parse_args(argv)
    try:
        loaded = load_model(ModelRef.parse(arguments.model), weights=arguments.weights)
        loaded.model.save_pretrained(arguments.directory)
        copy_tokenizer(loaded.directory, arguments.directory)
    except RedraftError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
