"""Loading a decoder-only language model, from safetensors and without running anyone's code."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from redraft.errors import ModelError, ModelNotFound, UnsupportedModel
from redraft.models.cache import Progress, sha256_file, stderr_progress
from redraft.models.checkpoint_files import weight_files
from redraft.models.parallel import check_shardable, sharding_options
from redraft.models.ref import ModelRef
from redraft.models.rounding import WeightFormat, rounded_fingerprint, to_groups
from redraft.models.source import CheckpointSource, resolve_source

# Layers whose state is keys and values per position; a recurrent layer's state cannot be rolled back.
_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
# Entries of config.json that say nothing about what the model computes.
_VOLATILE_CONFIG = frozenset({"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"})


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for inference: eval mode, no gradients, on `device` in `dtype`.

    `revision` is the hub's commit, or the GGUF file's SHA-256, or None for a plain directory.
    `weights_fingerprint` is `sha256:<hex>` over what the model computes: see `weights_fingerprint`.
    `directory` holds the checkpoint it was read from.
    """

    model: PreTrainedModel
    config: PreTrainedConfig
    name: str
    revision: str | None
    weights_fingerprint: str
    dtype: torch.dtype
    device: torch.device
    directory: Path

    @property
    def draft_version(self) -> str:
        """A short name for a draft that no registry has named: the start of its weights' hash."""
        return unregistered_version(self.weights_fingerprint)


def unregistered_version(fingerprint: str) -> str:
    """`d-<hex>`: what a draft with these weights (`weights_fingerprint`) is called while no registry has named it."""
    return f"d-{fingerprint.removeprefix('sha256:')[:12]}"


def load_model(
    ref: ModelRef,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
    cache_dir: Path | None = None,
    num_shards: int = 1,
    weights: WeightFormat = WeightFormat.FULL,
    progress: Progress = stderr_progress,
) -> LoadedModel:
    """Fetch (once) and load the model that `ref` names.

    `dtype` None keeps the checkpoint's own. `attn_implementation` is a name known to transformers or
    registered with its `AttentionInterface` (None: transformers' choice). A head tied to the embedding stays
    one tensor with it. `cache_dir` holds converted models (None: the user's cache). With `num_shards` above 1 the
    result is this process's shard, on the device of its rank instead of `device` (see `parallel_group.join_group`).
    `weights` other than full (float32 on a CPU only) rounds the linears unless they lie on such a grid (`rounding`);
    the model then has another fingerprint.

    Raises `ModelNotFound`, `UnsafeCheckpoint` (pickled weights only), `ChecksumMismatch`, `UnsupportedModel`
    (not decoder-only, needs its own code, or an attention that transformers lacks), or `ModelError` for
    damaged or incomplete weights.
    """
    source = resolve_source(ref, cache_dir=cache_dir, progress=progress)
    files = weight_files(source.directory)
    config = read_config(source)
    progress(f"Loading {source.name} ({sum(file.stat().st_size for file in files) / 1e6:,.0f} MB)")
    if num_shards > 1:
        check_shardable(config, num_shards, source.name)
    model = _load_weights(source, config, dtype, attn_implementation, num_shards)
    if num_shards == 1:
        torch.nn.Module.to(model, device=torch.device(device))  # transformers' own `to` is wrapped, and untyped
    torch.nn.Module.eval(model).requires_grad_(False)
    fingerprint = weights_fingerprint(source.directory)
    if weights is not WeightFormat.FULL and not to_groups(model, weights):
        fingerprint = rounded_fingerprint(fingerprint, weights)
    return LoadedModel(
        model=model,
        config=model.config,
        name=source.name,
        revision=source.revision,
        weights_fingerprint=fingerprint,
        dtype=model.dtype,
        device=model.device,
        directory=source.directory,
    )


def read_config(source: CheckpointSource) -> PreTrainedConfig:
    """The checkpoint's config, if it is a decoder-only text model; else raises `UnsupportedModel`."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source.directory, trust_remote_code=False)
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise UnsupportedModel(
            f"cannot read the config of {source.name}: its architecture is not part of the installed "
            "transformers (code that comes with a model is never run), or config.json is damaged"
        ) from error
    reason = _unsupported_reason(config)
    if reason:
        raise UnsupportedModel(f"{source.name} ({config.model_type}) cannot be served: {reason}")
    return config


def weights_fingerprint(directory: Path) -> str:
    """`sha256:<hex>` over the weights' bytes and the config, without entries such as library versions.

    Full file contents, because two drafts of one loop differ in nothing else: same shapes, same sizes.
    Files are read in parallel, 1 to 2 GB/s a core, and loading finds them in the page cache. The same weights
    sharded otherwise have another fingerprint.
    """
    files = weight_files(directory)
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(sha256_file, files))
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    content = {
        "config": {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG},
        "weights": [[file.name, digest] for file, digest in zip(files, digests, strict=True)],
    }
    return "sha256:" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _unsupported_reason(config: PreTrainedConfig) -> str | None:
    """Why the model is not a decoder-only text model with attention layers, or None if it is one."""
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, and only decoder-only models can be"
    if config.get_text_config() is not config:
        return "it is a multi-modal model; use its text-only checkpoint"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "it is not a causal language model"
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", None) is False:
        return "it is an encoder, and only decoder-only models can be"
    kinds = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if kinds:
        return f"it has layers without attention over the past ({', '.join(sorted(kinds))})"
    if not _model_class(config)._supports_attention_backend:
        return "its code in transformers does not use the attention interface"
    return None


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model_class: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    return model_class


def _load_weights(
    source: CheckpointSource,
    config: PreTrainedConfig,
    dtype: torch.dtype | None,
    attn_implementation: str | None,
    num_shards: int,
) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": dtype or "auto"}
    if num_shards > 1:
        options |= sharding_options(num_shards)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    auto: Any = AutoModelForCausalLM
    try:
        model, report = auto.from_pretrained(
            source.directory,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except SafetensorError as error:
        raise ModelError(f"the weights of {source.name} are damaged: {error}") from error
    except OSError as error:
        # safetensors says "no such file" of one that it may not open
        closed = [path.name for path in source.directory.glob("*.safetensors") if not os.access(path, os.R_OK)]
        reason = f"user {os.geteuid()} may not read {closed[0]}" if closed else _first_line(error)
        raise ModelNotFound(f"cannot read the weights of {source.name}: {reason}") from error
    except (ValueError, ImportError, RuntimeError) as error:
        raise UnsupportedModel(f"cannot load {source.name}: {_first_line(error)}") from error
    # transformers would fill the gaps with random numbers and only warn
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(f"{source.name} is incomplete: {len(missing)} weights are missing, e.g. {missing[0]}")
    loaded: PreTrainedModel = model
    return loaded


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
