"""log q of a large vocabulary where little of it is wanted: two autograd functions that keep memory and passes low.

At n = 512 positions and 49,152 ids one [n, width] tensor is 100 MB, and each pass over it costs as much as a layer of a
small draft. The sparse function below makes one such tensor forward and one backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from redraft.sampling.divergence import UNREACHABLE

CHUNK_ELEMENTS = 1 << 21
"""Dense work goes by chunks of about so many elements (8 MB each for the half dozen intermediate tensors)."""


@dataclass(frozen=True, slots=True)
class SparseLogProbs:
    """log q where it is wanted; `UNREACHABLE` at places not marked as there.

    Attributes:
        head: [n, m] at the columns asked for.
        tail: [n] of all other columns together.
        drawn: [n] at one more column, which is part of the tail.
        largest: [n] the row's largest logit, without a gradient.
    """

    head: Tensor
    tail: Tensor
    drawn: Tensor
    largest: Tensor


def sparse_log_probs(
    logits: Tensor, temperature: Tensor, columns: Tensor, there: Tensor, drawn: Tensor, drawn_there: Tensor
) -> SparseLogProbs:
    """log softmax(logits / temperature) at some columns.

    Args:
        logits: [n, width] float32; temperature: [n].
        columns, there: [n, m] int64 and bool; a row's columns are distinct where `there`.
        drawn, drawn_there: [n] int64 and bool; a column outside `columns`.
    """
    head, tail, at_drawn, largest = _SparseLogProbs.apply(logits, temperature, columns, there, drawn, drawn_there)  # type: ignore[no-untyped-call]
    return SparseLogProbs(head, tail, at_drawn, largest)


class _SparseLogProbs(torch.autograd.Function):
    """With z = logits / temperature and g, h, k the gradients of head, tail and drawn, G = sum g + h + k:
    dz_v = g_v - G q_v in the head, h q_v / q_tail - G q_v (+ k at the drawn column) in the tail."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        temperature, columns, there, drawn, drawn_there = inputs
        inverse = 1.0 / temperature
        largest = logits.amax(dim=1)
        weights = (logits - largest.unsqueeze(1)).mul_(inverse.unsqueeze(1)).exp_()
        head_weights = torch.where(there, weights.gather(1, columns), 0.0)
        row, slot = there.nonzero(as_tuple=True)
        weights[row, columns[row, slot]] = 0.0  # what is left sums to the tail exactly, however small it is
        tail_weight = weights.sum(dim=1)
        total = tail_weight + head_weights.sum(dim=1)
        below = logits.gather(1, columns) - largest.unsqueeze(1)
        head = below * inverse.unsqueeze(1) - total.log().unsqueeze(1)
        at_drawn = (logits.gather(1, drawn.unsqueeze(1)).squeeze(1) - largest) * inverse - total.log()
        tail = (tail_weight.log() - total.log()).clamp(min=UNREACHABLE)
        ctx.save_for_backward(weights, head_weights / total.unsqueeze(1), tail_weight, total, inverse, *inputs[1:])
        ctx.mark_non_differentiable(largest)
        return (
            torch.where(there, head, UNREACHABLE),
            tail,
            torch.where(drawn_there, at_drawn, UNREACHABLE),
            largest,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weights, head_probs, tail_weight, total, inverse, columns, there, drawn, drawn_there = ctx.saved_tensors
        at_head = torch.where(there, gradients[0], 0.0)
        at_tail = torch.where(tail_weight > 0, gradients[1], 0.0)
        at_drawn = torch.where(drawn_there, gradients[2], 0.0)
        everything = at_head.sum(dim=1) + at_tail + at_drawn
        per_weight = at_tail / tail_weight.clamp(min=torch.finfo(weights.dtype).tiny) - everything / total
        result = weights * (per_weight * inverse).unsqueeze(1)
        row, slot = there.nonzero(as_tuple=True)
        in_head = (at_head - everything.unsqueeze(1) * head_probs) * inverse.unsqueeze(1)
        result[row, columns[row, slot]] = in_head[row, slot]
        every_row = torch.arange(len(drawn), device=drawn.device)
        result[every_row, drawn] += at_drawn * inverse
        return result, None, None, None, None, None


RowFunction = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def by_chunks(logits: Tensor, function: RowFunction) -> tuple[Tensor, Tensor]:
    """`function(logits[rows], rows) -> (values, extra)`, both [rows], over all rows in chunks of bounded size.

    Values carry a gradient, `extra` none. A row's value may depend on that row of logits alone. The gradient is taken
    chunk by chunk in the forward pass, so beside it (one [n, width] tensor) only one chunk's intermediates exist.
    """
    logits = logits if torch.is_grad_enabled() else logits.detach()
    values, extra = _ByChunks.apply(logits, function)  # type: ignore[no-untyped-call]
    return values, extra


class _ByChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, function: RowFunction) -> tuple[Tensor, Tensor]:
        wanted = bool(ctx.needs_input_grad[0])
        gradient = torch.empty_like(logits) if wanted else None
        values, extra = logits.new_zeros(len(logits)), logits.new_zeros(len(logits))
        step = max(1, CHUNK_ELEMENTS // max(1, logits.shape[1]))
        for start in range(0, len(logits), step):
            rows = slice(start, start + step)
            part = logits[rows].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                result, beside = function(part, rows)
                total = result.sum()
            if gradient is not None:
                (gradient[rows],) = torch.autograd.grad(total, part)
            values[rows], extra[rows] = result.detach(), beside.detach()
        ctx.gradient = gradient
        ctx.mark_non_differentiable(extra)
        return values, extra

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient * gradients[0].unsqueeze(1), None
