"""The three sources of teacher predictions: captured while serving, the target run again, none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from redraft.sampling.coupling import draw
from redraft.sampling.params import SamplingParams
from redraft.sampling.processors import probabilities
from redraft.sampling.randomness import Purpose, as_key_tensor, uniforms
from redraft_training.dataset.batch import Batch
from redraft_training.dataset.captured import KeptRows, request_probabilities, tempered_probabilities
from redraft_training.objectives.targets import Targets
from redraft_training.student.packed_forward import packed_forward, prepare


class CapturedTeacher:
    """Labels kept while serving: no forward pass of the target.

    The ids kept have their probability at the request's own parameters, exactly wherever it follows from what was kept
    (`redraft_training.dataset.captured` says when it does). What is missing from 1 is `tail`; where it is not zero, the
    emitted token stands for it if it is not among the ids, which makes a sum over p unbiased.

    At a temperature of its own (not None) the emitted token was drawn from another distribution than the one asked for,
    so it stands for the tail only where the request sampled from the plain distribution at that temperature.

    Args:
        vocab_size: of the target.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def targets(self, batch: Batch, *, temperature: float | None = None) -> Targets:
        """See `Teacher`. Sparse; rows without a label are not known. On the batch's device."""
        device = batch.input_ids.device
        index = [i for i, label in enumerate(batch.labels) if label is not None]
        if not index:
            return _nothing(batch)
        labels = [label for label in batch.labels if label is not None]
        rows = [batch.sampling_rows[i] for i in index]
        next_ids = batch.next_ids.cpu().numpy()[index]
        kept = KeptRows.of(labels)
        if temperature is None:
            found = request_probabilities(labels, kept, rows, next_ids, self._vocab_size)
        else:
            found = tempered_probabilities(labels, kept, temperature, self._vocab_size)
            drawn = np.array([_is_plain(row.params, temperature) for row in rows])
            next_ids = np.where(drawn, next_ids, -1)
        is_kept = ((kept.ids == next_ids[:, None]) & (np.arange(kept.ids.shape[1]) < kept.counts[:, None])).any(1)
        shape = (batch.num_positions, kept.ids.shape[1])
        ids, probs = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        tail, tail_ids = np.zeros(shape[0], np.float32), np.full(shape[0], -1, np.int64)
        ids[index], probs[index], tail[index] = kept.ids, found.probs, found.tail
        tail_ids[index] = np.where(is_kept | (found.tail <= 0.0), -1, next_ids)
        known = np.zeros(shape[0], np.bool_)
        known[index] = True
        return Targets(
            probs=torch.from_numpy(probs).to(device),
            known=torch.from_numpy(known).to(device),
            ids=torch.from_numpy(ids).to(device),
            tail=torch.from_numpy(tail).to(device),
            tail_ids=torch.from_numpy(tail_ids).to(device),
        )


class NoTeacher:
    """Text only, as from a black box: nothing is known at any position."""

    def targets(self, batch: Batch, *, temperature: float | None = None) -> Targets:
        """See `Teacher`."""
        return _nothing(batch)


class RerunTeacher:
    """The target, run over the batch: exact, also for text that it never served.

    Args:
        model: the target in eval mode. Made ready for packed batches in place, so it serves nothing else any more.
        vocab_size: ids that the tokenizer knows; logits of padding ids above it are cut off.
        top_n: keep only so many probabilities a position, the mass of the rest, and one id drawn from all of them
            (`Targets.tail_ids`, if it is not among those kept). None: dense.
        hidden_layers: which hidden states to return (0: the embedding, i: after layer i).
        max_positions: positions whose logits are in memory at a time (at least one row's).
        seed: of the drawn ids.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        vocab_size: int,
        top_n: int | None = None,
        hidden_layers: tuple[int, ...] = (),
        max_positions: int = 512,
        seed: int = 0,
    ) -> None:
        self._model = model
        self._head = prepare(model)
        self._vocab_size = vocab_size
        self._top_n = top_n
        self._hidden_layers = hidden_layers
        self._max_positions = max_positions
        self._seed = seed

    @torch.no_grad()
    def targets(self, batch: Batch, *, temperature: float | None = None) -> Targets:
        """See `Teacher`; every position is known. On the model's device."""
        device = self._model.device
        parts, order = [], []
        for rows, positions in _row_groups(batch, self._max_positions):
            output = packed_forward(
                self._model,
                self._head,
                _rows_of(batch, rows, positions),
                device=device,
                hidden_layers=self._hidden_layers,
            )
            logits = output.logits[:, : self._vocab_size]
            if temperature is None:
                probs = probabilities(logits, [batch.sampling_rows[i] for i in positions.tolist()])
            else:
                probs = torch.softmax(logits.float() / temperature, dim=1)
            part = Targets(probs, torch.ones(len(positions), dtype=torch.bool, device=device), hidden=output.hidden)
            parts.append(part if self._top_n is None else self._compressed(part, batch, positions))
            order.append(positions)
        return _in_order(parts, torch.cat(order).to(device))

    def _compressed(self, dense: Targets, batch: Batch, positions: Tensor) -> Targets:
        assert self._top_n is not None
        best = dense.probs.topk(min(self._top_n, dense.probs.shape[1]), dim=1)
        tail = (1.0 - best.values.sum(1)).clamp(min=0.0)
        drawn = draw(dense.probs, self._uniforms(batch, positions).to(dense.probs.device))
        is_kept = (best.indices == drawn.unsqueeze(1)).any(1) | (tail <= 0.0)
        return replace(dense, probs=best.values, ids=best.indices, tail=tail, tail_ids=torch.where(is_kept, -1, drawn))

    def _uniforms(self, batch: Batch, positions: Tensor) -> Tensor:
        """One number a position, the same whenever and beside whatever it is run."""
        names = [f"{self._seed}\0{e.request_id}\0{e.sample_index}" for e in batch.examples]
        hashes = [hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest() for name in names]
        keys = as_key_tensor([int.from_bytes(digest, "big") for digest in hashes])
        owner, offset, depth = (x.cpu()[positions] for x in (batch.owner, batch.offset, batch.depth))
        return uniforms(keys[owner], offset * 4096 + depth, Purpose.RECOVER)


def _nothing(batch: Batch) -> Targets:
    count, device = batch.num_positions, batch.input_ids.device
    return Targets(
        probs=torch.zeros(count, 1, device=device),
        known=torch.zeros(count, dtype=torch.bool, device=device),
        ids=torch.zeros(count, 1, dtype=torch.int64, device=device),
        tail=torch.zeros(count, device=device),
        tail_ids=torch.full((count,), -1, dtype=torch.int64, device=device),
    )


def _is_plain(params: SamplingParams, temperature: float) -> bool:
    """Whether the request drew from softmax(raw logits / temperature) itself."""
    untouched = not params.has_penalties and not params.logit_bias and params.temperature == temperature
    return untouched and not params.top_k and params.top_p >= 1.0 and params.min_p <= 0.0


def _row_groups(batch: Batch, max_positions: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of the batch with at most so many positions together (one row at least), and these positions."""
    num_rows, length = batch.input_ids.shape
    row_of = batch.predict.cpu() // length
    counts = torch.bincount(row_of, minlength=num_rows).tolist()
    first = total = 0
    for row, count in enumerate([*counts, max_positions + 1]):
        if total and total + count > max_positions:
            rows = torch.arange(first, row)
            yield rows, ((row_of >= first) & (row_of < row)).nonzero().flatten()
            first, total = row, 0
        total += count


def _rows_of(batch: Batch, rows: Tensor, positions: Tensor) -> Batch:
    """The part of a batch that a forward pass looks at. `predict` is all that is set of its positions."""
    device, length = batch.input_ids.device, batch.input_ids.shape[1]
    where = rows.to(device)
    return replace(
        batch,
        input_ids=batch.input_ids[where],
        position_ids=batch.position_ids[where],
        attention_mask=batch.attention_mask[where],
        predict=batch.predict[positions.to(device)] - int(rows[0]) * length,
    )


def _in_order(parts: list[Targets], order: Tensor) -> Targets:
    """Parts joined, position i of the result being the one that `order` says is i."""
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)

    def join(tensors: list[Tensor | None]) -> Tensor | None:
        found = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(found)[back] if found else None

    probs, known = join([p.probs for p in parts]), join([p.known for p in parts])
    assert probs is not None
    assert known is not None
    hidden = zip(*(part.hidden for part in parts), strict=True)
    return Targets(
        probs=probs,
        known=known,
        ids=join([p.ids for p in parts]),
        tail=join([p.tail for p in parts]),
        tail_ids=join([p.tail_ids for p in parts]),
        hidden=tuple(torch.cat(layer)[back] for layer in hidden),
    )
