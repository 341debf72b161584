"""The reduced output vocabulary of a draft: the few thousand ids it may propose.

A draft's head over the whole vocabulary costs more than its layers. The checkpoint stays complete and standard; beside
it `draft_vocab.json` names the ids whose rows of the head are computed, all others have probability 0 under the draft.
That is lossless like any other q, and costs only the tokens that are not among them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.errors import ModelError

DRAFT_VOCAB = "draft_vocab.json"
_SCHEMA_VERSION = 1
_MAX_BYTES = 64 << 20  # a million ids of any tokenizer are 8 MB


@dataclass(frozen=True, slots=True)
class DraftVocab:
    """Token ids that a draft may propose, ascending and distinct. Raises `ModelError` if they are not."""

    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.ids or any(type(token_id) is not int for token_id in self.ids):
            raise ModelError("a draft vocabulary is a list of at least one token id")
        if self.ids[0] < 0 or any(after <= before for before, after in pairwise(self.ids)):
            raise ModelError("the ids of a draft vocabulary must be ascending and distinct")

    def check(self, vocab_size: int) -> None:
        """Raise `ModelError` unless every id is below `vocab_size`."""
        if self.ids[-1] >= vocab_size:
            raise ModelError(
                f"{DRAFT_VOCAB} holds the token id {self.ids[-1]}, but the model has only {vocab_size}: "
                "it was made for another model"
            )

    def tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """[size] int64."""
        return torch.tensor(self.ids, dtype=torch.int64, device=device)

    def write(self, directory: Path) -> None:
        """Write `draft_vocab.json` into a checkpoint directory."""
        content = {"schema_version": _SCHEMA_VERSION, "ids": list(self.ids)}
        (directory / DRAFT_VOCAB).write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> DraftVocab | None:
        """The checkpoint's reduced output vocabulary; None if it has none. Raises `ModelError` for a damaged file."""
        path = directory / DRAFT_VOCAB
        if not path.is_file():
            return None
        if path.stat().st_size > _MAX_BYTES:
            raise ModelError(f"{path} is too large to be a list of token ids")
        try:
            content: Any = json.loads(path.read_text(encoding="utf-8"))
            version, ids = content["schema_version"], content["ids"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ModelError(f"{path} is damaged: expected an object with schema_version and ids") from error
        if version != _SCHEMA_VERSION or not isinstance(ids, list):
            raise ModelError(f"{path} has the schema version {version!r}, this release reads {_SCHEMA_VERSION}")
        return cls(tuple(ids))
