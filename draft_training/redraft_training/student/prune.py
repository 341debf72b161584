"""A first draft: some of the target's own layers, between its embedding and its head.

Pruning keeps what is costly to learn (the embedding, the head, the residual stream's basis), so distillation
has only to heal the gaps. An untrained pruned model proposes poorly: expect almost no acceptance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from redraft.errors import ConfigError
from redraft.files import atomic_directory
from redraft.models.cache import Progress, stderr_progress
from redraft.models.checkpoint_files import copy_tokenizer
from redraft.models.draft_vocab import DraftVocab
from redraft.models.loader import LoadedModel, load_model, read_config
from redraft.models.ref import ModelRef
from redraft.models.source import resolve_source
from redraft.models.tokenizer import load_tokenizer
from redraft_training.student.checkpoint import parameters, write_provenance
from redraft_training.student.importance import Importance, choose_layers
from redraft_training.student.layers import check_layers, evenly_spaced_layers, prune_layers
from redraft_training.student.width import prune_width


@dataclass(frozen=True, slots=True)
class DraftShape:
    """What of the target a draft is made of.

    Attributes:
        layers: 0-based, ascending; or else
        num_layers: how many, chosen by `importance`.
        importance: EVEN (evenly spaced, the first and the last included), or measured on calibration text.
        intermediate_size, num_key_value_heads: MLP channels and key/value heads to keep in every layer, chosen on
            calibration text; None: all.
        vocab: the reduced output vocabulary; None: the whole one.
    """

    layers: Sequence[int] | None = None
    num_layers: int | None = None
    importance: Importance = Importance.EVEN
    intermediate_size: int | None = None
    num_key_value_heads: int | None = None
    vocab: DraftVocab | None = None


def init_draft(
    target: ModelRef,
    output: Path,
    *,
    layers: Sequence[int] | None = None,
    num_layers: int | None = None,
    shape: DraftShape | None = None,
    calibration: Sequence[Sequence[int]] = (),
    progress: Progress = stderr_progress,
) -> tuple[int, ...]:
    """Write a draft made of parts of the target to `output`; return the layers kept.

    Give a `shape`, or in short its `layers` or `num_layers`. `calibration`: token ids of texts like those to be
    served, for a shape that is chosen by measurement.
    `output` becomes a standard checkpoint directory in the target's own dtype, with the target's tokenizer, a
    `draft_config.json` that says where it came from, and `draft_vocab.json` for a reduced vocabulary; it appears whole
    or not at all. Raises `ConfigError` for a bad choice of layers, no calibration text where it is needed, or an output
    that is not empty, and whatever `load_model` raises.
    """
    shape = shape or DraftShape(layers=layers, num_layers=num_layers)
    check_output(output)
    total = read_config(resolve_source(target, progress=progress)).num_hidden_layers
    kept = _planned_layers(shape, total)
    loaded = load_model(target, dtype=None, progress=progress)
    tokenizer = load_tokenizer(target, progress=progress)
    if shape.vocab is not None:
        shape.vocab.check(tokenizer.vocab_size)
    if kept is None:
        assert shape.num_layers is not None
        kept = choose_layers(loaded.model, calibration, shape.num_layers, method=shape.importance)
    prune_layers(loaded.model, kept)
    if shape.intermediate_size is not None or shape.num_key_value_heads is not None:
        prune_width(
            loaded.model,
            calibration,
            intermediate_size=shape.intermediate_size,
            num_key_value_heads=shape.num_key_value_heads,
        )
    progress(f"Writing {len(kept)} of {total} layers ({parameters(loaded.model):,} parameters) to {output}")
    with atomic_directory(output) as temporary:
        loaded.model.save_pretrained(temporary)
        copy_tokenizer(loaded.directory, temporary)
        if shape.vocab is not None:
            shape.vocab.write(temporary)
        write_provenance(temporary, _provenance(loaded, shape, kept, total, tokenizer.fingerprint))
    return kept


def _planned_layers(shape: DraftShape, total: int) -> tuple[int, ...] | None:
    """The layers, if they are known before anything is measured."""
    if shape.layers is not None:
        return check_layers(shape.layers, total)
    if shape.num_layers is None:
        raise ConfigError("say which layers to keep: --layers 0,10,20,29 or --num-layers 4")
    even = evenly_spaced_layers(shape.num_layers, total)
    return even if shape.importance is Importance.EVEN else None


def check_output(output: Path) -> None:
    """Raise `ConfigError` if `output` exists and is anything but an empty directory."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} exists and is not an empty directory")


def _provenance(
    loaded: LoadedModel, shape: DraftShape, kept: tuple[int, ...], total: int, tokenizer_fingerprint: str
) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "method": "pruning",
        "target": {
            "name": loaded.name,
            "revision": loaded.revision,
            "weights_fingerprint": loaded.weights_fingerprint,
            "num_hidden_layers": total,
        },
        "layers": list(kept),
        "importance": "given" if shape.layers is not None else shape.importance.value,
        "intermediate_size": getattr(loaded.config, "intermediate_size", None),
        "num_key_value_heads": getattr(loaded.config, "num_key_value_heads", None),
        "draft_vocab_size": None if shape.vocab is None else len(shape.vocab.ids),
        "num_parameters": parameters(loaded.model),
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "redraft_version": version("redraft"),
        "transformers_version": version("transformers"),
    }
