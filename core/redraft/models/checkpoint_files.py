"""Which files make a checkpoint directory."""

from __future__ import annotations

import shutil
from pathlib import Path

from redraft.errors import ModelNotFound, UnsafeCheckpoint

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
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


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted by name.

    Raises `UnsafeCheckpoint` if the weights exist only as pickle, `ModelNotFound` if there are none.
    """
    files = sorted(directory.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise UnsafeCheckpoint(
            f"{directory} has its weights only as pickle ({pickles[0]}), which may run code when read. "
            "Convert it where you trust the file: transformers writes safetensors with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    raise ModelNotFound(f"{directory} holds no weights: expected *.safetensors")


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copy a checkpoint's tokenizer files to another directory."""
    for pattern in _TOKENIZER_FILES:
        for file in sorted(source.glob(pattern)):
            shutil.copyfile(file, destination / file.name)
