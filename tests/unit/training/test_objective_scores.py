"""The student's distribution at a request's parameters, and the log-softmax that computes only what is wanted."""

from __future__ import annotations

import pytest
import torch

from redraft.sampling.divergence import UNREACHABLE
from redraft.sampling.params import SamplingParams
from redraft.sampling.processors import SamplingRow, probabilities
from redraft_training.objectives.objective import Objective
from redraft_training.objectives.rows import sparse_log_probs
from redraft_training.objectives.scores import columns_of, student_log_probs
from tests.unit.training.objective_cases import GREEDY, VOCAB, random_logits, student

ADJUSTED = SamplingRow(
    SamplingParams(
        temperature=0.6,
        repetition_penalty=1.8,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        logit_bias=((4, 2.0), (7, -1.5)),
    ),
    prompt_ids=(1, 2, 5),
    output_ids=(3, 3, 9),
    banned_ids=(6, 0),
)


def test_student_has_the_requests_distribution() -> None:
    rows = [ADJUSTED, SamplingRow(SamplingParams(temperature=1.7)), ADJUSTED]
    logits = random_logits(3, 0)
    log_probs = student_log_probs(student(logits), rows, Objective())
    torch.testing.assert_close(log_probs.exp(), probabilities(logits.detach(), rows))


def test_student_is_not_truncated() -> None:
    cut = SamplingRow(SamplingParams(temperature=0.9, top_k=2, top_p=0.5, min_p=0.3))
    plain = SamplingRow(SamplingParams(temperature=0.9))
    logits = random_logits(2, 1)
    log_probs = student_log_probs(student(logits), [cut, cut], Objective())
    torch.testing.assert_close(log_probs.exp(), probabilities(logits.detach(), [plain, plain]))


def test_greedy_student_is_at_temperature_1_with_penalties_only_for_hard_targets() -> None:
    greedy = SamplingRow(SamplingParams(temperature=0.0, logit_bias=((3, 5.0),)))
    warm = SamplingRow(SamplingParams(temperature=1.0, logit_bias=((3, 5.0),)))
    logits = random_logits(1, 2)
    hard = student_log_probs(student(logits), [greedy], Objective(greedy_targets="hard"))
    soft = student_log_probs(student(logits), [greedy], Objective(greedy_targets="soft"))
    torch.testing.assert_close(hard.exp(), probabilities(logits.detach(), [warm]))
    torch.testing.assert_close(soft, logits.log_softmax(1))


def test_gradient_through_penalties_and_bans() -> None:
    logits = random_logits(2, 3)
    rows = [ADJUSTED, GREEDY]
    weights = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(4))
    weights[0, [0, 6]] = 0.0  # log-probabilities of banned ids

    def value(at: torch.Tensor) -> torch.Tensor:
        log_probs = student_log_probs(student(at), rows, Objective())
        return (log_probs.clamp(min=-1e4) * weights).sum()

    (gradient,) = torch.autograd.grad(value(logits), logits)
    with torch.no_grad():
        for row in range(2):
            for column in range(VOCAB):
                step = torch.zeros(2, VOCAB)
                step[row, column] = 1e-2
                measured = (value(logits + step) - value(logits - step)) / 2e-2
                assert gradient[row, column].item() == pytest.approx(measured.item(), abs=5e-3), (row, column)
    assert gradient[0, [0, 6]].tolist() == [0.0, 0.0]


def test_penalties_find_their_columns_in_a_reduced_vocabulary() -> None:
    vocab_ids = torch.tensor([0, 2, 3, 4, 8, 9])
    full, rows = torch.full((1, VOCAB), -torch.inf), [ADJUSTED]
    narrow = random_logits(1, 5, width=6)
    full[:, vocab_ids] = narrow.detach()
    log_probs = student_log_probs(student(narrow, vocab_ids), rows, Objective())
    torch.testing.assert_close(log_probs.exp(), probabilities(full, rows)[:, vocab_ids])


def test_columns_of() -> None:
    vocab_ids = torch.tensor([2, 5, 9])
    columns, present = columns_of(torch.tensor([[9, 1, 2], [11, -1, 5]]), vocab_ids)
    assert columns.tolist() == [[2, 0, 0], [0, 0, 1]]
    assert present.tolist() == [[True, False, True], [False, False, True]]
    columns, present = columns_of(torch.tensor([4, -1]), None)
    assert (columns.tolist(), present.tolist()) == ([4, 0], [True, False])


def test_sparse_log_probs_against_the_dense_log_softmax() -> None:
    logits, temperature = random_logits(3, 6), torch.tensor([1.0, 0.5, 3.0])
    columns = torch.tensor([[1, 4, 0], [7, 2, 5], [3, 0, 0]])
    there = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    drawn, drawn_there = torch.tensor([8, 0, 11]), torch.tensor([True, False, True])
    at = sparse_log_probs(logits, temperature, columns, there, drawn, drawn_there)

    log_q = (logits / temperature.unsqueeze(1)).log_softmax(1)
    in_head = torch.zeros(3, VOCAB, dtype=torch.bool)
    row, slot = there.nonzero(as_tuple=True)
    in_head[row, columns[row, slot]] = True
    head = torch.where(there, log_q.gather(1, columns), UNREACHABLE)
    tail = log_q.masked_fill(in_head, -torch.inf).logsumexp(1)
    at_drawn = torch.where(drawn_there, log_q[torch.arange(3), drawn], UNREACHABLE)
    for got, expected in ((at.head, head), (at.tail, tail), (at.drawn, at_drawn), (at.largest, logits.amax(1))):
        torch.testing.assert_close(got, expected)

    generator = torch.Generator().manual_seed(7)
    g, h, k = torch.randn(3, 3, generator=generator), torch.randn(3, generator=generator), torch.randn(3)
    sparse = ((at.head * g).sum() + (at.tail * h).sum() + (at.drawn * k).sum(), logits)
    dense = ((head * g).sum() + (tail * h).sum() + (at_drawn * k).sum(), logits)
    torch.testing.assert_close(torch.autograd.grad(*sparse)[0], torch.autograd.grad(*dense)[0])


def test_a_tail_far_below_rounding_keeps_its_gradient() -> None:
    """1 - q rounds to 0 here: the tail has to be summed for itself."""
    logits = torch.tensor([[30.0, 0.0, -1.0]], requires_grad=True)
    nothing = torch.zeros(1, dtype=torch.int64)
    args = (torch.ones(1), torch.tensor([[0]]), torch.tensor([[True]]), nothing, nothing.bool())
    at = sparse_log_probs(logits, *args)
    tail = torch.tensor([0.0, -1.0]).double().logsumexp(0) - 30.0
    assert at.tail.item() == pytest.approx(tail.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(at.tail.sum(), logits)
    within = torch.tensor([0.0, -1.0]).softmax(0)
    assert gradient[0].tolist() == pytest.approx([-1.0, *within.tolist()], abs=1e-6)
