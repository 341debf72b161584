"""Attention over paged KV for a flattened ragged batch, plugged into transformers' own model code.

A step's tokens of all sequences lie in one row [1, tokens]; `Segment` says which of them belong together and where
their context is stored. transformers hands the context through to every layer as the keyword `paged`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from redraft.errors import UnsupportedModel
from redraft.models.kv_cache import KVCache

ATTENTION_NAME = "redraft_paged"


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence's share of a ragged batch: query tokens [start, start + length) see `context_length` positions,
    the last `length` of which are their own."""

    start: int
    length: int
    context_length: int
    context: Tensor | slice  # slots [context_length]


@dataclass(slots=True)
class PagedContext:
    """What the attention of every layer needs to know about one forward pass."""

    cache: KVCache
    slots: Tensor  # [tokens] int64: where this batch's keys and values go
    segments: list[Segment]
    _masks: dict[tuple[int, int, int | None], Tensor | None] = field(default_factory=dict)

    def mask(self, segment: Segment, window: int | None, group: int) -> Tensor | None:
        """Additive mask [group * length, context_length], or None where every key is visible to every query."""
        visible_to_all = window is None or segment.context_length <= window
        if segment.length == 1 and visible_to_all:
            return None
        key = (segment.length, segment.context_length, None if visible_to_all else window)
        if key not in self._masks:
            device = self.slots.device
            query = torch.arange(segment.context_length - segment.length, segment.context_length, device=device)
            distance = query.unsqueeze(1) - torch.arange(segment.context_length, device=device)
            hidden = distance < 0
            if window is not None:
                hidden |= distance >= window
            mask = torch.zeros(hidden.shape, dtype=self.cache.keys.dtype, device=device)
            self._masks[key] = mask.masked_fill_(hidden, -torch.inf).repeat(group, 1)
        return self._masks[key]


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
    paged: PagedContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [1, heads, tokens, head_dim], key and value [1, kv_heads, tokens,
    head_dim] -> [1, tokens, heads, head_dim]. Stores the new keys and values, then attends segment by segment."""
    if paged is None:
        raise RuntimeError("paged attention needs the keyword `paged`; call the model through ModelRunner")
    if kwargs.get("s_aux") is not None:
        raise UnsupportedModel("attention sinks (s_aux) are not supported; choose another target")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    paged.cache.write(layer, paged.slots, key[0], value[0])
    heads, head_dim = query.shape[1], query.shape[3]
    kv_heads = key.shape[1]
    group = heads // kv_heads
    output = query.new_empty(query.shape[2], heads, head_dim)
    for segment in paged.segments:
        keys, values = paged.cache.read(layer, segment.context)
        rows = slice(segment.start, segment.start + segment.length)
        # queries that share a kv head become rows of one problem, so keys are never repeated
        folded = query[0, :, rows].reshape(kv_heads, group * segment.length, head_dim)
        mask = paged.mask(segment, sliding_window, group)
        mixed = _attend(folded, keys, values, mask, scaling, softcap)
        output[rows] = mixed.reshape(heads, segment.length, head_dim).transpose(0, 1)
    return output.unsqueeze(0), None


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """[kv_heads, rows, head_dim] attending to [kv_heads, context, head_dim]."""
    if softcap is None:
        out = F.scaled_dot_product_attention(
            query.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), attn_mask=mask, scale=scaling
        )
        return out.squeeze(0)
    scores = query @ keys.transpose(1, 2) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype) @ values


AttentionInterface.register(ATTENTION_NAME, paged_attention)
