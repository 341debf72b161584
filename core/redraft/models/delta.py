"""A draft packed small: only what it does not share with its target.

A draft pruned from its target has the target's own embedding and head, most of its bytes. `pack_delta` writes the rest
as `NAME.safetensors`, in int8 or bfloat16, and `NAME.json`: the target it belongs to with the SHA-256 of every tensor
taken from it, the SHA-256 of the weights, and the small files of the checkpoint. `unpack_delta` puts the standard
checkpoint together again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from redraft.errors import ChecksumMismatch, ModelError, ModelNotFound
from redraft.files import atomic_directory, sha256_file, write_file
from redraft.models.checkpoint_files import copy_tokenizer, weight_files
from redraft.models.quantised import DraftQuant, dequantise, quantise

_SCHEMA_VERSION = 1
_MAX_BYTES = 64 << 20
_SCALE = ".scale"
# Small JSON files of a draft, written again as they were
_FILES = ("config.json", "generation_config.json", "draft_config.json", "draft_vocab.json", "draft_quant.json")


def pack_delta(draft_dir: Path, target_dir: Path, output_file: Path, dtype: torch.dtype = torch.int8) -> int:
    """Pack a draft checkpoint into `output_file` (`NAME.safetensors`) and `NAME.json`; return their bytes together.

    `dtype` int8: matrices in int8 with one float32 scale per output, vectors in float32; bfloat16: all in bfloat16.
    Raises `ModelError` if the draft has no tensor in common with the target, or another tokenizer.
    """
    if dtype not in (torch.int8, torch.bfloat16):
        raise ValueError(f"a delta is packed in int8 or bfloat16, not {dtype}")
    if _read_bytes(draft_dir / "tokenizer.json") != _read_bytes(target_dir / "tokenizer.json"):
        raise ModelError("the draft's tokenizer.json is not the target's: only a draft of this target can be packed")
    target = _Tensors(target_dir)
    stored: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in _Tensors(draft_dir).items():
        theirs = target.get(name)
        if theirs is not None and theirs.dtype is tensor.dtype and torch.equal(theirs, tensor):
            shared[name] = _digest(tensor)
        elif dtype is torch.int8 and tensor.dim() == 2:
            stored[name], stored[name + _SCALE] = quantise(tensor)
        else:
            stored[name] = tensor.to(torch.float32 if dtype is torch.int8 else dtype)
    if not any(target.is_matrix(name) for name in shared):
        raise ModelError("the draft has not a single matrix of the target: only a draft pruned from it can be packed")
    output_file.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(output_file) as fresh:
        save_file(stored, fresh, metadata={"format": "pt"})
    files = {name: json.loads(_read_bytes(draft_dir / name)) for name in _FILES if (draft_dir / name).is_file()}
    content = {
        "schema_version": _SCHEMA_VERSION,
        "dtype": str(dtype).removeprefix("torch."),
        "weights_sha256": sha256_file(output_file),
        "target": {"name": target_dir.name, "shared_tensors": shared},
        "files": files,
    }
    description = output_file.with_suffix(".json")
    write_file(description, (json.dumps(content) + "\n").encode())
    return output_file.stat().st_size + description.stat().st_size


def unpack_delta(packed_file: Path, target_dir: Path, directory: Path) -> None:
    """Write the draft of `packed_file` (`NAME.safetensors`) as a complete checkpoint to `directory`, whole or
    not at all.

    Raises `ModelNotFound` if a file is missing, `ChecksumMismatch` if the weights are not those described or the target
    is not the one it was packed for, `ModelError` if the description is damaged.
    """
    content = _description(packed_file)
    if sha256_file(packed_file) != content["weights_sha256"]:
        raise ChecksumMismatch(f"{packed_file.name} is damaged: its SHA-256 is not the one in its description")
    state = _shared_tensors(content["target"]["shared_tensors"], target_dir, packed_file.name)
    state |= _stored_tensors(packed_file, content["files"]["config.json"])
    with atomic_directory(directory) as temporary:
        save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})
        for name in _FILES:
            if name in content["files"]:
                text = json.dumps(content["files"][name], indent=2) + "\n"
                (temporary / name).write_text(text, encoding="utf-8")
        if content["dtype"] == "int8":
            DraftQuant().write(temporary)
        copy_tokenizer(target_dir, temporary)


class _Tensors:
    """The tensors of a checkpoint's safetensors files, read one at a time."""

    def __init__(self, directory: Path) -> None:
        self._file_of: dict[str, Path] = {}
        for path in weight_files(directory):
            with _open(path) as file:
                self._file_of |= dict.fromkeys(file.keys(), path)

    def get(self, name: str) -> Tensor | None:
        if name not in self._file_of:
            return None
        with _open(self._file_of[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def is_matrix(self, name: str) -> bool:
        with _open(self._file_of[name]) as file:
            return len(file.get_slice(name).get_shape()) == 2

    def items(self) -> Iterator[tuple[str, Tensor]]:
        for name in sorted(self._file_of):
            tensor = self.get(name)
            assert tensor is not None
            yield name, tensor


def _shared_tensors(digests: dict[str, str], target_dir: Path, name: str) -> dict[str, Tensor]:
    target = _Tensors(target_dir)
    result: dict[str, Tensor] = {}
    for key, digest in digests.items():
        tensor = target.get(key)
        if tensor is None or _digest(tensor) != digest:
            raise ChecksumMismatch(f"{name} was packed for another target: {key} is not the one it was made with")
        result[key] = tensor
    return result


def _stored_tensors(packed_file: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The packed tensors in the dtype that the draft's config names."""
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    result: dict[str, Tensor] = {}
    with _open(packed_file) as file:
        names = set(file.keys())
        for name in sorted(names):
            if name.endswith(_SCALE) and name.removesuffix(_SCALE) in names:
                continue
            tensor: Tensor = file.get_tensor(name)
            if tensor.dtype is torch.int8:
                tensor = dequantise(tensor, file.get_tensor(name + _SCALE))
            result[name] = tensor.to(dtype).contiguous()
    return result


def _description(packed_file: Path) -> dict[str, Any]:
    path = packed_file.with_suffix(".json")
    for file in (packed_file, path):
        if not file.is_file():
            raise ModelNotFound(f"there is no packed draft {file}")
    try:
        content = json.loads(_read_bytes(path))
        version = content["schema_version"]
        content["target"]["shared_tensors"].items()
        str(content["weights_sha256"] + content["dtype"])
        content["files"]["config.json"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: it does not describe a packed draft") from error
    if version != _SCHEMA_VERSION:
        raise ModelError(f"{path} has the schema version {version!r}, this release reads {_SCHEMA_VERSION}")
    result: dict[str, Any] = content
    return result


def _read_bytes(path: Path) -> bytes:
    if path.is_file() and path.stat().st_size > _MAX_BYTES:
        raise ModelError(f"{path} is too large")
    return path.read_bytes() if path.is_file() else b""


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to; what is there at the end takes the place of `path`."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield fresh
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(raw.data).hexdigest()


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged: {type(error).__name__}") from error
