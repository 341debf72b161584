"""The structures that `decoder.c` and `linear.h` read, field by field; all fields are 8 bytes wide."""

from __future__ import annotations

from ctypes import Structure, c_double, c_long, c_void_p
from enum import IntEnum


class LinearKind(IntEnum):
    """How a linear layer's weights are stored; the layouts are in `linear.c`."""

    FP32 = 0
    INT8 = 1
    INT4 = 2
    INT8_GROUPS = 3


class LinearLayer(Structure):
    """`linear_layer` of `linear.h`; holds addresses only, so the tensors must outlive it."""

    _fields_ = (
        ("kind", c_long),
        ("panels", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("k", c_long),
        ("n", c_long),
    )


class DecoderLayer(Structure):
    """One layer of a decoder."""

    _fields_ = (
        ("qkv", LinearLayer),
        ("output", LinearLayer),
        ("gate_up", LinearLayer),
        ("down", LinearLayer),
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
    )


class Decoder(Structure):
    """A whole model, with its cache."""

    _fields_ = (
        ("layers", c_void_p),
        ("head", LinearLayer),
        *((name, c_void_p) for name in ("embedding", "final_norm", "rotary", "keys", "values", "output_ids")),
        *((name, c_long) for name in ("num_outputs", "logits_width")),
        *((name, c_long) for name in ("num_layers", "vocab_size", "hidden", "heads", "kv_heads", "head_dim")),
        *((name, c_long) for name in ("num_slots", "block_size")),
        ("epsilon", c_double),
        ("scale", c_double),
    )
