"""Examples packed into batches: which tokens share a row, and what may be seen from where.

An example becomes one *piece* (or several, if its output is longer than a row): the end of the prompt, output tokens
and branches. Pieces are packed into rows first-fit, rows into batches. Of the output the last token is not run: nothing
is predicted from it.

Worked example, prompt `[1, 2]`, output `[7, 8, 9, 3]`, branch `start=3, (4, 5)`:

    index     0  1  2  3  4  5  6
    token     1  2  7  8  9  4  5
    position  0  1  2  3  4  5  6      4 follows the text 1 2 7 8 9, as 3 does (which is not run)
    predicts     7  8  9  3  .  .      indices 1..4 on the path (offsets 0..3), 5 and 6 off it (offsets 4, 5)
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from redraft.sampling.processors import SamplingRow
from redraft_training.dataset.batch import Batch
from redraft_training.dataset.example import Branch, Example, Label

_OPEN_ROWS = 64  # rows that are tried for the next piece
_LENGTH_MULTIPLE = 8  # rows are padded to it: matrix kernels like it

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackSettings:
    """Attributes:
    row_tokens: longest row. A prompt that does not fit beside its output loses its beginning.
    batch_tokens: rows times `row_tokens` of a batch, at most (one row at least).
    branches: whether rejected draft tokens are run too, to learn from what the target said behind them.
    """

    row_tokens: int = 512
    batch_tokens: int = 4096
    branches: bool = True

    def __post_init__(self) -> None:
        if self.row_tokens < 2 or self.batch_tokens < self.row_tokens:
            raise ValueError("row_tokens must be at least 2, and batch_tokens at least row_tokens")


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of an example that fits a row: outputs `first .. last - 1` are predicted, behind `context` tokens of text
    (prompt and earlier outputs). `branches` are the branches that leave the text there."""

    example: int
    context: int
    first: int
    last: int
    branches: tuple[Branch, ...]

    @property
    def num_tokens(self) -> int:
        return self.context + self.last - self.first - 1 + sum(len(b.token_ids) for b in self.branches)


class BatchPlan:
    """Batches of examples in an order that (seed, epoch) determines, so that a killed epoch goes on where it was.

    The order is the same whatever the number of ranks; see `redraft_training.distill.work` for how they share it.
    """

    def __init__(self, examples: Sequence[Example], settings: PackSettings, *, seed: int = 0) -> None:
        self.examples = examples
        self.settings = settings
        self._seed = seed
        self._pieces = [p for index, example in enumerate(examples) for p in pieces(index, example, settings)]
        self._layout: tuple[int, list[list[list[Piece]]]] | None = None

    def num_batches(self, epoch: int) -> int:
        """Batches of the epoch, of all ranks together. It differs a little between epochs: other pieces meet."""
        return len(self._batches_of(epoch))

    def batches(self, epoch: int, start_index: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """The epoch's batches `start_index + rank`, `start_index + rank + world_size`, ..."""
        for rows in self._batches_of(epoch)[start_index + rank :: world_size]:
            yield build_batch(self.examples, rows)

    def _batches_of(self, epoch: int) -> list[list[list[Piece]]]:
        if self._layout is None or self._layout[0] != epoch:
            rng = random.Random(f"{self._seed}/{epoch}")
            shuffled = rng.sample(self._pieces, len(self._pieces))
            rows = pack_rows(shuffled, self.settings.row_tokens)
            rng.shuffle(rows)  # first-fit leaves the last rows emptier than the first
            self._layout = epoch, group_rows(rows, self.settings)
        return self._layout[1]


def pack(examples: Sequence[Example], settings: PackSettings) -> Iterator[Batch]:
    """All examples once, for evaluation. Pieces meet as they fit, not in the examples' order: see `Batch.owner`."""
    made = [p for index, example in enumerate(examples) for p in pieces(index, example, settings)]
    for rows in group_rows(pack_rows(made, settings.row_tokens), settings):
        yield build_batch(examples, rows)


def pieces(index: int, example: Example, settings: PackSettings) -> Iterator[Piece]:
    """An example cut into pieces of at most `row_tokens`.

    Each piece but the first keeps at least half a row of earlier text before its first prediction, or all there is;
    so does the first, of the prompt. A branch too long for its piece loses its end.
    """
    num_prompt, num_output = len(example.prompt_token_ids), len(example.output_token_ids)
    branches = _branches_at(example) if settings.branches else {}
    first = 0 if num_prompt else 1  # without a prompt nothing predicts the first token
    while first < num_output:
        context = num_prompt + first
        room = settings.row_tokens - min(context, max(settings.row_tokens // 2, 1))
        last, used, own = first, -1, []
        while last < num_output:
            here = [_cut(b, room - 1) for b in branches.get(last, ())]
            cost = 1 + sum(len(b.token_ids) for b in here)
            if last > first and used + cost > room:
                break
            while here and used + cost > room:  # a single position with more branches than a row holds
                cost -= len(here.pop().token_ids)
            used, last = used + cost, last + 1
            own += here
        yield Piece(index, min(context, settings.row_tokens - used), first, last, tuple(own))
        first = last


def pack_rows(items: Sequence[Piece], row_tokens: int) -> list[list[Piece]]:
    """First-fit: each piece goes to the first of the last few rows that still has room for it."""
    rows: list[list[Piece]] = []
    open_rows: list[tuple[int, int]] = []  # (row, room left)
    for item in items:
        size = item.num_tokens
        for slot, (row, room) in enumerate(open_rows):
            if size <= room:
                rows[row].append(item)
                open_rows[slot] = row, room - size
                break
        else:
            rows.append([item])
            open_rows.append((len(rows) - 1, row_tokens - size))
            if len(open_rows) > _OPEN_ROWS:
                open_rows.remove(min(open_rows, key=lambda entry: entry[1]))
    return rows


def group_rows(rows: Sequence[list[Piece]], settings: PackSettings) -> list[list[list[Piece]]]:
    """Rows of each batch."""
    size = settings.batch_tokens // settings.row_tokens
    return [list(rows[first : first + size]) for first in range(0, len(rows), size)]


def build_batch(examples: Sequence[Example], rows: Sequence[Sequence[Piece]]) -> Batch:
    """The tensors of a batch, on the CPU."""
    longest = max(sum(piece.num_tokens for piece in row) for row in rows)
    length = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    grid = _Grid(len(rows), length)
    owners = {index: n for n, index in enumerate(dict.fromkeys(piece.example for row in rows for piece in row))}
    for number, row in enumerate(rows):
        start = 0
        for serial, piece in enumerate(row):
            grid.place(number, start, serial, piece, examples[piece.example], owners[piece.example])
            start += piece.num_tokens
    return Batch(
        examples=tuple(examples[index] for index in owners),
        input_ids=torch.from_numpy(grid.tokens),
        position_ids=torch.from_numpy(grid.positions),
        attention_mask=torch.from_numpy(grid.mask()),
        predict=_joined(grid.predict),
        owner=_joined(grid.owner),
        offset=_joined(grid.offset),
        depth=_joined(grid.depth),
        next_ids=_joined(grid.next_ids),
        sampling_rows=tuple(grid.sampling_rows),
        labels=tuple(grid.labels),
    )


class _Grid:
    """The rectangle being filled. A token sees the text of its own piece up to `limit`, and its own branch up to
    itself."""

    def __init__(self, rows: int, length: int) -> None:
        shape = (rows, length)
        self.length = length
        self.tokens: Ints = np.zeros(shape, np.int64)
        self.positions: Ints = np.zeros(shape, np.int64)
        self._piece: Ints = np.full(shape, -1, np.int64)  # -1: padding
        self._branch: Ints = np.zeros(shape, np.int64)  # 0: text
        self._limit: Ints = np.zeros(shape, np.int64)
        self.predict: list[Ints] = []
        self.owner: list[Ints] = []
        self.offset: list[Ints] = []
        self.depth: list[Ints] = []
        self.next_ids: list[Ints] = []
        self.sampling_rows: list[SamplingRow] = []
        self.labels: list[Label | None] = []

    def place(self, row: int, start: int, serial: int, piece: Piece, example: Example, owner: int) -> None:
        """Write a piece to columns `start ..` of a row, with its predictions."""
        num_prompt = len(example.prompt_token_ids)
        begin = num_prompt + piece.first - piece.context  # first token of the text that is run
        text = (*example.prompt_token_ids[begin:], *example.output_token_ids[max(begin - num_prompt, 0) : piece.last])
        text = text[: piece.context + piece.last - piece.first - 1]
        self._write(row, start, serial, 0, text, first_position=0, limit=self.length)
        outputs = np.arange(piece.first, piece.last)
        at = row * self.length + start + piece.context - 1 + outputs - piece.first
        emitted = np.asarray(example.output_token_ids[piece.first : piece.last], np.int64)
        self._predict(at, owner, outputs, np.zeros(len(at), np.int64), emitted)
        self.sampling_rows += [_sampling_row(example, i, ()) for i in range(piece.first, piece.last)]
        self.labels += example.labels[piece.first : piece.last]
        column = start + len(text)
        for number, branch in enumerate(piece.branches):
            size = len(branch.token_ids)
            left = num_prompt + branch.start - begin  # tokens of text before the branch
            self._write(row, column, serial, number + 1, branch.token_ids, first_position=left, limit=start + left)
            depth = np.arange(1, size + 1)
            at = row * self.length + column + depth - 1
            self._predict(at, owner, branch.start + depth, depth, np.full(size, -1, np.int64))
            self.sampling_rows += [
                _sampling_row(example, branch.start, branch.token_ids[:n]) for n in range(1, size + 1)
            ]
            self.labels += branch.labels
            column += size

    def mask(self) -> npt.NDArray[np.bool_]:
        """[rows, 1, length, length], True where the row's token may see the column's."""
        index = np.arange(self.length)
        query = (slice(None), slice(None), None)
        key = (slice(None), None, slice(None))
        is_text = (self._branch[key] == 0) & (index < self._limit[query])
        visible: npt.NDArray[np.bool_] = is_text | (self._branch[query] == self._branch[key])
        visible &= self._piece[query] == self._piece[key]
        visible &= index <= index[:, None]
        visible &= self._piece[query] >= 0
        visible |= index == index[:, None]
        return visible[:, None]

    def _write(
        self, row: int, start: int, serial: int, branch: int, tokens: Sequence[int], *, first_position: int, limit: int
    ) -> None:
        where = (row, slice(start, start + len(tokens)))
        self.tokens[where] = tokens
        self.positions[where] = np.arange(first_position, first_position + len(tokens))
        self._piece[where] = serial
        self._branch[where] = branch
        self._limit[where] = limit

    def _predict(self, at: Ints, owner: int, offset: Ints, depth: Ints, emitted: Ints) -> None:
        self.predict.append(at)
        self.owner.append(np.full(len(at), owner, np.int64))
        self.offset.append(offset)
        self.depth.append(depth)
        self.next_ids.append(emitted)


def _sampling_row(example: Example, num_output: int, drafted: Sequence[int]) -> SamplingRow:
    """How the request draws the token behind its first `num_output` output tokens and `drafted`."""
    if not example.params.has_penalties:
        return SamplingRow(example.params)
    return SamplingRow(example.params, example.prompt_token_ids, (*example.output_token_ids[:num_output], *drafted))


def _branches_at(example: Example) -> dict[int, list[Branch]]:
    """Branches by the output token that they replace. One at output 0 of an example without a prompt has no context."""
    result: dict[int, list[Branch]] = {}
    for branch in example.branches:
        if branch.start < len(example.output_token_ids):
            result.setdefault(branch.start, []).append(branch)
    return result


def _cut(branch: Branch, size: int) -> Branch:
    if len(branch.token_ids) <= size:
        return branch
    return Branch(branch.start, branch.token_ids[:size], branch.labels[:size])


def _joined(parts: Sequence[Ints]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))
