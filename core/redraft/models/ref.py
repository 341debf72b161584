"""`ModelRef`: the one way to name a model, in configuration, flags and code."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from redraft.errors import ModelError

_HUB_NAME = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][\w./-]*", re.ASCII)
_EXPECTED = (
    "expected `demo`, `demo-draft`, a Hugging Face id such as `org/name` or `org/name@revision`, "
    "a directory such as `./my-model`, or a file that ends in .gguf"
)


class ModelKind(StrEnum):
    """Where a model comes from."""

    HUB = "hub"
    DIRECTORY = "directory"
    GGUF = "gguf"
    DEMO = "demo"
    DEMO_DRAFT = "demo-draft"


@dataclass(frozen=True)
class ModelRef:
    """A model's name, parsed.

    `location` is the hub id, or the path as given (`~` expanded), or `demo`, or `demo-draft`.
    `revision` (a branch, tag or commit) is None except for a hub id that named one.
    """

    kind: ModelKind
    location: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelRef:
        """Read a model's name.

        - `demo` → the packaged SmolLM2-135M-Instruct; `demo-draft` → the draft for it;
        - `anything.gguf` → a GGUF file;
        - starts with `/`, `./`, `../` or `~`, or is an existing directory → a checkpoint directory;
        - `org/name`, `name`, `org/name@revision` → Hugging Face.

        An existing directory wins over a hub id of the same name, as in transformers. Only the shape is
        checked here: whether the model exists shows when it is resolved. Raises `ModelError`.
        """
        name = text.strip()
        if not name:
            raise ModelError(f"the model name is empty: {_EXPECTED}")
        if not name.isprintable() or len(name) > 4096:
            raise ModelError(f"{name[:60]!r} is not a model name: {_EXPECTED}")
        if name in (ModelKind.DEMO, ModelKind.DEMO_DRAFT):
            return cls(ModelKind(name), name)
        is_path = name in (".", "..") or name.startswith(("/", "./", "../", "~"))
        path = Path(os.path.expanduser(name))  # leaves an unknown ~user as it is
        if name.lower().endswith(".gguf"):
            return cls(ModelKind.GGUF, str(path))
        if is_path or path.is_dir():
            return cls(ModelKind.DIRECTORY, str(path))
        return cls._parse_hub(name)

    @classmethod
    def _parse_hub(cls, name: str) -> ModelRef:
        repository, at, revision = name.partition("@")
        parts = repository.split("/")
        well_formed = (
            len(parts) <= 2
            and all(_HUB_NAME.fullmatch(part) and "--" not in part and ".." not in part for part in parts)
            and len(repository) <= 96
        )
        if not well_formed or (at and not _REVISION.fullmatch(revision)):
            raise ModelError(f"{name[:60]!r} is not a model name, nor an existing directory: {_EXPECTED}")
        return cls(ModelKind.HUB, repository, revision or None)

    def __str__(self) -> str:
        """The text that `parse` reads back, and that messages show."""
        if self.kind is ModelKind.DIRECTORY and not re.match(r"/|\.\.?(/|$)", self.location):
            return f"./{self.location}"  # a bare name would be read as a hub id
        return f"{self.location}@{self.revision}" if self.revision else self.location
