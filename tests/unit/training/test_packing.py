"""Packed predictions are those of each prefix run alone; the order of batches; how pieces are cut."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from redraft.sampling.params import SamplingParams
from redraft_training.dataset.batch import Batch
from redraft_training.dataset.example import Branch, Example
from redraft_training.dataset.packing import BatchPlan, PackSettings, pack, pieces
from tests.fakes import tiny_model
from tests.unit.training.dataset_examples import VOCAB, example

WORKED = example(
    prompt_token_ids=(1, 2),
    output_token_ids=(7, 8, 9, 3),
    labels=(None,) * 4,
    branches=(Branch(3, (4, 5), (None, None)),),
)


def random_example(rng: random.Random, name: str, longest: int = 24) -> Example:
    prompt = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, longest)))
    output = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, longest)))
    branches = []
    for _ in range(rng.randint(0, 4)):
        tokens = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 3)))
        branches.append(Branch(rng.randrange(len(output)), tokens, (None,) * len(tokens)))
    return example(
        name, prompt_token_ids=prompt, output_token_ids=output, labels=(None,) * len(output), branches=tuple(branches)
    )


def prefixes(batch: Batch) -> list[tuple[int, ...]]:
    """Text and rejected tokens before every position, as the contract's fields name them."""
    found = []
    for i in range(batch.num_positions):
        owner = batch.examples[int(batch.owner[i])]
        depth = int(batch.depth[i])
        start = int(batch.offset[i]) - depth
        tokens = (*owner.prompt_token_ids, *owner.output_token_ids[:start])
        last = int(batch.input_ids.flatten()[batch.predict[i]])
        matching = [
            b.token_ids[:depth]
            for b in owner.branches
            if depth and b.start == start and b.token_ids[depth - 1 : depth] == (last,)
        ]
        found.append((*tokens, *(matching[0] if depth else ())))
    return found


@torch.no_grad()
def packed_logits(batch: Batch) -> Tensor:
    model = tiny_model("llama", vocab_size=VOCAB)
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
    ).logits
    return logits.flatten(0, 1)[batch.predict]


@pytest.mark.parametrize("seed", range(4))
def test_packed_predictions_are_those_of_each_prefix_alone(seed: int) -> None:
    rng = random.Random(seed)
    examples = [random_example(rng, f"r{i}") for i in range(12)]
    model = tiny_model("llama", vocab_size=VOCAB)
    seen = 0
    for batch in pack(examples, PackSettings(row_tokens=96, batch_tokens=96 * 3)):
        logits = packed_logits(batch)
        for row, prefix in zip(logits, prefixes(batch), strict=True):
            with torch.no_grad():
                alone = model(torch.tensor([prefix])).logits[0, -1]
            torch.testing.assert_close(row, alone, atol=2e-5, rtol=1e-4)
        seen += batch.num_positions
    assert seen == sum(len(e.output_token_ids) + sum(len(b.token_ids) for b in e.branches) for e in examples)


def test_the_worked_example() -> None:
    (batch,) = pack([WORKED], PackSettings(row_tokens=16, batch_tokens=16))
    assert batch.input_ids[0, :7].tolist() == [1, 2, 7, 8, 9, 4, 5]
    assert batch.position_ids[0, :7].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert batch.input_ids.shape == (1, 8)
    assert batch.predict.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.offset.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.depth.tolist() == [0, 0, 0, 0, 1, 2]
    assert batch.next_ids.tolist() == [7, 8, 9, 3, -1, -1]
    assert bool(batch.attention_mask[0, 0, 7, 7])  # padding sees itself
    assert not bool(batch.attention_mask[0, 0, 7, :7].any())


def test_labels_and_contexts_belong_to_their_positions() -> None:
    penalised = SamplingParams(temperature=0.5, repetition_penalty=1.2)
    (batch,) = pack([example(params=penalised)], PackSettings(row_tokens=32, batch_tokens=32))
    (owner,) = batch.examples
    assert batch.labels == (*owner.labels, *owner.branches[0].labels)
    assert [tuple(row.output_ids) for row in batch.sampling_rows] == [
        *(owner.output_token_ids[:i] for i in range(6)),
        (*owner.output_token_ids[:2], 7),
        (*owner.output_token_ids[:2], 7, 8),
    ]
    assert {tuple(row.prompt_ids) for row in batch.sampling_rows} == {owner.prompt_token_ids}


def test_a_prompt_too_long_loses_its_beginning_but_not_its_penalties() -> None:
    long = example(
        prompt_token_ids=tuple(range(40)) * 3,
        params=SamplingParams(presence_penalty=0.5, repetition_penalty=1.1),
        branches=(),
    )
    (batch,) = pack([long], PackSettings(row_tokens=32, batch_tokens=32))
    assert batch.input_ids.shape == (1, 32)
    assert batch.input_ids[0].tolist() == [*long.prompt_token_ids[-27:], *long.output_token_ids[:-1]]
    assert batch.position_ids[0].tolist() == list(range(32))
    assert batch.num_positions == 6
    assert all(row.prompt_ids == long.prompt_token_ids for row in batch.sampling_rows)


@pytest.mark.parametrize("row_tokens", [2, 7, 16, 33])
def test_a_long_output_is_predicted_whole_and_once(row_tokens: int) -> None:
    rng = random.Random(row_tokens)
    settings = PackSettings(row_tokens=row_tokens, batch_tokens=row_tokens * 2)
    examples = [random_example(rng, f"r{i}", longest=90) for i in range(5)]
    predicted: Counter[tuple[str, int]] = Counter()
    for batch in pack(examples, settings):
        assert batch.input_ids.shape[1] <= -(-row_tokens // 8) * 8
        flat = batch.input_ids.flatten()
        for i in range(batch.num_positions):
            owner = batch.examples[int(batch.owner[i])]
            if int(batch.depth[i]) == 0:
                offset = int(batch.offset[i])
                predicted[owner.request_id, offset] += 1
                assert int(batch.next_ids[i]) == owner.output_token_ids[offset]
                text = (*owner.prompt_token_ids, *owner.output_token_ids)
                assert int(flat[batch.predict[i]]) == text[len(owner.prompt_token_ids) + offset - 1]
    assert predicted == Counter((e.request_id, i) for e in examples for i in range(len(e.output_token_ids)))
    for index, made in enumerate(examples):
        for piece in pieces(index, made, settings):
            assert 0 < piece.num_tokens <= row_tokens
            earlier = len(made.prompt_token_ids) + piece.first
            assert piece.context >= min(earlier, row_tokens // 2)


def test_without_a_prompt_the_first_token_is_not_predicted() -> None:
    bare = example(prompt_token_ids=())
    (batch,) = pack([bare], PackSettings(row_tokens=16, batch_tokens=16))
    assert batch.offset[batch.depth == 0].tolist() == [1, 2, 3, 4, 5]


def test_branches_can_be_left_out() -> None:
    (batch,) = pack([WORKED], PackSettings(row_tokens=16, batch_tokens=16, branches=False))
    assert batch.depth.tolist() == [0, 0, 0, 0]
    assert batch.input_ids[0].tolist() == [1, 2, 7, 8, 9, 0, 0, 0]


def fingerprint(batch: Batch) -> tuple[list[str], list[int]]:
    return [e.request_id for e in batch.examples], batch.input_ids.flatten().tolist()


def make_plan(seed: int = 3) -> BatchPlan:
    rng = random.Random(0)
    examples = [random_example(rng, f"r{i}") for i in range(40)]
    return BatchPlan(examples, PackSettings(row_tokens=64, batch_tokens=128), seed=seed)


def test_an_epochs_order_depends_on_seed_and_epoch_alone() -> None:
    first, again = make_plan(), make_plan()
    epochs = [[fingerprint(b) for b in first.batches(epoch)] for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert [fingerprint(b) for b in again.batches(1)] == epochs[1]  # without having run epoch 0
    assert [fingerprint(b) for b in first.batches(0)] == epochs[0]
    assert [fingerprint(b) for b in make_plan(seed=4).batches(0)] != epochs[0]
    assert len(epochs[0]) == first.num_batches(0)


def test_a_killed_epoch_goes_on_and_ranks_share_it() -> None:
    plan = make_plan()
    everything = [fingerprint(b) for b in plan.batches(0)]
    assert len(everything) > 5
    assert [fingerprint(b) for b in plan.batches(0, 3)] == everything[3:]
    for rank in range(3):
        assert [fingerprint(b) for b in plan.batches(0, 1, rank, 3)] == everything[1 + rank :: 3]


def test_every_epoch_holds_every_example_and_wastes_little() -> None:
    plan = make_plan()
    for epoch in range(2):
        batches = list(plan.batches(epoch))
        assert Counter(e.request_id for b in batches for e in b.examples) == Counter(f"r{i}" for i in range(40))
        used = sum(sum(p.num_tokens for p in pieces(0, e, plan.settings)) for b in batches for e in b.examples)
        assert used / (len(batches) * 128) > 0.7
        assert all(b.input_ids.shape[0] <= 2 for b in batches)


@pytest.mark.parametrize(("row", "batch"), [(1, 8), (16, 8)])
def test_impossible_sizes_are_refused(row: int, batch: int) -> None:
    with pytest.raises(ValueError, match="row_tokens"):
        PackSettings(row_tokens=row, batch_tokens=batch)
