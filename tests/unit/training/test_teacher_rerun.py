"""The target run again over packed batches: the same as run alone, in bounded pieces, compressed without bias."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from redraft.sampling.params import SamplingParams
from redraft.sampling.processors import SamplingRow, probabilities
from redraft_training.dataset.batch import Batch
from redraft_training.dataset.packing import PackSettings, pack
from redraft_training.dataset.teachers import RerunTeacher
from redraft_training.objectives.targets import Targets
from tests.fakes import tiny_model
from tests.unit.training.dataset_examples import VOCAB, example

PARAMS = SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.2)


def batch(params: SamplingParams = PARAMS, count: int = 9) -> Batch:
    examples = [example(f"r{i}", num_output=4 + i, seed=i, params=params) for i in range(count)]
    (made,) = pack(examples, PackSettings(row_tokens=40, batch_tokens=400))
    assert made.input_ids.shape[0] > 2
    return made


def teacher(arch: str = "llama", **options: object) -> RerunTeacher:
    return RerunTeacher(tiny_model(arch, vocab_size=VOCAB), vocab_size=VOCAB, **options)  # type: ignore[arg-type]


@cache
def untouched(arch: str) -> PreTrainedModel:
    return tiny_model(arch, vocab_size=VOCAB)


@torch.no_grad()
def alone(made: Batch, i: int, arch: str) -> Tensor:
    """transformers' own logits for position i, from the prefix that the batch's fields name."""
    owner, depth = made.examples[int(made.owner[i])], int(made.depth[i])
    start = int(made.offset[i]) - depth
    branch = owner.branches[0].token_ids[:depth]
    prefix = (*owner.prompt_token_ids, *owner.output_token_ids[:start], *branch)
    logits: Tensor = untouched(arch)(torch.tensor([prefix])).logits[0, -1]
    return logits


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_it_says_what_the_target_says_of_each_prefix(arch: str) -> None:
    made = batch()
    targets = teacher(arch).targets(made)
    assert targets.ids is None
    assert bool(targets.known.all())
    for i in range(made.num_positions):
        expected = probabilities(alone(made, i, arch)[None], [made.sampling_rows[i]])[0]
        torch.testing.assert_close(targets.probs[i], expected, atol=1e-5, rtol=1e-4)


def test_a_temperature_of_its_own_ignores_the_requests() -> None:
    made = batch()
    found = teacher().targets(made, temperature=2.0).probs
    expected = torch.stack([torch.softmax(alone(made, i, "llama") / 2.0, 0) for i in range(made.num_positions)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("max_positions", [1, 20, 50])
def test_pieces_make_no_difference(max_positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = batch()
    # positions in any order, as the contract allows
    order = torch.randperm(made.num_positions, generator=torch.Generator().manual_seed(0))
    mixed = replace(
        made,
        **{name: getattr(made, name)[order] for name in ("predict", "owner", "offset", "depth", "next_ids")},
        sampling_rows=tuple(made.sampling_rows[i] for i in order.tolist()),
        labels=tuple(made.labels[i] for i in order.tolist()),
    )
    options = {"hidden_layers": (0, 2), "top_n": 5}
    whole = teacher(**options, max_positions=10_000).targets(made)
    pieces = teacher(**options, max_positions=max_positions).targets(mixed)
    torch.testing.assert_close(pieces.probs, whole.probs[order], atol=1e-6, rtol=1e-5)
    assert pieces.tail_ids is not None
    assert whole.tail_ids is not None
    assert torch.equal(pieces.tail_ids, whole.tail_ids[order])
    assert len(pieces.hidden) == 2
    for one, other in zip(pieces.hidden, whole.hidden, strict=True):
        assert one.shape == (made.num_positions, 32)
        torch.testing.assert_close(one, other[order], atol=1e-5, rtol=1e-4)


def test_compressed_it_keeps_the_largest_and_one_draw_for_the_rest() -> None:
    made = batch(SamplingParams(temperature=1.5))
    full = teacher().targets(made).probs
    found = teacher(top_n=4).targets(made)
    assert found.ids is not None
    assert found.tail is not None
    torch.testing.assert_close(found.probs, full.topk(4, 1).values)
    torch.testing.assert_close(found.tail, 1 - found.probs.sum(1), atol=1e-6, rtol=0)
    # over many seeds each id outside is drawn as often as it is probable
    row, seeds = 0, 800
    counts = torch.zeros(VOCAB)
    dense = Targets(full[:1], torch.ones(1, dtype=torch.bool))
    drawing = teacher(top_n=4)
    for seed in range(seeds):
        drawing._seed = seed  # and not the forward pass again, which is the same for every seed
        tail_ids = drawing._compressed(dense, made, torch.tensor([row])).tail_ids
        assert tail_ids is not None
        if int(tail_ids) >= 0:
            counts[int(tail_ids)] += 1
    expected = full[row].clone()
    expected[found.ids[row]] = 0.0
    deviation = (seeds * expected * (1 - expected)).sqrt() + 1
    assert bool(((counts - seeds * expected).abs() < 4.5 * deviation).all())
    assert counts.sum() > 50
    assert float(counts[found.ids[row]].sum()) == 0.0


def test_ids_that_the_tokenizer_does_not_know_are_cut_off() -> None:
    made = batch(SamplingParams())
    small = RerunTeacher(tiny_model("llama", vocab_size=VOCAB), vocab_size=VOCAB - 5)
    probs = small.targets(made).probs
    assert probs.shape == (made.num_positions, VOCAB - 5)
    expected = probabilities(alone(made, 0, "llama")[None, : VOCAB - 5], [SamplingRow(SamplingParams())])
    torch.testing.assert_close(probs[:1], expected, atol=1e-5, rtol=1e-4)
