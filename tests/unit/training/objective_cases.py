"""Small batches, targets and student outputs made by hand, for the tests of the objectives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from redraft.sampling.params import SamplingParams
from redraft.sampling.processors import SamplingRow
from redraft_training.dataset.batch import Batch
from redraft_training.objectives.targets import Targets
from redraft_training.student.student import StudentOutput

VOCAB = 12
SAMPLED = SamplingRow(SamplingParams(temperature=1.0))
WARM = SamplingRow(SamplingParams(temperature=0.7))
GREEDY = SamplingRow(SamplingParams(temperature=0.0))


def make_batch(
    next_ids: Sequence[int],
    *,
    rows: Sequence[SamplingRow] | None = None,
    depth: Sequence[int] | None = None,
    owner: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
) -> Batch:
    """n positions; nothing of the tokens themselves, which a loss never looks at."""
    n = len(next_ids)
    empty = torch.zeros(1, n, dtype=torch.int64)
    return Batch(
        examples=(),
        input_ids=empty,
        position_ids=empty,
        attention_mask=torch.ones(1, 1, n, n, dtype=torch.bool),
        predict=torch.arange(n),
        owner=torch.tensor(owner if owner is not None else [0] * n),
        offset=torch.tensor(offset if offset is not None else list(range(n))),
        depth=torch.tensor(depth if depth is not None else [0] * n),
        next_ids=torch.tensor(next_ids),
        sampling_rows=tuple(rows) if rows is not None else (SAMPLED,) * n,
        labels=(None,) * n,
    )


def random_probs(n: int, seed: int, *, vocab: int = VOCAB, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 1.5).softmax(dim=1)


def random_logits(n: int, seed: int, *, width: int = VOCAB) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).mul(1.5).requires_grad_()


def student(logits: Tensor, vocab_ids: Tensor | None = None, hidden: tuple[Tensor, ...] = ()) -> StudentOutput:
    return StudentOutput(logits, vocab_ids, VOCAB, hidden)


def dense(probs: Tensor, hidden: tuple[Tensor, ...] = ()) -> Targets:
    return Targets(probs, torch.ones(len(probs), dtype=torch.bool), hidden=hidden)


def sparse(probs: Tensor, m: int, drawn: Sequence[int] | None = None, *, padding: int = 0) -> Targets:
    """The m most probable ids of each row, `padding` empty places, and the emitted tokens that are not among them."""
    top, ids = probs.topk(m, dim=1)
    tail_ids = torch.full((len(probs),), -1)
    for row, token in enumerate(drawn or ()):
        if token not in ids[row].tolist():
            tail_ids[row] = token
    return Targets(
        probs=torch.nn.functional.pad(top, (0, padding)),
        known=torch.ones(len(probs), dtype=torch.bool),
        ids=torch.nn.functional.pad(ids, (0, padding)),
        tail=(1.0 - top.sum(dim=1)).clamp(min=0.0),
        tail_ids=tail_ids,
    )
