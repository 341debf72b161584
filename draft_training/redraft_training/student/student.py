"""The draft in training: a transformers model, with or without a reduced output vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from redraft_training.dataset.batch import Batch


@dataclass(frozen=True, slots=True)
class StudentOutput:
    """The draft's predictions at a batch's n positions.

    Attributes:
        logits: [n, width] float32 raw logits; width is the size of the draft's output vocabulary.
        vocab_ids: [width] int64, the token id of every column, ascending; None: column v is id v.
        vocab_size: of the target; ids that are not in `vocab_ids` have probability 0 under the draft.
        hidden: one [n, hidden_size] per entry of the draft's hidden states asked for.
    """

    logits: Tensor
    vocab_ids: Tensor | None
    vocab_size: int
    hidden: tuple[Tensor, ...] = ()


class Student(Protocol):
    """What the trainer and the evaluator know of a draft."""

    model: nn.Module
    vocab_ids: Tensor | None

    def __call__(self, batch: Batch, *, hidden_layers: tuple[int, ...] = ()) -> StudentOutput:
        """Forward pass with gradients as the caller's mode has them. `hidden_layers` index the hidden states (0: the
        embedding, i: after draft layer i)."""

    def save(self, directory: Path) -> None:
        """Write a complete draft checkpoint (standard Hugging Face layout) to a directory that is empty or new."""
