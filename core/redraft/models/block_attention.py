"""Attention over paged KV in fixed shapes, by torch's FlexAttention: no gather, no look at the host.

The cache [kv_heads, slots, head_dim] is one long context that all sequences share; a block mask says which of its
blocks a sequence sees, in whatever order they lie there, and a mask function what of them (Dong et al. 2024, "Flex
Attention", section on paged attention). Query heads that share a kv head become rows of one problem.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from redraft.models.kv_cache import KVCache

_QUERY_BLOCK = 128  # rows that share a list of blocks; the kernels want it at least as large as their own tiles
_MAX_KERNELS = 512  # one is compiled per bucket and window, and torch stops at eight unless told otherwise


@dataclass
class BlockContext:
    """What the attention of every layer needs to know about one pass over [sequences, rows] tokens.

    Attributes:
        slots: where the rows' own keys and values go, [sequences * rows] int64.
        positions: of every row in its sequence, [sequences, rows] int32.
        counts: blocks that hold a sequence's context, [sequences] int32, at least 1.
        table: their ids, [sequences, width] int32; what lies behind the count is of no account.
    """

    cache: KVCache
    block_size: int
    slots: Tensor
    positions: Tensor
    counts: Tensor
    table: Tensor
    _masks: dict[tuple[int, int | None], BlockMask] = field(default_factory=dict)

    def attend(self, query: Tensor, layer: int, scale: float, window: int | None, softcap: float | None) -> Tensor:
        """query [heads, tokens, head_dim] -> [tokens, heads, head_dim]; the rows' own keys are stored already."""
        sequences, rows = self.positions.shape
        keys, values = self.cache.keys[layer].unsqueeze(0), self.cache.values[layer].unsqueeze(0)
        heads, num_tokens, head_dim = query.shape
        kv_heads = keys.shape[1]
        group = heads // kv_heads
        # row g * rows + r of a kv head is token r in the g-th of its query heads
        folded = query.view(kv_heads, group, sequences, rows, head_dim).permute(2, 0, 1, 3, 4)
        output: Tensor = _kernel(query.device.type)(
            folded.reshape(sequences, kv_heads, group * rows, head_dim),
            keys,
            values,
            score_mod=None if softcap is None else _capped(softcap),
            block_mask=self._mask(group, window),
            scale=scale,
        )
        unfolded = output.view(sequences, kv_heads, group, rows, head_dim).permute(0, 3, 1, 2, 4)
        return unfolded.reshape(num_tokens, heads, head_dim)

    @cached_property
    def _place(self) -> Tensor:
        """Which of its blocks a block of the cache is for a sequence, [sequences, blocks of the cache + 1] int32; -1:
        none. The last column takes what lies behind the counts."""
        num_blocks = self.cache.keys.shape[2] // self.block_size
        place = self.table.new_full((len(self.table), num_blocks + 1), -1)
        column = torch.arange(self.table.shape[1], dtype=torch.int32, device=self.table.device).expand_as(self.table)
        is_own = column < self.counts.unsqueeze(1)
        return place.scatter_(1, torch.where(is_own, self.table, num_blocks).long(), torch.where(is_own, column, -1))

    def _mask(self, group: int, window: int | None) -> BlockMask:
        if (group, window) not in self._masks:
            sequences, rows = self.positions.shape
            place, positions, size = self._place, self.positions, self.block_size

            def sees(b: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
                block = place[b, slot // size]
                distance = positions[b, row % rows] - (block * size + slot % size)
                visible = (block >= 0) & (distance >= 0)
                return visible if window is None else visible & (distance < window)

            num_rows = group * rows
            self._masks[group, window] = BlockMask.from_kv_blocks(
                self.counts.view(sequences, 1, 1),
                self.table.view(sequences, 1, 1, -1),
                BLOCK_SIZE=(max(_QUERY_BLOCK, 1 << (num_rows - 1).bit_length()), size),
                mask_mod=sees,
                seq_lengths=(num_rows, self.cache.keys.shape[2]),
                compute_q_blocks=False,  # for gradients
            )
        return self._masks[group, window]


def _capped(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, b: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    return cap


@functools.cache
def _kernel(device: str) -> Callable[..., Any]:
    """FlexAttention, compiled on a GPU: once per bucket, when its graph is captured."""
    if device != "cuda":
        return flex_attention
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_KERNELS)
    return torch.compile(flex_attention, dynamic=False)
