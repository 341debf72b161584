"""Attention over paged KV for a flattened ragged batch, plugged into transformers' own model code.

A step's tokens of all sequences lie in one row [1, tokens]; `Segment` says which of them belong together and where
their context is stored. transformers hands the context through to every layer as the keyword `paged`.

On a CPU in fp32 the native kernel reads keys and values where they lie; elsewhere torch gathers them by segment. Short
passes on a GPU have fixed shapes, and a context and kernel of their own (`block_attention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from redraft.errors import UnsupportedModel
from redraft.kernels.library import MAX_HEAD_DIM, CpuKernels, attention_items, library
from redraft.models.block_attention import BlockContext
from redraft.models.kv_cache import KVCache
from redraft.transfer import upload

ATTENTION_NAME = "redraft_paged"


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence's share of a ragged batch: query tokens [start, start + length) see `context_length` positions,
    the last `length` of which are their own. `block_ids` covers the context."""

    start: int
    length: int
    context_length: int
    block_ids: Sequence[int]


@dataclass
class PagedContext:
    """What the attention of every layer needs to know about one forward pass."""

    cache: KVCache
    block_size: int
    segments: list[Segment]
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    @cached_property
    def slots(self) -> Tensor:
        """Where this batch's own keys and values go, [tokens] int64."""
        size = self.block_size
        slots = [
            segment.block_ids[position // size] * size + position % size
            for segment in self.segments
            for position in range(segment.context_length - segment.length, segment.context_length)
        ]
        return upload(slots, torch.int64, self.cache.device)

    @cached_property
    def contexts(self) -> list[Tensor]:
        """Slots of every segment's whole context, [context_length] int64 each."""
        offsets = torch.arange(self.block_size, device=self.cache.device)
        return [
            (self._table(segment).unsqueeze(1) * self.block_size + offsets).flatten()[: segment.context_length]
            for segment in self.segments
        ]

    @cached_property
    def native_work(self) -> tuple[Tensor, Tensor]:
        """The kernel's work items and its block table [segments, width], both int32."""
        width = max(self._num_blocks(segment) for segment in self.segments)
        table = torch.zeros(len(self.segments), width, dtype=torch.int32)
        for row, segment in zip(table, self.segments, strict=True):
            row[: self._num_blocks(segment)] = self._table(segment)
        return attention_items([(s.start, s.length, s.context_length - s.length) for s in self.segments]), table

    def mask(self, segment: Segment, window: int | None, group: int) -> Tensor | None:
        """Additive mask [group * length, context_length], or None where every key is visible to every query."""
        if window is not None and segment.context_length <= window:
            window = None
        if segment.length == 1 and window is None:
            return None
        key = (segment.length, segment.context_length, window)
        if key not in self._masks:
            device = self.cache.device
            query = torch.arange(segment.context_length - segment.length, segment.context_length, device=device)
            distance = query.unsqueeze(1) - torch.arange(segment.context_length, device=device)
            hidden = distance < 0
            if window is not None:
                hidden |= distance >= window
            mask = torch.zeros(hidden.shape, dtype=self.cache.dtype, device=device)
            self._masks[key] = mask.masked_fill_(hidden, -torch.inf).repeat(group, 1)
        return self._masks[key]

    def _num_blocks(self, segment: Segment) -> int:
        return -(-segment.context_length // self.block_size)

    def _table(self, segment: Segment) -> Tensor:
        return upload(segment.block_ids[: self._num_blocks(segment)], torch.int64, self.cache.device)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged: PagedContext | BlockContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [1, heads, tokens, head_dim], key and value [1, kv_heads, tokens,
    head_dim] -> [1, tokens, heads, head_dim]. Stores the new keys and values, then attends."""
    if paged is None:
        raise RuntimeError("paged attention needs the keyword `paged`; call the model through ModelRunner")
    if kwargs.get("s_aux") is not None:
        raise UnsupportedModel("attention sinks (s_aux) are not supported; choose another target")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    paged.cache.write(layer, paged.slots, key[0], value[0])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(paged, BlockContext):
        return paged.attend(query[0], layer, scale, sliding_window, softcap).unsqueeze(0), None
    kernels = native_attention(query)
    if kernels is None:
        return _torch_attention(query[0], layer, paged, scale, sliding_window, softcap).unsqueeze(0), None
    items, table = paged.native_work
    output = kernels.attention(
        query[0].transpose(0, 1).contiguous(),
        paged.cache.keys[layer],
        paged.cache.values[layer],
        items,
        table,
        block_size=paged.block_size,
        window=sliding_window,
        scale=scale,
        softcap=softcap,
    )
    return output.unsqueeze(0), None


def native_attention(query: Tensor) -> CpuKernels | None:
    """The native kernels, if they can take queries like this one."""
    head_dim = query.shape[-1]
    fits = query.device.type == "cpu" and query.dtype is torch.float32
    return library() if fits and head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM else None


def _torch_attention(
    query: Tensor, layer: int, paged: PagedContext, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Segment by segment over gathered keys: query [heads, tokens, head_dim] -> [tokens, heads, head_dim]."""
    heads, num_tokens, head_dim = query.shape
    output = query.new_empty(num_tokens, heads, head_dim)
    for segment, context in zip(paged.segments, paged.contexts, strict=True):
        keys, values = paged.cache.read(layer, context)
        kv_heads = keys.shape[0]
        group = heads // kv_heads
        rows = slice(segment.start, segment.start + segment.length)
        # queries that share a kv head become rows of one problem, so keys are never repeated
        folded = query[:, rows].reshape(kv_heads, group * segment.length, head_dim)
        mixed = _attend(folded, keys, values, paged.mask(segment, window, group), scale, softcap)
        output[rows] = mixed.reshape(heads, segment.length, head_dim).transpose(0, 1)
    return output


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """[kv_heads, rows, head_dim] attending to [kv_heads, context, head_dim]."""
    if softcap is None:
        out = F.scaled_dot_product_attention(
            query.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), attn_mask=mask, scale=scale
        )
        return out.squeeze(0)
    scores = torch.tanh(query @ keys.transpose(1, 2) * scale / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype) @ values


AttentionInterface.register(ATTENTION_NAME, paged_attention)
