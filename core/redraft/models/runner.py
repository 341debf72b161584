"""One model, its KV cache, and the forward pass over a ragged batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from redraft.models.attention import ATTENTION_NAME, PagedContext, Segment
from redraft.models.kv_cache import KVCache
from redraft.models.packed import pack_linears


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
            CPU, its linear layers are replaced in place.
        num_blocks, block_size: size of the KV cache, shared block ids with every other runner of the engine.
        vocab_size: ids the tokenizer knows; logits of padding ids above it are cut off, so they are never drawn.
            A model with fewer logits than that gets -inf for the rest.
    """

    def __init__(self, model: PreTrainedModel, *, num_blocks: int, block_size: int, vocab_size: int) -> None:
        model.set_attn_implementation(ATTENTION_NAME)
        pack_linears(model)
        self.model = model
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.device = model.device
        self.cache = KVCache(
            model.config.get_text_config(), num_blocks * block_size, dtype=model.dtype, device=self.device
        )

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Store the chunks' keys and values and return the wanted logits, [sum of num_logits, vocab_size] float32,
        in the order of the chunks."""
        token_ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        segments: list[Segment] = []
        slots: list[Tensor] = []
        for chunk in chunks:
            start, length = len(token_ids), len(chunk.token_ids)
            end = chunk.start + length
            context, own = self._context(chunk.block_ids, chunk.start, end)
            segments.append(Segment(start, length, end, context))
            slots.append(own)
            token_ids.extend(chunk.token_ids)
            positions.extend(range(chunk.start, end))
            wanted.extend(range(start + length - chunk.num_logits, start + length))
        paged = PagedContext(self.cache, torch.cat(slots), segments)
        output = self.model(
            input_ids=self._tensor([token_ids]),
            position_ids=self._tensor([positions]),
            use_cache=False,
            logits_to_keep=self._tensor(wanted),
            paged=paged,
        )
        return self._known_ids(output.logits[0].float())

    def _context(self, block_ids: Sequence[int], start: int, end: int) -> tuple[Tensor | slice, Tensor]:
        """Slots of positions 0 .. end - 1 (a slice if consecutive) and of positions start .. end - 1."""
        count = -(-end // self.block_size)
        used = block_ids[:count]
        first = used[0]
        if all(block_id == first + index for index, block_id in enumerate(used)):
            base = first * self.block_size
            own = torch.arange(base + start, base + end, device=self.device)
            return slice(base, base + end), own
        blocks = self._tensor(list(used))
        slots = blocks.unsqueeze(1) * self.block_size + torch.arange(self.block_size, device=self.device)
        slots = slots.flatten()[:end]
        return slots, slots[start:]

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _known_ids(self, logits: Tensor) -> Tensor:
        missing = self.vocab_size - logits.shape[1]
        if missing > 0:
            return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        return logits[:, : self.vocab_size]
