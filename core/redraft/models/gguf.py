"""GGUF files: converted once into a standard fp32 safetensors checkpoint in the cache.

transformers reads the file and undoes what the format does to the weights (block quantisation, the rotary
permutation of q and k). What it leaves wrong is put right here:

- it marks the model as quantised, which makes it impossible to save;
- it splits text as GPT-2 does although the file names another splitting rule;
- it does not carry over the context length to the tokenizer;
- the file's 32-bit floats come back as doubles (`rms_norm_eps` 9.999999747378752e-06 for 1e-05).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from redraft.errors import ModelNotFound, UnsupportedModel
from redraft.models.cache import (
    Progress,
    atomic_directory,
    cache_directory,
    exclusive_lock,
    sha256_file,
    stderr_progress,
)

# Part of the cache key: raise it whenever the conversion's result changes.
_CONVERTER_VERSION = 1
# Splitting rules ("pre-tokenizers") that are GPT-2's own.
_GPT2_SPLITS = frozenset({"default", "gpt-2", "gpt2"})


def convert_gguf(
    path: Path, *, cache_dir: Path | None = None, progress: Progress = stderr_progress
) -> tuple[Path, str]:
    """The checkpoint directory made from a GGUF file, and the file's SHA-256.

    Written on the first call for these bytes, under `gguf/` in the cache; a later call only reads the file to
    compute its digest. Needs memory for the fp32 weights. Safe from several processes at once. Raises
    `ModelNotFound`, or `UnsupportedModel` for an architecture, quantisation or tokenizer that transformers
    cannot read.
    """
    if not path.is_file():
        raise ModelNotFound(f"there is no GGUF file {path}")
    digest = sha256_file(path)
    target = (cache_dir or cache_directory()) / "gguf" / f"{path.stem}-{digest[:12]}-v{_CONVERTER_VERSION}"
    if target.is_dir():
        return target, digest
    with exclusive_lock(target.with_name(f".{target.name}.lock")):
        if not target.is_dir():
            progress(f"Converting {path.name} to fp32 safetensors (once)")
            with atomic_directory(target) as temporary:
                _convert(path, temporary, progress)
    return target, digest


def _convert(path: Path, output: Path, progress: Progress) -> None:
    if not _has_magic(path):
        raise UnsupportedModel(f"{path} is not a GGUF file")
    try:
        model = _dequantised_model(path)
        tokenizer = _tokenizer(path, model.config, progress)
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
    except (ValueError, KeyError, NotImplementedError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModel(f"cannot convert {path.name}: {reason}") from error


def _has_magic(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _dequantised_model(path: Path) -> PreTrainedModel:
    """The model in fp32, with a config that holds no trace of the GGUF file."""
    folder, name = str(path.parent), path.name
    auto: Any = AutoModelForCausalLM
    loaded = auto.from_pretrained(
        folder,
        gguf_file=name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    config = _plain_config(AutoConfig.from_pretrained(folder, gguf_file=name, trust_remote_code=False))
    # A fresh model, since a model once marked as quantised refuses to be saved. Built without memory: the
    # loaded tensors are put in place of its own.
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model


def _plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Take out the file's traces and round its floats to the decimals that were meant."""
    for key, value in config.to_dict().items():
        if isinstance(value, float):
            setattr(config, key, shortest_float32(value))
    for trace in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, trace):
            delattr(config, trace)
    return config


def shortest_float32(value: float) -> float:
    """The shortest decimal that is the same float32 as `value`; `value` itself if it is no float32.

    >>> shortest_float32(9.999999747378752e-06)
    1e-05
    """
    narrow = np.float32(value)
    return float(str(narrow)) if float(narrow) == value else value


def _tokenizer(path: Path, config: PreTrainedConfig, progress: Progress) -> PreTrainedTokenizerFast:
    auto: Any = AutoTokenizer
    tokenizer: PreTrainedTokenizerFast = auto.from_pretrained(
        str(path.parent), gguf_file=path.name, trust_remote_code=False
    )
    tokenizer.model_max_length = config.max_position_embeddings
    backend = tokenizer.backend_tokenizer
    rule = _text_field(path, "tokenizer.ggml.pre")
    if rule == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif _splits_as_gpt2(backend.pre_tokenizer) and rule not in _GPT2_SPLITS:
        progress(f"Note: {path.name} asks for the splitting rule {rule!r}, which is not known; using GPT-2's")
    return tokenizer


def _splits_as_gpt2(pre_tokenizer: Any) -> bool:
    return isinstance(pre_tokenizer, pre_tokenizers.ByteLevel) and pre_tokenizer.use_regex


def _text_field(path: Path, key: str) -> str | None:
    field = GGUFReader(path).get_field(key)
    return str(field.contents()) if field else None
