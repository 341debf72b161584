"""One model, its KV cache, and the forward pass over a ragged batch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from redraft.models.attention import ATTENTION_NAME, PagedContext, Segment
from redraft.models.buckets import Bucket, BucketedForward, BucketLimits, resolved
from redraft.models.heads import reduce_head
from redraft.models.kv_cache import KVCache, kv_shape
from redraft.models.native_decoder import NativeDecoder, native_decoder
from redraft.models.packed import pack_linears
from redraft.models.parallel import local_kv_heads, num_shards
from redraft.models.rotary import has_fixed_angles
from redraft.transfer import upload

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence to run through a model.

    Attributes:
        token_ids: the tokens, at positions start, start + 1, ... One below 0 is not known to the host: -1 - i stands
            for entry i of the tensor that `forward` is given with the chunks.
        start: position of the first; keys and values of 0 .. start - 1 are already stored.
        block_ids: the sequence's block table, long enough for start + len(token_ids) positions.
        num_logits: for how many of the last tokens logits are wanted.
    """

    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]
    num_logits: int = 1

    @property
    def end(self) -> int:
        """Positions that are stored when it has run."""
        return self.start + len(self.token_ids)

    def blocks(self, block_size: int) -> Sequence[int]:
        """Those that hold the positions up to its end. Raises IndexError if the table has too few."""
        blocks = self.block_ids[: -(-self.end // block_size)]
        if len(blocks) * block_size < self.end:
            raise IndexError(f"a block table of {len(blocks)} is too short for {self.end} positions")
        return blocks


class ModelRunner:
    """Runs chunks of many sequences in one forward pass.

    Args:
        model: a decoder-only transformers model, in eval mode. The runner owns it from now on: its attention and, on a
            CPU, its linear layers are replaced in place. Of a tensor-parallel one (`parallel`), this process's shard.
        num_blocks, block_size: size of the KV cache, shared block ids with every other runner of the engine.
        vocab_size: ids the tokenizer knows; logits of padding ids above it are cut off, so they are never drawn.
            A model with fewer logits than that gets -inf for the rest.
        output_ids: [width] int64, distinct ids below vocab_size: the head computes only these (it is cut to them unless
            it has just as many rows already), every other id gets -inf. None: the whole vocabulary.
        buckets: pad batches within these limits to fixed shapes, each a CUDA graph; None: never.

    `runs_ahead` says that a pass has only been enqueued when `forward` returns, so that whoever can should hand it the
    next one before looking at the result.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        output_ids: Tensor | None = None,
        buckets: BucketLimits | None = None,
    ) -> None:
        model.set_attn_implementation(ATTENTION_NAME)
        if output_ids is not None:
            reduce_head(model, output_ids)
            output_ids = output_ids.to(model.device)
        self.output_ids = output_ids
        if num_shards(model) == 1:  # the plan's hooks are on the linears themselves
            pack_linears(model)
        self.model = model
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.device = model.device
        self.runs_ahead = self.device.type == "cuda"
        config = model.config.get_text_config()
        kv_heads = local_kv_heads(model, kv_shape(config)[0])
        num_slots = (num_blocks + (buckets is not None)) * block_size  # the last block takes what padding writes
        self.cache = KVCache(config, num_slots, dtype=model.dtype, device=self.device, kv_heads=kv_heads)
        self._buckets: BucketedForward | None = None
        self._native: NativeDecoder | None = None
        if buckets is None:
            self._native = native_decoder(model, self.cache, block_size, vocab_size, output_ids)
        elif has_fixed_angles(model):  # the others wait for the device, which cannot be captured
            self._buckets = BucketedForward(model, self.cache, num_blocks, block_size, buckets)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], drawn: Tensor | None = None) -> Tensor:
        """Store the chunks' keys and values and return the wanted logits, [sum of num_logits, vocab_size] float32,
        in the order of the chunks.

        `drawn` [any] int64, on this device: tokens that chunks refer to by numbers below 0.
        """
        if self._native is not None:
            assert drawn is None, "the native kernels take what the host knows"
            return self._native.forward(chunks)
        bucket = None if self._buckets is None else self._buckets.bucket_of(chunks)
        if self._buckets is None or bucket is None:
            return self._known_ids(self._transformers_forward(chunks, drawn))
        return self._known_ids(self._buckets.forward(chunks, bucket, drawn).float())

    def captures(self) -> list[Callable[[], None]]:
        """What there is to capture before the first pass of each shape, in pieces of a few tenths of a second. Each is
        to be called where no pass is under way."""
        if self._buckets is None or self.device.type != "cuda":
            return []
        return [functools.partial(self._capture, bucket) for bucket in self._buckets.buckets()]

    @torch.inference_mode()
    def _capture(self, bucket: Bucket) -> None:
        """Capture it, or give up buckets altogether: passes are slower without, and no less right."""
        if self._buckets is None:
            return
        try:
            self._buckets.capture(bucket)
        except Exception:  # a compiler's, the device's, or that of an operation that must not be captured
            logger.exception("a pass cannot be captured as a CUDA graph: this model runs without, and slower")
            self._buckets = None

    def _transformers_forward(self, chunks: Sequence[Chunk], drawn: Tensor | None = None) -> Tensor:
        """As `forward`, with a column for every output of the head."""
        token_ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        segments: list[Segment] = []
        for chunk in chunks:
            start, length = len(token_ids), len(chunk.token_ids)
            segments.append(Segment(start, length, chunk.start + length, chunk.block_ids))
            token_ids.extend(chunk.token_ids)
            positions.extend(range(chunk.start, chunk.start + length))
            wanted.extend(range(start + length - chunk.num_logits, start + length))
        input_ids = self._tensor(token_ids)
        output = self.model(
            input_ids=(input_ids if drawn is None else resolved(input_ids, drawn)).unsqueeze(0),
            position_ids=self._tensor(positions).unsqueeze(0),
            use_cache=False,
            logits_to_keep=self._tensor(wanted),
            paged=PagedContext(self.cache, self.block_size, segments),
        )
        logits: Tensor = output.logits[0].float()
        return logits

    def _tensor(self, values: list[int]) -> Tensor:
        return upload(values, torch.int64, self.device)

    def _known_ids(self, logits: Tensor) -> Tensor:
        if self.output_ids is not None:
            full = logits.new_full((logits.shape[0], self.vocab_size), -torch.inf)
            return full.index_copy_(1, self.output_ids, logits)
        missing = self.vocab_size - logits.shape[1]
        if missing > 0:
            return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        return logits[:, : self.vocab_size]
