"""Captured labels against the full logits they were cut from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from redraft.sampling.params import SamplingParams
from redraft.sampling.processors import SamplingRow, probabilities
from redraft_training.dataset.captured import KeptRows, request_probabilities
from redraft_training.dataset.teachers import CapturedTeacher, NoTeacher
from redraft_training.objectives.targets import Targets
from tests.unit.training.dataset_examples import VOCAB, batch_of, labels_of

N = 64
KEPT = 12
PROMPT, OUTPUT = (3, 4, 5, 3, 9), (6, 7, 6, 6, 11, 3)

PARAMS = {
    "greedy": SamplingParams(temperature=0.0),
    "plain": SamplingParams(),
    "cold": SamplingParams(temperature=0.3),
    "freezing": SamplingParams(temperature=1e-3, top_p=0.9),
    "nearly_greedy": SamplingParams(temperature=0.02, repetition_penalty=1.1),
    "hot": SamplingParams(temperature=1.7),
    "top_k": SamplingParams(temperature=0.8, top_k=5),
    "top_k_of_kept": SamplingParams(temperature=0.8, top_k=KEPT - 1),
    "top_p": SamplingParams(temperature=0.6, top_p=0.7),
    "min_p": SamplingParams(min_p=0.2),
    "all_cuts": SamplingParams(temperature=0.9, top_k=8, top_p=0.85, min_p=0.02),
    "repetition": SamplingParams(temperature=0.9, repetition_penalty=1.4),
    "penalties": SamplingParams(temperature=0.9, presence_penalty=1.1, frequency_penalty=0.4),
    "penalties_top_p": SamplingParams(temperature=0.5, repetition_penalty=1.2, presence_penalty=0.5, top_p=0.7),
    "greedy_penalties": SamplingParams(temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.7),
    "bias": SamplingParams(temperature=0.9, logit_bias=((1, 2.0), (5, -4.0), (39, 1.0), (5, 1.0))),
    "bias_top_k": SamplingParams(temperature=0.9, top_k=3, logit_bias=((1, 2.0), (5, -4.0))),
    "boosts": SamplingParams(temperature=0.9, repetition_penalty=0.8, presence_penalty=-0.7, top_k=3),
}


def random_logits(seed: int = 0, scale: float = 2.5) -> Tensor:
    return torch.randn(N, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def dense(targets: Targets) -> Tensor:
    """Sparse targets as [n, vocab_size], the tail left out."""
    assert targets.ids is not None
    return torch.zeros(len(targets.known), VOCAB).scatter_add_(1, targets.ids, targets.probs)


def exactness(logits: Tensor, rows: list[SamplingRow], num_kept: int) -> Tensor:
    labels = labels_of(logits, rows, num_kept)
    nowhere = np.full(len(rows), -1, np.int64)
    return torch.from_numpy(request_probabilities(labels, KeptRows.of(labels), rows, nowhere, VOCAB).exact)


@pytest.mark.parametrize("name", PARAMS)
def test_every_kept_id_has_its_own_probability(name: str) -> None:
    """Wherever the captured rows call themselves exact they are, tail included; and they mostly are."""
    logits = random_logits()
    rows = [SamplingRow(PARAMS[name], PROMPT, OUTPUT)] * N
    full = probabilities(logits, rows)
    targets = CapturedTeacher(VOCAB).targets(batch_of(rows, labels_of(logits, rows, KEPT)))
    assert targets.ids is not None
    assert targets.tail is not None
    exact = exactness(logits, rows, KEPT)
    assert exact.float().mean() > 0.5
    torch.testing.assert_close(targets.probs[exact], full.gather(1, targets.ids)[exact], atol=2e-6, rtol=1e-5)
    outside = full.scatter(1, targets.ids, 0.0).sum(1)
    torch.testing.assert_close(targets.tail[exact], outside[exact], atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(targets.probs.sum(1) + targets.tail, torch.ones(N), atol=1e-5, rtol=0)
    assert bool(targets.known.all())


@pytest.mark.parametrize("name", PARAMS)
def test_with_the_whole_vocabulary_kept_nothing_is_open(name: str) -> None:
    logits = random_logits(1)
    rows = [SamplingRow(PARAMS[name], PROMPT, OUTPUT)] * N
    targets = CapturedTeacher(VOCAB).targets(batch_of(rows, labels_of(logits, rows, VOCAB)))
    assert targets.tail is not None
    assert bool(exactness(logits, rows, VOCAB).all())
    torch.testing.assert_close(dense(targets), probabilities(logits, rows), atol=2e-6, rtol=1e-5)
    assert float(targets.tail.max()) == 0.0


def test_a_nucleus_beyond_the_kept_ids_is_nearly_exact() -> None:
    """What survives top-p is known up to one outside id's probability, so each ratio is within that of the truth."""
    logits = random_logits(2, scale=1.0)
    rows = [SamplingRow(SamplingParams(temperature=1.3, top_p=0.95))] * N
    full = probabilities(logits, rows)
    targets = CapturedTeacher(VOCAB).targets(batch_of(rows, labels_of(logits, rows, KEPT)))
    assert targets.ids is not None
    assert targets.tail is not None
    assert not bool(exactness(logits, rows, KEPT).any())
    truth = full.gather(1, targets.ids)
    ratio = targets.probs / truth
    largest_outside = full.scatter(1, targets.ids, 0.0).max(1).values
    assert bool(((ratio - 1).abs() <= largest_outside.unsqueeze(1)).all())
    assert float((targets.tail - (1 - truth.sum(1))).abs().max()) < 0.03


def test_a_top_k_larger_than_what_was_kept_stays_a_distribution() -> None:
    logits = random_logits(3, scale=1.0)
    rows = [SamplingRow(SamplingParams(top_k=20, top_p=0.9))] * N
    targets = CapturedTeacher(VOCAB).targets(batch_of(rows, labels_of(logits, rows, KEPT)))
    full = probabilities(logits, rows)
    assert targets.ids is not None
    assert targets.tail is not None
    torch.testing.assert_close(targets.probs.sum(1) + targets.tail, torch.ones(N), atol=1e-5, rtol=0)
    assert float((targets.probs - full.gather(1, targets.ids)).abs().max()) < 0.05


def test_a_mixture_of_requests_is_treated_row_by_row() -> None:
    logits = random_logits(4)
    rows = [SamplingRow(list(PARAMS.values())[i % len(PARAMS)], PROMPT, OUTPUT[: i % 6]) for i in range(N)]
    labels = labels_of(logits, rows, KEPT)
    labels = [
        replace(label, ids=label.ids[: 5 + i % 8], logits=label.logits[: 5 + i % 8]) for i, label in enumerate(labels)
    ]
    together = dense(CapturedTeacher(VOCAB).targets(batch_of(rows, labels)))
    for i in range(N):
        alone = dense(CapturedTeacher(VOCAB).targets(batch_of(rows[i : i + 1], labels[i : i + 1])))
        torch.testing.assert_close(together[i], alone[0])


def test_where_nothing_was_captured_nothing_is_known() -> None:
    logits = random_logits(5)[:4]
    rows = [SamplingRow(SamplingParams())] * 4
    kept = labels_of(logits, rows, KEPT)
    targets = CapturedTeacher(VOCAB).targets(batch_of(rows, [None, kept[1], None, kept[3]], [1, 2, 3, 4]))
    assert targets.known.tolist() == [False, True, False, True]
    assert targets.tail_ids is not None
    assert float(targets.probs[~targets.known].sum()) == 0.0
    assert targets.tail_ids[~targets.known].tolist() == [-1, -1]
    for empty in (NoTeacher(), CapturedTeacher(VOCAB)):
        nothing = empty.targets(batch_of(rows, [None] * 4, [1, 2, 3, 4]))
        assert not bool(nothing.known.any())
        assert float(nothing.probs.sum()) == 0.0


def test_the_emitted_token_stands_for_the_tail_only_if_it_is_not_kept() -> None:
    logits = random_logits(6, scale=0.5)[:3]
    rows = [SamplingRow(SamplingParams())] * 3
    labels = labels_of(logits, rows, 4)
    outside = next(token for token in range(VOCAB) if token not in labels[0].ids)
    targets = CapturedTeacher(VOCAB).targets(batch_of(rows, labels, [outside, labels[1].ids[2], -1]))
    assert targets.tail_ids is not None
    assert targets.tail_ids.tolist() == [outside, -1, -1]


def test_a_greedy_request_is_what_it_emitted() -> None:
    """On the path the emitted token is the arg max, even where a bias lifted it over all that was kept."""
    logits = random_logits(7)[:2]
    params = SamplingParams(temperature=0.0, logit_bias=((int(logits[0].argmin()), 100.0),))
    rows = [SamplingRow(params), SamplingRow(SamplingParams(temperature=0.0))]
    emitted = probabilities(logits, rows).argmax(1).tolist()
    targets = CapturedTeacher(VOCAB).targets(batch_of(rows, labels_of(logits, rows, 4), emitted))
    assert targets.tail is not None
    assert targets.tail_ids is not None
    assert (targets.tail.tolist(), targets.tail_ids.tolist()) == ([1.0, 0.0], [emitted[0], -1])
    torch.testing.assert_close(dense(targets)[1], probabilities(logits, rows)[1])


def test_at_temperature_1_the_raw_distribution_is_exact() -> None:
    logits = random_logits(8)
    rows = [SamplingRow(SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.3), PROMPT, OUTPUT)] * N
    targets = CapturedTeacher(VOCAB).targets(batch_of(rows, labels_of(logits, rows, KEPT), [1] * N), temperature=1.0)
    full = torch.softmax(logits, 1)
    assert targets.ids is not None
    assert targets.tail is not None
    assert targets.tail_ids is not None
    torch.testing.assert_close(targets.probs, full.gather(1, targets.ids), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(targets.tail, 1 - targets.probs.sum(1), atol=5e-6, rtol=0)
    assert set(targets.tail_ids.tolist()) == {-1}  # what was emitted is no draw from this distribution


def test_at_another_temperature_the_kept_ids_are_all_there_is() -> None:
    logits = random_logits(9)
    rows = [SamplingRow(SamplingParams())] * N
    targets = CapturedTeacher(VOCAB).targets(batch_of(rows, labels_of(logits, rows, KEPT)), temperature=2.0)
    full = torch.softmax(logits / 2.0, 1)
    assert targets.ids is not None
    kept = full.gather(1, targets.ids)
    torch.testing.assert_close(targets.probs, kept / kept.sum(1, keepdim=True), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["plain", "hot", "repetition", "bias"])
def test_the_expected_gradient_is_that_of_the_full_logits(name: str) -> None:
    """Cross-entropy of a student, the tail by its one draw: averaged over the token the target may emit (each weighted
    with its probability) the gradient is the gradient under full logits. Without the draw it is not."""
    logits = random_logits(10, scale=1.0)[:1]
    row = SamplingRow(PARAMS[name], PROMPT, OUTPUT)
    full = probabilities(logits, [row])[0]
    student = torch.randn(VOCAB, generator=torch.Generator().manual_seed(11), requires_grad=True)
    (wanted,) = torch.autograd.grad(-(full * student.log_softmax(0)).sum(), student)
    # one batch that holds every possible outcome of the draw
    labels = labels_of(logits, [row], 6) * VOCAB
    targets = CapturedTeacher(VOCAB).targets(batch_of([row] * VOCAB, labels, list(range(VOCAB))))
    assert targets.ids is not None
    assert targets.tail_ids is not None
    scores = student.log_softmax(0)
    kept = (targets.probs * scores[targets.ids]).sum(1)
    drawn = torch.where(targets.tail_ids >= 0, scores[targets.tail_ids.clamp(min=0)], 0.0)
    (found,) = torch.autograd.grad(-(full * (kept + drawn)).sum(), student, retain_graph=True)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    (biased,) = torch.autograd.grad(-(full * kept).sum(), student)
    assert float((biased - wanted).abs().max()) > 0.01
