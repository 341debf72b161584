"""Examples, labels and single-row batches for the data set tests, made from logits that a test knows in full."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from redraft.sampling.logprobs import teacher_rows
from redraft.sampling.params import SamplingParams
from redraft.sampling.processors import SamplingRow
from redraft_training.dataset.batch import Batch
from redraft_training.dataset.example import Branch, Example, Label
from redraft_training.dataset.select import TargetIdentity

VOCAB = 40
IDENTITY = TargetIdentity("sha256:1", "sha256:2", VOCAB)


def labels_of(logits: Tensor, rows: Sequence[SamplingRow], num_kept: int) -> list[Label]:
    """What a server that captures `num_kept` logits writes down of logits [n, vocab_size]."""
    return [
        Label(row.ids, row.logits, row.logsumexp, row.sampling_logsumexp)
        for row in teacher_rows(logits, num_kept, rows)
    ]


def batch_of(
    rows: Sequence[SamplingRow],
    labels: Sequence[Label | None],
    next_ids: Sequence[int] | None = None,
    examples: tuple[Example, ...] = (),
) -> Batch:
    """n positions without the tokens around them: all that a captured teacher looks at."""
    n = len(rows)
    zeros = torch.zeros(n, dtype=torch.int64)
    return Batch(
        examples=examples,
        input_ids=torch.zeros(1, n, dtype=torch.int64),
        position_ids=torch.zeros(1, n, dtype=torch.int64),
        attention_mask=torch.eye(n, dtype=torch.bool)[None, None],
        predict=torch.arange(n),
        owner=zeros,
        offset=torch.arange(n),
        depth=zeros,
        next_ids=torch.full((n,), -1) if next_ids is None else torch.tensor(next_ids),
        sampling_rows=tuple(rows),
        labels=tuple(labels),
    )


def example(request_id: str = "r0", num_output: int = 6, seed: int = 0, **changes: Any) -> Example:
    """A random example: every second position labelled, one branch of two tokens."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (num_output + 8,), generator=g).tolist()

    def label() -> Label:
        values = torch.randn(3, generator=g).sort(descending=True).values.tolist()
        return Label(array("i", tokens[:3]), array("f", values), 2.5, 3.5)

    params = changes.pop("params", SamplingParams(temperature=0.8, top_p=0.9))
    values: dict[str, Any] = {
        "request_id": request_id,
        "sample_index": 0,
        "domain": "chat",
        "created_unix_s": 1000.0 + seed,
        "prompt_token_ids": tuple(tokens[:5]),
        "output_token_ids": tuple(tokens[5 : 5 + num_output]),
        "params": params,
        "labels": tuple(label() if i % 2 else None for i in range(num_output)),
        "branches": (Branch(2, (7, 8), (label(), None)),) if num_output > 2 else (),
    }
    return Example(**{**values, **changes})
