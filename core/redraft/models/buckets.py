"""Short passes on a GPU: padded to one of a few fixed shapes, each captured once as a CUDA graph and replayed.

A pass over a few tokens is hundreds of kernels that run for microseconds each; launched one by one from Python it takes
longer than the memory needs for the weights. A graph launches them all at once, but of fixed shapes and addresses. So a
batch of up to `max_sequences` sequences with up to `max_rows` tokens each is padded to the next power of two in either
direction, its description is copied into the shape's own buffer, and the graph is replayed.

Nothing here but the capture needs a GPU: elsewhere the same pass is run as it is, which is how it is tested.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from redraft.models.block_attention import BlockContext
from redraft.models.kv_cache import KVCache
from redraft.transfer import upload

if TYPE_CHECKING:
    from redraft.models.runner import Chunk

_WARM_UPS = 2  # passes before a capture: the first compiles kernels


@dataclass(frozen=True, slots=True)
class BucketLimits:
    """The largest batch that is padded to a bucket; a larger one is run as it is."""

    max_sequences: int
    max_rows: int  # tokens of a sequence: one, and what may be drafted


@dataclass(frozen=True, slots=True)
class Bucket:
    """So many sequences with so many tokens each."""

    sequences: int
    rows: int

    @property
    def num_tokens(self) -> int:
        return self.sequences * self.rows


@dataclass(slots=True)
class _Pass:
    """A bucket's buffer, and what computes its logits [tokens, outputs] from it."""

    inputs: Tensor  # int32, see `BucketedForward._described`
    logits: Tensor | None = None  # of the graph
    graph: torch.cuda.CUDAGraph | None = field(default=None, repr=False)


class BucketedForward:
    """Runs short chunks through a transformers model whose attention is redraft's, in fixed shapes.

    Args:
        model: on the device; its attention is `ATTENTION_NAME`.
        cache: its KV, one block longer than the pool: rows that are only padding write there.
        num_blocks, block_size: of the pool.
    """

    def __init__(
        self, model: PreTrainedModel, cache: KVCache, num_blocks: int, block_size: int, limits: BucketLimits
    ) -> None:
        self._model = model
        self._cache = cache
        self._block_size = block_size
        self._scratch_block = num_blocks
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", num_blocks * block_size)
        self._table_width = min(num_blocks, -(-positions // block_size))
        self._limits = limits
        self._passes: dict[Bucket, _Pass] = {}
        self._pool: Any = None  # of memory, which all graphs share: no two of them run at once

    def buckets(self) -> Iterator[Bucket]:
        """All of them, the smallest first."""
        for sequences in _powers(self._limits.max_sequences):
            for rows in _powers(self._limits.max_rows):
                yield Bucket(sequences, rows)

    def bucket_of(self, chunks: Sequence[Chunk]) -> Bucket | None:
        """The bucket that these chunks are padded to; None if they are too many, or one of them too long."""
        rows = max(len(chunk.token_ids) for chunk in chunks)
        blocks = max(-(-chunk.end // self._block_size) for chunk in chunks)
        limits = self._limits
        if len(chunks) > limits.max_sequences or rows > limits.max_rows or blocks > self._table_width:
            return None
        return Bucket(_power_above(len(chunks)), _power_above(rows))

    def forward(self, chunks: Sequence[Chunk], bucket: Bucket, drawn: Tensor | None = None) -> Tensor:
        """As `ModelRunner.forward`, with a column for every output of the head, in the model's dtype."""
        prepared = self._prepared(bucket)
        prepared.inputs.copy_(_pinned(self._described(chunks, bucket), self._cache.device), non_blocking=True)
        if drawn is not None:
            tokens = prepared.inputs[: bucket.num_tokens]
            tokens.copy_(resolved(tokens, drawn))
        if prepared.graph is None:
            logits = self._run(bucket, prepared.inputs)
        else:
            prepared.graph.replay()
            assert prepared.logits is not None
            logits = prepared.logits
        # a copy, since the next replay overwrites the graph's own
        return logits.index_select(0, upload(_wanted(chunks, bucket), torch.int64, logits.device))

    def capture(self, bucket: Bucket) -> None:
        """Capture the bucket's graph now, if there is a GPU, rather than when it is first needed."""
        self._prepared(bucket)

    def _prepared(self, bucket: Bucket) -> _Pass:
        found = self._passes.get(bucket)
        if found is None:
            size = 3 * bucket.num_tokens + bucket.sequences * (1 + self._table_width)
            found = _Pass(torch.zeros(size, dtype=torch.int32, device=self._cache.device))
            if self._cache.device.type == "cuda":
                found.inputs.copy_(_pinned(self._described([], bucket), self._cache.device))
                self._capture(bucket, found)
            self._passes[bucket] = found
        return found

    def _capture(self, bucket: Bucket, into: _Pass) -> None:
        """Follows torch's rules: warm up on another stream, then capture with the shared pool of memory."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._run(bucket, into.inputs)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads may use the device meanwhile: one that loads a draft, for example
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            into.logits = self._run(bucket, into.inputs)
        into.graph = graph

    def _run(self, bucket: Bucket, inputs: Tensor) -> Tensor:
        """[tokens, outputs] logits of every row, padding included."""
        size, sequences = bucket.num_tokens, bucket.sequences
        sizes = [size, size, size, sequences, sequences * self._table_width]
        tokens, positions, slots, counts, table = torch.split(inputs, sizes)
        context = BlockContext(
            cache=self._cache,
            block_size=self._block_size,
            slots=slots.long(),
            positions=positions.view(sequences, bucket.rows),
            counts=counts,
            table=table.view(sequences, self._table_width),
        )
        output = self._model(
            input_ids=tokens.long().unsqueeze(0),
            position_ids=positions.long().unsqueeze(0),
            use_cache=False,
            paged=context,
        )
        logits: Tensor = output.logits[0]
        return logits

    def _described(self, chunks: Sequence[Chunk], bucket: Bucket) -> array[int]:
        """The bucket's inputs: token, position and slot of every row, then every sequence's number of blocks, then the
        block tables. Padding writes to the scratch block and sees what it likes; nobody reads it."""
        tokens, positions, slots, counts, table = (array("i") for _ in range(5))
        size, scratch = self._block_size, self._scratch_block
        for chunk in chunks:
            end, blocks = chunk.end, chunk.blocks(size)
            missing = bucket.rows - len(chunk.token_ids)
            tokens.extend([*chunk.token_ids, *([0] * missing)])
            positions.extend([*range(chunk.start, end), *([end - 1] * missing)])
            slots.extend(blocks[at // size] * size + at % size for at in range(chunk.start, end))
            slots.extend([scratch * size] * missing)
            counts.append(len(blocks))
            table.extend([*blocks, *([scratch] * (self._table_width - len(blocks)))])
        absent = bucket.sequences - len(chunks)
        nothing = array("i", [0]) * (absent * bucket.rows)
        counts.extend([1] * absent)
        table.extend([scratch] * (absent * self._table_width))
        slots.extend([scratch * size] * len(nothing))
        return tokens + nothing + positions + nothing + slots + counts + table


def resolved(tokens: Tensor, drawn: Tensor) -> Tensor:
    """Token ids of which those below 0 are not known to the host: -1 - i stands for drawn[i], [any] int64."""
    return torch.where(tokens < 0, drawn[(-1 - tokens).clamp(min=0).long()], tokens)


def _wanted(chunks: Sequence[Chunk], bucket: Bucket) -> list[int]:
    """The rows whose logits are wanted, in the order of the chunks."""
    ends = ((at * bucket.rows + len(chunk.token_ids), chunk.num_logits) for at, chunk in enumerate(chunks))
    return [row for end, count in ends for row in range(end - count, end)]


def _pinned(numbers: array[int], device: torch.device) -> Tensor:
    values = torch.frombuffer(numbers, dtype=torch.int32)
    return values.pin_memory() if device.type == "cuda" else values


def _power_above(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def _powers(limit: int) -> list[int]:
    return [1 << exponent for exponent in range((limit - 1).bit_length() + 1)]
