"""Key and value storage of one model, reserved up front and addressed by slot.

Slot = block id * block_size + offset. The layout [kv_heads, slots, head_dim] per layer makes the context of a sequence
a gather along one dimension, and lets a kernel read each head's context as short runs of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig


class KVCache:
    """One model's keys and values: `keys[layer]`, `values[layer]` are [kv_heads, num_slots, head_dim].

    `kv_heads` are those that this process computes (None: all of the model's).
    """

    def __init__(
        self,
        config: PretrainedConfig,
        num_slots: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        kv_heads: int | None = None,
    ) -> None:
        all_heads, head_dim = kv_shape(config)
        heads = all_heads if kv_heads is None else kv_heads
        shape = (config.num_hidden_layers, heads, num_slots, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys, values [kv_heads, tokens, head_dim] at slots [tokens]."""
        self.keys[layer].index_copy_(1, slots, keys)
        self.values[layer].index_copy_(1, slots, values)

    def read(self, layer: int, context: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values at slots [context]: [kv_heads, context, head_dim] each."""
        return self.keys[layer].index_select(1, context), self.values[layer].index_select(1, context)


def kv_shape(config: PretrainedConfig) -> tuple[int, int]:
    """(kv heads, head dim) of a decoder's configuration."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, head_dim


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    heads, head_dim = kv_shape(config)
    return int(2 * config.num_hidden_layers * heads * head_dim * torch.empty((), dtype=dtype).element_size())
