"""The compiled kernels of the C files beside this, called on tensors. `library()` is None where they were not built or
cannot run."""

from __future__ import annotations

import ctypes
from array import array
from ctypes import byref, c_float, c_int, c_long, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from redraft.kernels.decoder import Decoder

LIBRARY_FILE = Path(__file__).with_name("_cpu.so")
PANEL = 16
_ALIGNMENT = 64  # bytes
MAX_HEAD_DIM = 256
_QUERIES_PER_ITEM = 8
_OUT_OF_RANGE = -2


class CpuKernels:
    """Typed calls into the shared library. All tensors are contiguous fp32 on the CPU unless stated otherwise."""

    def __init__(self, path: Path) -> None:
        self._lib = ctypes.CDLL(str(path))
        linear = (*(c_void_p,) * 4, *(c_long,) * 3)
        linear_int8 = (*(c_void_p,) * 5, *(c_long,) * 3)
        attention = (*(c_void_p,) * 5, c_long, c_void_p, *(c_long,) * 7, c_float, c_float)
        self._lib.redraft_linear.argtypes = linear
        self._lib.redraft_linear_int8.argtypes = linear_int8
        self._lib.redraft_attention.argtypes = attention
        self._lib.redraft_decode.argtypes = (*(c_void_p,) * 3, c_long, *(c_void_p,) * 3)
        self._lib.redraft_start_pool.argtypes = (c_int,)
        self.is_supported = bool(self._lib.redraft_supported())

    def start_pool(self, num_threads: int) -> int:
        """Let the kernels use that many threads, the caller included; a pool only ever grows."""
        return int(self._lib.redraft_start_pool(num_threads))

    def pack(self, weight: Tensor) -> Tensor:
        """[n, k] fp32 or int8 -> panels [ceil(n / 16), k, 16], 64-byte aligned, the last one filled up with zeros."""
        n, k = weight.shape
        panels = -(-n // PANEL)
        storage = torch.empty(panels * PANEL * k + _ALIGNMENT, dtype=weight.dtype)
        offset = -storage.data_ptr() % _ALIGNMENT // weight.element_size()
        packed = storage[offset : offset + panels * PANEL * k].view(panels, k, PANEL)
        packed.zero_()
        whole = n // PANEL
        packed[:whole] = weight[: whole * PANEL].view(whole, PANEL, k).transpose(1, 2)
        if whole < panels:
            packed[whole, :, : n - whole * PANEL] = weight[whole * PANEL :].t()
        return packed

    def linear(self, x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
        """x [.., k] times a packed weight -> [.., out_features]. `bias` has a multiple of 16 entries, or is None."""
        panels, k, _ = packed.shape
        rows = x.reshape(-1, k).contiguous()
        y = torch.empty(rows.shape[0], panels * PANEL)
        status = self._lib.redraft_linear(
            rows.data_ptr(),
            packed.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            rows.shape[0],
            k,
            panels * PANEL,
        )
        _check(status)
        return y[:, :out_features].reshape(*x.shape[:-1], out_features)

    def linear_int8(self, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
        """x [.., k] times an int8 packed weight, times `scale` per output -> [.., out_features].

        `scale` and `bias` (or None) have a multiple of 16 entries.
        """
        panels, k, _ = packed.shape
        rows = x.reshape(-1, k).contiguous()
        y = torch.empty(rows.shape[0], panels * PANEL)
        status = self._lib.redraft_linear_int8(
            rows.data_ptr(),
            packed.data_ptr(),
            scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            rows.shape[0],
            k,
            panels * PANEL,
        )
        _check(status)
        return y[:, :out_features].reshape(*x.shape[:-1], out_features)

    def attention(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        items: Tensor,
        blocks: Tensor,
        *,
        block_size: int,
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Causal attention of ragged queries over paged keys and values.

        Args:
            query: [tokens, heads, head_dim].
            keys, values: one layer's cache, [kv_heads, num_slots, head_dim].
            items: from `attention_items`, [items, 4] int32.
            blocks: block table per segment, [segments, width] int32.

        Returns:
            [tokens, heads, head_dim].
        """
        output = torch.empty_like(query)
        status = self._lib.redraft_attention(
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            output.data_ptr(),
            items.data_ptr(),
            items.shape[0],
            blocks.data_ptr(),
            blocks.shape[1],
            query.shape[1],
            keys.shape[0],
            keys.shape[2],
            keys.shape[1],
            block_size,
            window or 0,
            scale,
            softcap or 0.0,
        )
        _check(status)
        return output

    def decode(
        self,
        model: Decoder,
        token_ids: array[int],
        chunks: array[int],
        blocks: array[int],
        logits: Tensor,
    ) -> tuple[int, int]:
        """Run chunks of sequences through a whole model.

        Args:
            token_ids: int32, the chunks' tokens one after another.
            chunks: int32, four per chunk: tokens, position of the first, logits wanted (of its last tokens), where its
                block table starts in `blocks`.
            blocks: int32 block tables, each long enough for its chunk.
            logits: written, [wanted, model.logits_width].

        Returns:
            Nanoseconds in linear layers and in attention.
        """
        spent = (c_long * 2)()
        status = self._lib.redraft_decode(
            byref(model),
            token_ids.buffer_info()[0],
            chunks.buffer_info()[0],
            len(chunks) // 4,
            blocks.buffer_info()[0],
            logits.data_ptr(),
            byref(spent),
        )
        if status == _OUT_OF_RANGE:
            raise IndexError("a token id or block id is out of range")
        _check(status)
        return spent[0], spent[1]


def attention_items(segments: list[tuple[int, int, int]]) -> Tensor:
    """Cut segments (first token, length, position of the first) into work items for the pool, [items, 4] int32."""
    rows = [
        (first + done, min(_QUERIES_PER_ITEM, length - done), start + done, index)
        for index, (first, length, start) in enumerate(segments)
        for done in range(0, length, _QUERIES_PER_ITEM)
    ]
    return torch.tensor(rows, dtype=torch.int32)


@cache
def library() -> CpuKernels | None:
    """The kernels, with a pool as large as torch's own; None if they are not there or the CPU lacks AVX2."""
    if not LIBRARY_FILE.exists():
        return None
    try:
        kernels = CpuKernels(LIBRARY_FILE)
    except OSError:
        return None  # built for another system
    if not kernels.is_supported:
        return None
    kernels.start_pool(torch.get_num_threads())
    return kernels


def _check(status: int) -> None:
    if status != 0:
        raise MemoryError("a CPU kernel could not allocate its working memory")
