"""The compiled kernels of the C files beside this, called on tensors. `library()` is None where they were not built or
cannot run."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import POINTER, byref, c_float, c_int, c_long, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from redraft.kernels.decoder import Decoder, LinearKind, LinearLayer
from redraft.kernels.memory import aligned_empty

LIBRARY_FILE = Path(__file__).with_name("_cpu.so")
PANEL = 8  # outputs that are packed together
PAIR = 2 * PANEL  # the kernels take panels two by two
GROUP = 32  # inputs that are rounded together
MAX_HEAD_DIM = 256
_QUERIES_PER_ITEM = 8
_OUT_OF_RANGE = -2


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A linear layer as the kernels read it.

    Attributes:
        panels: the weight, packed for `kind`, 64-byte aligned; outputs filled up to a multiple of 16 with zeros.
        scale: float32 per output, filled up likewise; for `LinearKind.INT8` only.
        bias: float32 per output, filled up likewise, or None.
    """

    kind: LinearKind
    panels: Tensor
    in_features: int
    out_features: int
    scale: Tensor | None = None
    bias: Tensor | None = None

    def layer(self) -> LinearLayer:
        """The address form, valid while these tensors live."""
        scale, bias = (None if each is None else each.data_ptr() for each in (self.scale, self.bias))
        filled = -(-self.out_features // PAIR) * PAIR
        return LinearLayer(self.kind, self.panels.data_ptr(), scale, bias, self.in_features, filled)


class CpuKernels:
    """Typed calls into the shared library. All tensors are contiguous fp32 on the CPU unless stated otherwise."""

    def __init__(self, path: Path) -> None:
        self._lib = ctypes.CDLL(str(path))
        attention = (*(c_void_p,) * 5, c_long, c_void_p, *(c_long,) * 7, c_float, c_float)
        self._lib.redraft_linear.argtypes = (POINTER(LinearLayer), c_void_p, c_void_p, c_long)
        self._lib.redraft_attention.argtypes = attention
        self._lib.redraft_decode.argtypes = (*(c_void_p,) * 3, c_long, *(c_void_p,) * 3)
        self._lib.redraft_start_pool.argtypes = (c_int,)
        self._lib.redraft_summarise.argtypes = (c_void_p, *(c_long,) * 3, *(c_void_p,) * 5)
        self._lib.redraft_probabilities.argtypes = (c_void_p, *(c_long,) * 2, *(c_void_p,) * 5)
        self._lib.redraft_peaks.argtypes = (c_void_p, *(c_long,) * 2, *(c_void_p,) * 3)
        for name in ("race", "draw"):
            getattr(self._lib, f"redraft_{name}").argtypes = (c_void_p, *(c_long,) * 2, *(c_void_p,) * 2)
        for name in ("row_bits", "uniforms"):
            getattr(self._lib, f"redraft_{name}").argtypes = (*(c_void_p,) * 2, *(c_long,) * 2, c_void_p)
        self._lib.redraft_recover.argtypes = (*(c_void_p,) * 5, *(c_long,) * 2, *(c_void_p,) * 2)
        self._lib.redraft_overlaps.argtypes = (*(c_void_p,) * 4, *(c_long,) * 2, c_void_p)
        self.is_supported = bool(self._lib.redraft_supported())
        self.use_wide(True)

    def use_wide(self, wanted: bool) -> bool:
        """Compute linear layers with AVX-512, which gives bitwise the same; whether it is used: not every CPU can."""
        return bool(self._lib.redraft_use_wide(wanted))

    def start_pool(self, num_threads: int) -> int:
        """Let the kernels use that many threads, the caller included; a pool only ever grows."""
        return int(self._lib.redraft_start_pool(num_threads))

    def linear(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """x [.., in_features] times a packed weight -> [.., out_features]."""
        layer = weight.layer()
        rows = x.reshape(-1, weight.in_features).contiguous()
        y = torch.empty(rows.shape[0], layer.n)
        _check(self._lib.redraft_linear(byref(layer), rows.data_ptr(), y.data_ptr(), rows.shape[0]))
        return y[:, : weight.out_features].reshape(*x.shape[:-1], weight.out_features)

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

    def summarise(
        self, logits: Tensor, num_top: int, temperatures: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is kept of rows of logits [rows, vocab_size].

        Args:
            num_top: at most vocab_size.
            temperatures: per row; 0 counts as 1.

        Returns:
            Ids int32 and values [rows, num_top] of the largest logits, best first, of equal ones the smaller id first;
            logsumexp of the logits and of logits / temperature, [rows].
        """
        rows, n = logits.shape
        ids, values = torch.empty(rows, num_top, dtype=torch.int32), torch.empty(rows, num_top)
        totals, tempered = torch.empty(2, rows)
        given = array("f", temperatures)
        status = self._lib.redraft_summarise(
            logits.data_ptr(),
            rows,
            n,
            num_top,
            given.buffer_info()[0],
            *(result.data_ptr() for result in (ids, values, totals, tempered)),
        )
        _check(status)
        return ids, values, totals, tempered

    def probabilities(
        self,
        scores: Tensor,
        temperatures: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
        min_p: Sequence[float],
    ) -> Tensor:
        """softmax(scores / temperature), cut by top-k (0: not), top-p (1: not) and min-p (0: not).

        Args:
            scores: [rows, vocab_size]; a row whose largest is not finite gives NaN throughout.
        """
        probs = torch.empty_like(scores)
        parameters = (array("f", temperatures), array("i", top_k), array("d", top_p), array("f", min_p))
        status = self._lib.redraft_probabilities(
            scores.data_ptr(), *scores.shape, *(each.buffer_info()[0] for each in parameters), probs.data_ptr()
        )
        _check(status)
        return probs

    def race(self, probs: Tensor, bits: Tensor) -> Tensor:
        """The winner of each row's exponential race, with 64 random bits a row: [rows, vocab_size], [rows] int64 ->
        [rows] int64."""
        winners = torch.empty(probs.shape[0], dtype=torch.int64)
        self._lib.redraft_race(probs.data_ptr(), *probs.shape, bits.data_ptr(), winners.data_ptr())
        return winners

    def row_bits(self, keys: Tensor, positions: Tensor, purpose: int) -> Tensor:
        """64 random bits a row: keys and positions [rows] int64 -> [rows] int64."""
        bits = torch.empty_like(keys)
        self._lib.redraft_row_bits(keys.data_ptr(), positions.data_ptr(), len(keys), purpose, bits.data_ptr())
        return bits

    def uniforms(self, keys: Tensor, positions: Tensor, purpose: int) -> Tensor:
        """A number in (0, 1) a row: keys and positions [rows] int64 -> [rows] float64."""
        numbers = torch.empty(len(keys), dtype=torch.float64)
        self._lib.redraft_uniforms(keys.data_ptr(), positions.data_ptr(), len(keys), purpose, numbers.data_ptr())
        return numbers

    def draw(self, weights: Tensor, uniforms: Tensor) -> Tensor:
        """The id at which each row's cumulative sum passes uniform * total, never one of weight 0 unless all are.

        Args:
            weights: [rows, vocab_size].
            uniforms: [rows] float64.

        Returns:
            [rows] int64.
        """
        ids = torch.empty(weights.shape[0], dtype=torch.int64)
        self._lib.redraft_draw(weights.data_ptr(), *weights.shape, uniforms.data_ptr(), ids.data_ptr())
        return ids

    def recover(
        self, p: Tensor, p_rows: Tensor, q: Tensor, q_rows: Tensor, drafted: Tensor, uniforms: Tensor
    ) -> Tensor:
        """A token per sequence, [sequences] int64: what speculative sampling emits behind the accepted ones.

        Args:
            p, q: [rows, vocab_size].
            p_rows: [sequences] int64, the row of p that each one draws at.
            q_rows: likewise of q, for the drafted token that was rejected there: then from max(p - q, 0). -1: that
                token was certain; -2: none was rejected.
            drafted: [sequences] int64, the rejected tokens; read for -1.
            uniforms: [sequences] float64.
        """
        ids = torch.empty_like(p_rows)
        addresses = [each.data_ptr() for each in (p, p_rows, q, q_rows, drafted)]
        status = self._lib.redraft_recover(*addresses, len(ids), p.shape[1], uniforms.data_ptr(), ids.data_ptr())
        _check(status)
        return ids

    def peaks(self, scores: Tensor) -> tuple[list[float], list[int]]:
        """The largest of each row [rows, vocab_size] and its first id; NaN and 0 where one is NaN."""
        ids, values = _host_numbers(scores.shape[0], "q", "f")
        self._lib.redraft_peaks(scores.data_ptr(), *scores.shape, ids.buffer_info()[0], values.buffer_info()[0], None)
        return values.tolist(), ids.tolist()

    def sure_peaks(self, scores: Tensor) -> tuple[list[float], list[int]]:
        """softmax's largest of each row [rows, vocab_size] and its first id."""
        ids, values, shares = _host_numbers(scores.shape[0], "q", "f", "f")
        addresses = [each.buffer_info()[0] for each in (ids, values, shares)]
        self._lib.redraft_peaks(scores.data_ptr(), *scores.shape, *addresses)
        return shares.tolist(), ids.tolist()

    def overlaps(self, p: Tensor, p_rows: Tensor, q: Tensor, q_rows: Tensor) -> Tensor:
        """sum_v min(p_v, q_v) of pairs of rows of p and q [rows, vocab_size]; the rows' indices are int64 [pairs]."""
        result = torch.empty(len(p_rows))
        self._lib.redraft_overlaps(
            p.data_ptr(), p_rows.data_ptr(), q.data_ptr(), q_rows.data_ptr(), len(p_rows), p.shape[1], result.data_ptr()
        )
        return result


def attention_items(segments: list[tuple[int, int, int]]) -> Tensor:
    """Cut segments (first token, length, position of the first) into work items for the pool, [items, 4] int32."""
    rows = [
        (first + done, min(_QUERIES_PER_ITEM, length - done), start + done, index)
        for index, (first, length, start) in enumerate(segments)
        for done in range(0, length, _QUERIES_PER_ITEM)
    ]
    return torch.tensor(rows, dtype=torch.int32)


def pack(weight: Tensor) -> Tensor:
    """[n, k] fp32 -> panels [n / 8, k, 8], n filled up to a multiple of 16 with zeros; 64-byte aligned."""
    n, k = weight.shape
    packed = aligned_empty(weight.dtype, -(-n // PAIR) * 2, k, PANEL)
    whole = n // PANEL
    packed[:whole] = weight[: whole * PANEL].view(whole, PANEL, k).transpose(1, 2)
    packed[whole:] = 0
    if n % PANEL:
        packed[whole, :, : n % PANEL] = weight[whole * PANEL :].t()
    return packed


def pack_int8(values: Tensor) -> Tensor:
    """int8 [n, k] -> panels [n / 8, groups, 256] uint8 for `LinearKind.INT8`: n is filled up to a multiple of 16 and k
    to one of 32, with zeros; 64-byte aligned."""
    filled = nn.functional.pad(values, (0, -values.shape[1] % GROUP))
    return _panels(filled.view(torch.uint8).view(len(values), -1, GROUP), [])


def pack_groups(values: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
    """A weight in groups of 32 inputs -> panels [n / 8, groups, bytes] uint8, n filled up to a multiple of 16.

    `values`: [n, groups, 32], uint8 below 16 with a `minimum`, int8 without. `scale`, `minimum`: float16 [n, groups].
    """
    if minimum is None:
        return _panels(values.view(torch.uint8), [scale])
    # nibble s of word h of a run of eight inputs is input 2 s + h: each byte has two of one h
    runs = values.view(*values.shape[:2], -1, 2, 2, 2)  # [.., run, half of a word, which nibble of its byte, h]
    packed = runs[..., 0, :] | runs[..., 1, :] << 4  # [.., run, half, h]
    return _panels(packed.transpose(-1, -2).flatten(2), [scale, minimum], run=4)


def _panels(values: Tensor, heads: Sequence[Tensor], *, run: int = 2) -> Tensor:
    """uint8 [n, groups, bytes] and two-byte heads [n, groups] -> panels: of a group the heads of all eight outputs, and
    then by turns `run` bytes of each."""
    n, groups, size = values.shape
    missing = -n % PAIR
    blocks = nn.functional.pad(values, (0, 0, 0, 0, 0, missing)).view(-1, PANEL, groups, size // run, run)
    filled = [nn.functional.pad(head.view(torch.int16), (0, 0, 0, missing)).view(-1, PANEL, groups) for head in heads]
    parts = [head.transpose(1, 2).contiguous().view(torch.uint8) for head in filled]
    parts.append(blocks.permute(0, 2, 3, 1, 4).flatten(2))
    packed = aligned_empty(torch.uint8, len(blocks), groups, sum(part.shape[-1] for part in parts))
    torch.cat(parts, dim=-1, out=packed)
    return packed


def fill_outputs(values: Tensor | None) -> Tensor | None:
    """A scale or bias [n], with zeros up to a multiple of 16."""
    return None if values is None else nn.functional.pad(values.detach(), (0, -len(values) % PAIR)).contiguous()


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


def kernels_for(rows: Tensor) -> CpuKernels | None:
    """The kernels, if they can take these rows over a vocabulary as they are: float32 on the CPU, without gradient."""
    is_plain = rows.dtype is torch.float32 and rows.device.type == "cpu" and not rows.requires_grad
    return library() if is_plain else None


def _host_numbers(count: int, *kinds: str) -> list[array[Any]]:
    """Room for `count` numbers of each kind. Making a tensor takes longer where a pass has just emptied the caches."""
    return [array(kind, bytes(count * array(kind).itemsize)) for kind in kinds]


def _check(status: int) -> None:
    if status != 0:
        raise MemoryError("a CPU kernel could not allocate its working memory")
