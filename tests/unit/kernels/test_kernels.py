"""Native attention against a naive reference, and whole models on the native kernels against transformers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from redraft.kernels.library import CpuKernels, attention_items
from redraft.models import attention as attention_module
from redraft.models import packed as packed_module
from redraft.models.packed import NativeLinear, OneDnnLinear, pack_linears
from redraft.models.runner import Chunk, ModelRunner
from tests.fakes import ARCHITECTURES, tiny_model
from tests.linear_layers import random

BLOCK_SIZE = 4


def attention_reference(
    query: Tensor, keys: Tensor, values: Tensor, start: int, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Naive double precision attention of [queries, heads, dim] over [kv_heads, context, dim]."""
    group = query.shape[1] // keys.shape[0]
    result = torch.empty_like(query)
    for t in range(query.shape[0]):
        end = start + t + 1
        first = max(0, end - window) if window else 0
        for head in range(query.shape[1]):
            k, v = keys[head // group, first:end].double(), values[head // group, first:end].double()
            scores = k @ query[t, head].double() * scale
            if softcap:
                scores = torch.tanh(scores / softcap) * softcap
            result[t, head] = (torch.softmax(scores, 0) @ v).float()
    return result


SEGMENTS = [(0, 3, 0), (3, 1, 17), (4, 19, 10)]  # first token, length, position of the first
LONG_SEGMENTS = [(0, 3, 126), (3, 1, 383), (4, 19, 250)]  # across the spans that the kernel takes a context in


class Attention:
    """Native attention and the naive one on random queries over one random cache, whose blocks lie in any order."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, segments: Sequence[tuple[int, int, int]]) -> None:
        lengths = [-(-(start + length) // BLOCK_SIZE) for _, length, start in segments]
        shuffled = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(3)).to(torch.int32)
        self.segments = segments
        self.tables = shuffled.split(lengths)
        self.query = random(sum(length for _, length, _ in segments), heads, head_dim, seed=6)
        shape = (kv_heads, len(shuffled) * BLOCK_SIZE, head_dim)
        self.keys, self.values = random(*shape, seed=4), random(*shape, seed=5)
        self.scale = head_dim**-0.5

    def native(self, kernels: CpuKernels, members: Sequence[int], window: int | None, softcap: float | None) -> Tensor:
        """Of these segments, one after the other; the same one may come again."""
        lengths = [self.segments[i][1] for i in members]
        firsts = itertools.accumulate(lengths[:-1], initial=0)
        rows = [(first, *self.segments[i][1:]) for first, i in zip(firsts, members, strict=True)]
        blocks = torch.nn.utils.rnn.pad_sequence([self.tables[i] for i in members], batch_first=True)
        query = torch.cat([self.query[self.segments[i][0] :][: self.segments[i][1]] for i in members])
        return kernels.attention(
            query, self.keys, self.values, attention_items(rows), blocks,
            block_size=BLOCK_SIZE, window=window, scale=self.scale, softcap=softcap,
        )  # fmt: skip

    def naive(self, member: int, window: int | None, softcap: float | None) -> Tensor:
        first, length, start = self.segments[member]
        table = self.tables[member].long().unsqueeze(1)
        slots = (table * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[: start + length]
        query = self.query[first : first + length]
        return attention_reference(
            query, self.keys[:, slots], self.values[:, slots], start, self.scale, window, softcap
        )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 2, 8), (9, 3, 64), (2, 2, 24), (2, 1, 128), (1, 1, 256)]
)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (130, None), (None, 3.0), (3, 2.0)])
@pytest.mark.parametrize("segments", [SEGMENTS, LONG_SEGMENTS], ids=["short", "long"])
def test_attention_equals_a_naive_reference(
    kernels: CpuKernels,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    softcap: float | None,
    segments: list[tuple[int, int, int]],
) -> None:
    case = Attention(heads, kv_heads, head_dim, segments)
    ours = case.native(kernels, range(len(segments)), window, softcap)
    expected = torch.cat([case.naive(i, window, softcap) for i in range(len(segments))])
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("window", [None, 5, 130, 200])
def test_attention_is_bitwise_the_same_however_it_is_shared_out(kernels: CpuKernels, window: int | None) -> None:
    """Alone a sequence is cut into spans for several threads; among many each is one thread's."""
    case = Attention(9, 3, 64, LONG_SEGMENTS)
    for member, (_, length, _) in enumerate(LONG_SEGMENTS):
        alone = case.native(kernels, [member], window, None)
        crowd = case.native(kernels, [member] * (16 * kernels.start_pool(2)), window, None)
        assert all(torch.equal(each, alone) for each in crowd.split(length))


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways a model can be computed on this machine."""
    if request.param == "torch":
        monkeypatch.setattr(packed_module, "library", lambda: None)
        monkeypatch.setattr(attention_module, "library", lambda: None)
    else:
        request.getfixturevalue("kernels")  # skips without them
    return str(request.param)


def ragged_logits(forward: Callable[[list[Chunk]], Tensor], ids: list[int], other: list[int]) -> Tensor:
    """All logits of `ids`, computed in pieces of several sizes beside another sequence, in scattered blocks."""
    mine, theirs = [7, 2, 9, 4, 11, 0, 13, 15], [1, 3, 5, 6, 8, 10, 12, 14]
    parts = [forward([Chunk(ids[:9], 0, mine, 9)])]
    parts += [forward([Chunk(ids[i : i + 1], i, mine, 1)]) for i in range(9, 12)]
    parts.append(forward([Chunk(other[:11], 0, theirs, 2), Chunk(ids[12:17], 12, mine, 5)])[2:])
    parts.append(forward([Chunk(ids[17:], 17, mine, len(ids) - 17), Chunk(other[11:13], 11, theirs, 1)])[:-1])
    return torch.cat(parts)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_runner_equals_transformers(backend: str, arch: str) -> None:
    ids = [3 + i * 7 % 60 for i in range(29)]
    runner = ModelRunner(tiny_model(arch), num_blocks=16, block_size=BLOCK_SIZE, vocab_size=64)
    replaced = {"native": NativeLinear, "torch": OneDnnLinear}[backend]
    assert any(type(module) is replaced for module in runner.model.modules())
    expected = tiny_model(arch)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(ragged_logits(runner.forward, ids, ids[::-1]), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_are_bitwise_independent_of_chunks_and_neighbours(kernels: CpuKernels, arch: str) -> None:
    ids = [3 + i * 7 % 60 for i in range(29)]
    runner = ModelRunner(tiny_model(arch), num_blocks=16, block_size=BLOCK_SIZE, vocab_size=64)
    at_once = runner.forward([Chunk(ids, 0, range(8), len(ids))])
    assert torch.equal(at_once, ragged_logits(runner.forward, ids, ids[::-1]))


def test_pack_linears_leaves_other_dtypes_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4))
    assert pack_linears(model) == 1
    assert type(model[0]) is nn.Linear
