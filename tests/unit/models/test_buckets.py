"""Passes in fixed shapes against the same passes as they are. Captured graphs need a GPU: `tests/gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention

from redraft.models.buckets import Bucket, BucketedForward, BucketLimits
from redraft.models.runner import Chunk, ModelRunner
from tests.fakes import runner_ahead, tiny_model

BLOCK_SIZE, NUM_BLOCKS, VOCAB = 4, 24, 64
LIMITS = BucketLimits(max_sequences=4, max_rows=4)
ARCHES = ("llama", "qwen2", "mistral", "gemma2", "gemma3")


def runners(arch: str, output_ids: torch.Tensor | None = None) -> tuple[ModelRunner, ModelRunner]:
    """The same model as it is, and in buckets."""
    plain, padded = (tiny_model(arch, vocab_size=VOCAB) for _ in range(2))
    sizes: dict[str, Any] = {"num_blocks": NUM_BLOCKS, "block_size": BLOCK_SIZE, "vocab_size": VOCAB}
    sizes["output_ids"] = output_ids
    return ModelRunner(plain, **sizes), runner_ahead(padded, LIMITS, **sizes)


def conversation(seed: int = 0) -> Iterator[list[Chunk]]:
    """Prompts, then decoding, verification and catching up in batches of changing size, over blocks out of order."""
    random = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(NUM_BLOCKS, generator=random).tolist()
    tables = [blocks[6 * i : 6 * i + 6] for i in range(4)]
    lengths = [9, 1, 5, 12]

    def tokens(count: int) -> list[int]:
        return torch.randint(VOCAB, (count,), generator=random).tolist()

    yield [Chunk(tokens(n), 0, table, 1) for n, table in zip(lengths, tables, strict=True)]
    for sizes in ((1, 1, 1, 1), (3, 1, 0, 2), (0, 4, 0, 0), (2, 0, 2, 0), (1, 0, 0, 1), (4, 2, 3, 1)):
        chunks = []
        for i, size in enumerate(sizes):
            if size:
                chunks.append(Chunk(tokens(size), lengths[i], tables[i], max(1, size - i % 2)))
                lengths[i] += size
        yield chunks


@pytest.mark.parametrize("arch", ARCHES)
def test_a_padded_pass_gives_the_logits_of_the_pass_itself(arch: str) -> None:
    plain, padded = runners(arch)
    for chunks in conversation():
        torch.testing.assert_close(padded.forward(chunks), plain.forward(chunks), rtol=1e-4, atol=1e-4)


def test_it_is_padding_that_was_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Bucket] = []
    forward = BucketedForward.forward

    def spy(self: BucketedForward, chunks: list[Chunk], bucket: Bucket, drawn: torch.Tensor | None) -> torch.Tensor:
        used.append(bucket)
        return forward(self, chunks, bucket, drawn)

    monkeypatch.setattr(BucketedForward, "forward", spy)
    _, padded = runners("llama")
    for chunks in conversation():
        padded.forward(chunks)
    # the prompts are too long for a bucket
    assert used == [Bucket(4, 1), Bucket(4, 4), Bucket(1, 4), Bucket(2, 2), Bucket(2, 1), Bucket(4, 4)]


def test_padding_writes_to_no_block_of_the_pool() -> None:
    _, padded = runners("llama")
    before = padded.cache.keys.clone()
    padded.forward([Chunk([3, 4, 5], 0, [7], 1)])
    changed = (padded.cache.keys != before).any(dim=3).any(dim=1).any(dim=0).nonzero().flatten().tolist()
    assert set(changed) == {28, 29, 30, NUM_BLOCKS * BLOCK_SIZE}


def test_what_lay_in_a_block_before_is_not_seen() -> None:
    plain, padded = runners("llama")
    first = [Chunk([9, 8, 7, 6], 0, [5], 1), Chunk([1, 2, 3, 4], 0, [2], 1)]
    second = [Chunk([11], 0, [5], 1), Chunk([12, 13], 4, [2, 5], 2)]  # block 5 begins anew, and is shared
    for runner in (plain, padded):
        runner.forward(first)
    ours, theirs = padded.forward(second[:1]), plain.forward(second[:1])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    ours, theirs = padded.forward(second[1:]), plain.forward(second[1:])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [3, 9])  # in a bucket, and too long for one
def test_tokens_that_only_the_device_knows(length: int) -> None:
    _, padded = runners("llama")
    tokens = list(range(20, 20 + length))
    drawn = torch.tensor([50, 51, 52])
    known = padded.forward([Chunk([*tokens[:-2], 52, 50], 0, [0, 1, 2], length)])
    referred = padded.forward([Chunk([*tokens[:-2], -3, -1], 0, [0, 1, 2], length)], drawn)
    assert torch.equal(known, referred)


def test_a_reduced_head_in_a_bucket() -> None:
    ids = torch.tensor([1, 5, 6, 40])
    plain, padded = runners("llama", output_ids=ids)
    chunks = [Chunk([3, 4], 0, [1], 2)]
    ours = padded.forward(chunks)
    torch.testing.assert_close(ours, plain.forward(chunks), rtol=1e-4, atol=1e-4)
    assert ours.isfinite().sum() == 2 * len(ids)


def test_a_block_table_that_is_too_short() -> None:
    _, padded = runners("llama")
    with pytest.raises(IndexError, match="block table of 1 is too short for 6 positions"):
        padded.forward([Chunk([1], 5, [0], 1)])


def test_every_batch_within_the_limits_has_a_bucket() -> None:
    model = tiny_model("llama", vocab_size=VOCAB)
    runner = ModelRunner(
        model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, vocab_size=VOCAB, buckets=BucketLimits(5, 6)
    )
    assert runner._buckets is not None
    every = set(runner._buckets.buckets())
    for sequences in range(1, 6):
        for rows in range(1, 7):
            bucket = runner._buckets.bucket_of([Chunk([0] * rows, 0, [0, 1])] * sequences)
            assert bucket in every
    assert runner._buckets.bucket_of([Chunk([0], 0, [0])] * 6) is None
    assert runner._buckets.bucket_of([Chunk([0] * 7, 0, [0, 1])]) is None
    assert runner.captures() == []  # there is nothing to capture on a CPU


def test_a_model_that_cannot_be_captured_runs_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(self: BucketedForward, bucket: Bucket) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    plain, padded = runners("llama")
    monkeypatch.setattr(BucketedForward, "capture", refused)
    for _ in range(2):  # nor is the next one tried
        padded._capture(Bucket(1, 1))
    assert ["CUDA graph" in record.message for record in caplog.records] == [True]
    chunks = [Chunk([3, 4], 0, [1], 2)]
    torch.testing.assert_close(padded.forward(chunks), plain.forward(chunks), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", [*ARCHES, "qwen3"])
def test_no_operation_of_a_padded_pass_waits_for_the_device(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could not be captured. A tensor on the meta device has no numbers: whoever asks for one gets an exception."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    model = torch.nn.Module.to(tiny_model(arch, vocab_size=VOCAB), "meta")
    runner = runner_ahead(model, LIMITS, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, vocab_size=VOCAB)
    drawn = torch.empty(2, dtype=torch.int64, device="meta")
    logits = runner.forward([Chunk([1, -1], 3, [3, 4], 2), Chunk([-2], 0, [5], 1)], drawn)
    assert (logits.shape, logits.device.type) == ((3, VOCAB), "meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        logits.tolist()
