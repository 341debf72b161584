"""Packed batches for tests, put together by hand: two texts in one row, one of them with a branch."""

from __future__ import annotations

import torch
from torch import Tensor

from redraft.sampling.params import SamplingParams
from redraft.sampling.processors import SamplingRow
from redraft_training.dataset.batch import Batch


def packed_batch(rows: list[list[list[int]]], predict: list[tuple[int, int]], *, length: int | None = None) -> Batch:
    """Several texts per row, padded. `predict`: (row, index in the row) of positions that predict."""
    width = length or max(sum(map(len, row)) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    positions = torch.zeros_like(input_ids)
    mask = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)
    for r, texts in enumerate(rows):
        start = 0
        for text in texts:
            end = start + len(text)
            input_ids[r, start:end] = torch.tensor(text)
            positions[r, start:end] = torch.arange(len(text))
            mask[r, start:end, start:end] = torch.ones(len(text), len(text), dtype=torch.bool).tril()
            start = end
    return make_batch(input_ids, positions, mask.unsqueeze(1), torch.tensor([r * width + i for r, i in predict]))


def branch_batch(text: list[int], start: int, branch: list[int]) -> Batch:
    """One text and, behind it in the row, a branch that leaves it before index `start`; every position predicts."""
    length = len(text) + len(branch)
    input_ids = torch.tensor([text + branch])
    positions = torch.tensor([[*range(len(text)), *range(start, start + len(branch))]])
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[len(text) :, start : len(text)] = False
    return make_batch(input_ids, positions, mask[None, None], torch.arange(length))


def make_batch(input_ids: Tensor, positions: Tensor, mask: Tensor, predict: Tensor) -> Batch:
    n = len(predict)
    zeros = torch.zeros(n, dtype=torch.int64)
    rows = (SamplingRow(SamplingParams(temperature=0.0)),) * n
    return Batch((), input_ids, positions, mask, predict, zeros, zeros, zeros, zeros, rows, (None,) * n)
