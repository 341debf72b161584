"""A first draft: some of the target's own layers, between its embedding and its head.

Pruning keeps what is costly to learn (the embedding, the head, the residual stream's basis), so distillation
has only to heal the gaps. An untrained pruned model proposes poorly: expect almost no acceptance.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from redraft.errors import ConfigError, UnsupportedModel
from redraft.models.cache import Progress, atomic_directory, stderr_progress
from redraft.models.loader import LoadedModel, load_model, read_config
from redraft.models.ref import ModelRef
from redraft.models.source import resolve_source
from redraft.models.tokenizer import load_tokenizer

DRAFT_CONFIG = "draft_config.json"
# One entry a layer, in any architecture's config: layer_types, mlp_layer_types, no_rope_layers, ...
_PER_LAYER_KEY = re.compile(r"layer_types|_layers$")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
)


def init_draft(
    target: ModelRef,
    output: Path,
    *,
    layers: Sequence[int] | None = None,
    num_layers: int | None = None,
    progress: Progress = stderr_progress,
) -> tuple[int, ...]:
    """Write a draft made of the target's `layers` to `output`; return the layers kept.

    Give `layers` (0-based, ascending) or `num_layers` (evenly spaced, the first and the last included).
    `output` becomes a standard checkpoint directory in the target's own dtype, with the target's tokenizer and
    a `draft_config.json` that says where it came from; it appears whole or not at all. Raises `ConfigError` for
    a bad choice of layers or an output that is not empty, and whatever `load_model` raises.
    """
    check_output(output)
    total = read_config(resolve_source(target, progress=progress)).num_hidden_layers
    if layers is None:
        if num_layers is None:
            raise ConfigError("say which layers to keep: --layers 0,10,20,29 or --num-layers 4")
        layers = evenly_spaced_layers(num_layers, total)
    kept = check_layers(layers, total)
    loaded = load_model(target, dtype=None, progress=progress)
    tokenizer = load_tokenizer(target, progress=progress)
    prune_layers(loaded.model, kept)
    progress(f"Writing {len(kept)} of {total} layers ({parameters(loaded.model):,} parameters) to {output}")
    with atomic_directory(output) as temporary:
        loaded.model.save_pretrained(temporary)
        _copy_tokenizer(loaded.directory, temporary)
        provenance = _provenance(loaded, kept, total, tokenizer.fingerprint)
        text = json.dumps(provenance, indent=2) + "\n"
        (temporary / DRAFT_CONFIG).write_text(text, encoding="utf-8")
    return kept


def prune_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Keep only `layers` (0-based, in this order) of a decoder-only model, in place.

    Embedding, final norm and head are untouched, tied ones stay tied; nothing is copied. Raises
    `UnsupportedModel` if the stack of layers cannot be found.
    """
    parent, name = _decoder_stack(model)
    stack: nn.ModuleList = getattr(parent, name)
    total = len(stack)
    kept = [stack[index] for index in layers]
    for position, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # the key into the KV cache
                module.layer_idx = position  # type: ignore[assignment]
    setattr(parent, name, nn.ModuleList(kept))
    config = model.config
    for key, value in list(vars(config).items()):
        if _PER_LAYER_KEY.search(key) and isinstance(value, list) and len(value) == total:
            setattr(config, key, [value[index] for index in layers])
    config.num_hidden_layers = len(kept)


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


def check_output(output: Path) -> None:
    """Raise `ConfigError` if `output` exists and is anything but an empty directory."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} exists and is not an empty directory")


def parameters(model: nn.Module) -> int:
    """Number of parameters; a tied one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _decoder_stack(model: PreTrainedModel) -> tuple[nn.Module, str]:
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


def _copy_tokenizer(source: Path, destination: Path) -> None:
    for pattern in _TOKENIZER_FILES:
        for file in sorted(source.glob(pattern)):
            shutil.copyfile(file, destination / file.name)


def _provenance(loaded: LoadedModel, kept: tuple[int, ...], total: int, tokenizer_fingerprint: str) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "method": "layer_pruning",
        "target": {
            "name": loaded.name,
            "revision": loaded.revision,
            "weights_fingerprint": loaded.weights_fingerprint,
            "num_hidden_layers": total,
        },
        "layers": list(kept),
        "num_parameters": parameters(loaded.model),
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "redraft_version": version("redraft"),
        "transformers_version": version("transformers"),
    }
