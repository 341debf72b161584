"""The student's logits as its distribution is made from them in training: the request's parameters, without truncation.

Serving cuts the draft's distribution by top-k, top-p and min-p too, but a cut has no gradient for what it removes, and
an id that falls out would never come back. Training therefore compares the target's distribution, cut as the request
asks, with the student's uncut one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from redraft.sampling.params import SamplingParams
from redraft.sampling.processors import SamplingRow, adjusted_logits
from redraft_training.objectives.objective import Objective
from redraft_training.student.student import StudentOutput

_PLAIN = SamplingRow(SamplingParams())


@dataclass(frozen=True, slots=True)
class Scores:
    """q = softmax(logits / temperature): logits [n, width] float32 with a gradient, temperature [n] float32."""

    logits: Tensor
    temperature: Tensor


def student_scores(output: StudentOutput, rows: Sequence[SamplingRow], objective: Objective) -> Scores:
    """What q is made from at n positions.

    `objective.temperature` None: the request's penalties, bias, bans and temperature; for a greedy request temperature
    1, with the penalties if its target is the one-hot (`greedy_targets` hard) and raw if it is soft. A number: raw
    logits over that temperature.
    """
    fixed = objective.temperature
    if fixed is not None:
        return Scores(output.logits, output.logits.new_full((len(rows),), fixed))
    soft = objective.greedy_targets == "soft"
    effective = [_PLAIN if soft and row.params.is_greedy else row for row in rows]
    temperatures = [1.0 if row.params.is_greedy else row.params.temperature for row in rows]
    return Scores(_adjusted(output, effective), output.logits.new_tensor(temperatures).clamp(min=1e-30))


def student_log_probs(output: StudentOutput, rows: Sequence[SamplingRow], objective: Objective) -> Tensor:
    """log q, [n, width] float32 over the student's output vocabulary, differentiable. All of it at once, which `loss`
    never needs."""
    scores = student_scores(output, rows, objective)
    return (scores.logits / scores.temperature.unsqueeze(1)).log_softmax(dim=1)


def columns_of(ids: Tensor, vocab_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Columns of token ids in a student's output, and which of them exist there (elsewhere the column is 0)."""
    if vocab_ids is None:
        return ids.clamp(min=0), ids >= 0
    found = torch.searchsorted(vocab_ids, ids).clamp(max=len(vocab_ids) - 1)
    present = vocab_ids[found] == ids
    return torch.where(present, found, 0), present


def _adjusted(output: StudentOutput, rows: Sequence[SamplingRow]) -> Tensor:
    if not any(_changes_logits(row) for row in rows):
        return output.logits
    if output.vocab_ids is not None:
        columns = {int(token): column for column, token in enumerate(output.vocab_ids.tolist())}
        rows = [_in_columns(row, columns) if _changes_logits(row) else row for row in rows]
    adjusted: Tensor = _Adjust.apply(output.logits, rows)  # type: ignore[no-untyped-call]
    return adjusted


def _changes_logits(row: SamplingRow) -> bool:
    return bool(row.banned_ids or row.params.logit_bias or row.params.has_penalties)


def _in_columns(row: SamplingRow, columns: dict[int, int]) -> SamplingRow:
    """The row with column numbers of a reduced output vocabulary in place of token ids."""

    def kept(ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(columns[token] for token in ids if token in columns)

    bias = tuple((columns[token], value) for token, value in row.params.logit_bias if token in columns)
    params = dataclasses.replace(row.params, logit_bias=bias)
    return SamplingRow(params, kept(row.prompt_ids), kept(row.output_ids), kept(row.banned_ids))


class _Adjust(torch.autograd.Function):
    """`adjusted_logits` with its gradient: 0 at banned ids, the repetition penalty's factor at ids seen, else 1.

    Autograd through its in-place edits would copy the whole gradient once per edited row.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        ctx.rows = rows
        ctx.edits = []
        for index, row in enumerate(rows):
            penalty = row.params.repetition_penalty
            if penalty != 1.0:
                seen = torch.tensor(sorted({*row.prompt_ids, *row.output_ids}), dtype=torch.int64, device=logits.device)
                values = logits[index, seen]
                ctx.edits.append((index, seen, torch.where(values > 0, 1.0 / penalty, penalty)))
            if row.banned_ids:
                banned = torch.tensor(row.banned_ids, dtype=torch.int64, device=logits.device)
                ctx.edits.append((index, banned, torch.zeros(len(banned), device=logits.device)))
        return adjusted_logits(logits, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].clone()
        for index, ids, factor in ctx.edits:
            gradient[index, ids] *= factor
        return gradient, None
