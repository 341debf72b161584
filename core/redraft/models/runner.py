"""One model, its KV cache, and the forward pass over a ragged batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from redraft.models.attention import ATTENTION_NAME, PagedContext, Segment
from redraft.models.heads import reduce_head
from redraft.models.kv_cache import KVCache, kv_shape
from redraft.models.native_decoder import native_decoder
from redraft.models.packed import pack_linears
from redraft.models.parallel import local_kv_heads, num_shards


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence to run through a model.

    Attributes:
        token_ids: the tokens, at positions start, start + 1, ...
        start: position of the first; keys and values of 0 .. start - 1 are already stored.
        block_ids: the sequence's block table, long enough for start + len(token_ids) positions.
        num_logits: for how many of the last tokens logits are wanted.
    """

    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]
    num_logits: int = 1


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
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        output_ids: Tensor | None = None,
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
        config = model.config.get_text_config()
        kv_heads = local_kv_heads(model, kv_shape(config)[0])
        self.cache = KVCache(config, num_blocks * block_size, dtype=model.dtype, device=self.device, kv_heads=kv_heads)
        self._native = native_decoder(model, self.cache, block_size, vocab_size, output_ids)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Store the chunks' keys and values and return the wanted logits, [sum of num_logits, vocab_size] float32,
        in the order of the chunks."""
        if self._native is not None:
            return self._native.forward(chunks)
        return self._known_ids(self._transformers_forward(chunks))

    def _transformers_forward(self, chunks: Sequence[Chunk]) -> Tensor:
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
        output = self.model(
            input_ids=self._tensor([token_ids]),
            position_ids=self._tensor([positions]),
            use_cache=False,
            logits_to_keep=self._tensor(wanted),
            paged=PagedContext(self.cache, self.block_size, segments),
        )
        logits: Tensor = output.logits[0].float()
        return logits

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _known_ids(self, logits: Tensor) -> Tensor:
        if self.output_ids is not None:
            full = logits.new_full((logits.shape[0], self.vocab_size), -torch.inf)
            return full.index_copy_(1, self.output_ids, logits)
        missing = self.vocab_size - logits.shape[1]
        if missing > 0:
            return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        return logits[:, : self.vocab_size]
