"""Layers of a decoder-only model: found, chosen evenly, dropped in place, whatever the architecture."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from redraft.errors import ConfigError, UnsupportedModel

# One entry a layer, in any architecture's config: layer_types, mlp_layer_types, no_rope_layers, ...
_PER_LAYER_KEY = re.compile(r"layer_types|_layers$")


def prune_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Keep only `layers` (0-based, in this order) of a decoder-only model, in place.

    Embedding, final norm and head are untouched, tied ones stay tied; nothing is copied. Raises
    `UnsupportedModel` if the stack of layers cannot be found.
    """
    parent, name = decoder_stack(model)
    stack: nn.ModuleList = getattr(parent, name)
    kept = [stack[index] for index in layers]
    _number(kept)
    setattr(parent, name, nn.ModuleList(kept))
    for key, value in _per_layer_entries(model):
        setattr(model.config, key, [value[index] for index in layers])
    model.config.num_hidden_layers = len(kept)


@contextmanager
def only_layers(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[None]:
    """`prune_layers`, undone at the end. Nothing is copied."""
    parent, name = decoder_stack(model)
    stack: nn.ModuleList = getattr(parent, name)
    entries = _per_layer_entries(model)
    try:
        prune_layers(model, layers)
        yield
    finally:
        setattr(parent, name, stack)
        _number(stack)
        for key, value in entries:
            setattr(model.config, key, value)
        model.config.num_hidden_layers = len(stack)


def evenly_spaced_layers(count: int, total: int) -> tuple[int, ...]:
    """`count` of `total` layers, the first and the last among them.

    >>> evenly_spaced_layers(4, 30)
    (0, 10, 19, 29)
    """
    if not 1 <= count <= total:
        raise ConfigError(f"--num-layers {count} is out of range: the target has {total} layers")
    if count == 1:
        return (0,)
    return tuple(round(position * (total - 1) / (count - 1)) for position in range(count))


def check_layers(layers: Sequence[int], total: int) -> tuple[int, ...]:
    """`layers`, if they are an ascending choice of a target's `total` layers; else raises `ConfigError`."""
    if not layers:
        raise ConfigError("--layers names no layer")
    for layer in layers:
        if not 0 <= layer < total:
            raise ConfigError(f"--layers: {layer} is out of range, the target has layers 0 to {total - 1}")
    for before, after in pairwise(layers):
        if after == before:
            raise ConfigError(f"--layers: {after} is given twice")
        if after < before:
            raise ConfigError(f"--layers: {after} comes after {before}, give them in ascending order")
    return tuple(layers)


def _number(layers: Iterable[nn.Module]) -> None:
    """Tell the layers their place, which is their key into the KV cache."""
    for position, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position  # type: ignore[assignment]


def _per_layer_entries(model: PreTrainedModel) -> list[tuple[str, list[Any]]]:
    total = model.config.num_hidden_layers
    return [
        (key, value)
        for key, value in vars(model.config).items()
        if _PER_LAYER_KEY.search(key) and isinstance(value, list) and len(value) == total
    ]


def decoder_stack(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that holds the list of decoder layers, and the list's attribute name."""
    found = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == model.config.num_hidden_layers
    ]
    # A layer may hold lists too (experts, for example), but none outside it
    if not found:
        raise UnsupportedModel(f"cannot find the layers of a {model.config.model_type} model")
    return found[0]
