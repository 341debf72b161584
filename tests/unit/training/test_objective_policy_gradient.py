"""MiniLLM's gradient against exact enumeration of all texts of 3 tokens over a vocabulary of 3."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from redraft_training.dataset.batch import Batch
from redraft_training.objectives.loss import loss
from redraft_training.objectives.objective import Objective
from redraft_training.objectives.policy_gradient import (
    MAX_IMPORTANCE,
    MAX_LOG_RATIO,
    RolloutTargets,
    long_term_values,
    sums_of_later,
)
from redraft_training.objectives.presets import preset
from redraft_training.objectives.targets import Targets
from redraft_training.student.student import StudentOutput
from tests.unit.training.objective_cases import make_batch, sparse

SIZE, LENGTH = 3, 3
PREFIXES = [prefix for length in range(LENGTH) for prefix in itertools.product(range(SIZE), repeat=length)]
STATE = {prefix: index for index, prefix in enumerate(PREFIXES)}  # 1 + 3 + 9 states
TEXTS = list(itertools.product(range(SIZE), repeat=LENGTH))


def tables(seed: int) -> tuple[Tensor, Tensor]:
    """Student logits and teacher probabilities at every state, [13, 3]; a text's probability is a product of rows."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(PREFIXES), SIZE, generator=generator)
    return logits.requires_grad_(), torch.randn(len(PREFIXES), SIZE, generator=generator).softmax(dim=1)


def log_prob(log_table: Tensor, text: tuple[int, ...]) -> Tensor:
    return torch.stack([log_table[STATE[text[:t]], text[t]] for t in range(LENGTH)]).sum()


def sequence_kl(logits: Tensor, p: Tensor) -> Tensor:
    """KL(q || p) over whole texts, by its definition."""
    log_q, log_p = logits.log_softmax(dim=1), p.log()
    return torch.stack(
        [log_prob(log_q, text).exp() * (log_prob(log_q, text) - log_prob(log_p, text)) for text in TEXTS]
    ).sum()


def rollouts(logits: Tensor, p: Tensor, mixing: float) -> tuple[StudentOutput, RolloutTargets, Tensor]:
    """All 27 texts as one batch, and the probability with which each would be drawn."""
    states = torch.tensor([STATE[text[:t]] for text in TEXTS for t in range(LENGTH)])
    batch = all_texts()
    behaviour = mixing * p + (1 - mixing) * logits.detach().softmax(dim=1)
    drawn = behaviour[states, batch.next_ids].log()
    chance = torch.tensor([log_prob(behaviour.log(), text).exp() for text in TEXTS])
    targets = Targets(p[states], torch.ones(len(states), dtype=torch.bool))
    rollout = RolloutTargets.from_dense(targets, batch, drawn)
    return StudentOutput(logits[states], None, SIZE), rollout, chance


def all_texts() -> Batch:
    return make_batch(
        [token for text in TEXTS for token in text],
        owner=[index for index in range(len(TEXTS)) for _ in range(LENGTH)],
        offset=list(range(LENGTH)) * len(TEXTS),
    )


def sampled_log_q(output: StudentOutput) -> Tensor:
    return output.logits.log_softmax(dim=1).gather(1, all_texts().next_ids.unsqueeze(1)).squeeze(1)


def test_expected_gradient_is_that_of_the_sequence_level_kl() -> None:
    """Fresh student, no mixing, no length normalisation: single-step part plus long-term part is the exact gradient."""
    logits, p = tables(0)
    output, rollout, chance = rollouts(logits, p, mixing=0.0)
    log_q, log_p = output.logits.log_softmax(dim=1), rollout.targets.probs.log()
    single_step = (log_q.exp() * (log_q - log_p)).sum(dim=1)
    long_term = long_term_values(sampled_log_q(output), rollout, all_texts(), length_normalised=False)
    expected = (chance.repeat_interleave(LENGTH) * (single_step + long_term)).sum()
    (gradient,) = torch.autograd.grad(expected, logits)
    (exact,) = torch.autograd.grad(sequence_kl(logits, p), logits)
    torch.testing.assert_close(gradient, exact, atol=1e-6, rtol=1e-5)
    # without the long-term part it is another gradient
    log_q = logits.log_softmax(dim=1)[torch.tensor([STATE[text[:t]] for text in TEXTS for t in range(LENGTH)])]
    short_sighted = (chance.repeat_interleave(LENGTH) * (log_q.exp() * (log_q - log_p)).sum(dim=1)).sum()
    assert float((torch.autograd.grad(short_sighted, logits)[0] - exact).norm()) > 0.01


def test_loss_is_the_papers_estimator() -> None:
    """Mixing, clipped weights and length normalisation, each text and token by itself in plain Python."""
    logits, p = tables(1)
    output, rollout, _ = rollouts(logits, p, mixing=0.2)
    leaf = output.logits.detach().requires_grad_()
    given = StudentOutput(leaf, None, SIZE)
    result = loss(given, rollout, all_texts(), preset("minillm"))
    log_q, log_p = leaf.log_softmax(dim=1), rollout.targets.probs.log()
    expected = []
    for index, text in enumerate(TEXTS):
        rows = range(index * LENGTH, (index + 1) * LENGTH)
        ratios = [
            float((log_q[row, token] - log_p[row, token]).detach()) for row, token in zip(rows, text, strict=True)
        ]
        for t, row in enumerate(rows):
            own = log_q[row, text[t]]
            importance = min(math.exp(float(own.detach() - rollout.behaviour_log_probs[row])), MAX_IMPORTANCE)
            later = ratios[t + 1 :]
            advantage = sum(later) / max(1, len(later))
            kl = (log_q[row].exp() * (log_q[row] - log_p[row])).sum()
            expected.append(kl + importance * advantage * own)
    reference = torch.stack(expected)
    torch.testing.assert_close(result.values, reference.detach(), atol=1e-5, rtol=1e-4)
    (gradient,) = torch.autograd.grad(result.loss, leaf)
    (wanted,) = torch.autograd.grad(reference.mean(), leaf)
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-4)


def test_captured_ids_serve_the_single_step_part() -> None:
    logits, p = tables(2)
    output, rollout, _ = rollouts(logits, p, mixing=0.2)
    seen = RolloutTargets(sparse(rollout.targets.probs, SIZE), rollout.teacher_log_probs, rollout.behaviour_log_probs)
    one, other = (loss(output, given, all_texts(), preset("minillm")) for given in (seen, rollout))
    torch.testing.assert_close(one.values, other.values, atol=1e-5, rtol=1e-4)


def test_on_logged_text_it_is_reverse_kl() -> None:
    logits, p = tables(3)
    output, rollout, _ = rollouts(logits, p, mixing=0.0)
    mixed = preset("minillm").model_copy(update={"on_policy_fraction": 0.5})
    one = loss(output, rollout.targets, all_texts(), mixed)
    other = loss(output, rollout.targets, all_texts(), Objective(how="reverse_kl", temperature=1.0))
    torch.testing.assert_close(one.loss, other.loss)


def test_sums_of_later_positions() -> None:
    owner, offset = torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 0, 2])
    sums, count = sums_of_later(torch.tensor([1.0, 2.0, 5.0, 4.0]), owner, offset)
    assert (sums.tolist(), count.tolist()) == ([6.0, 4.0, 0.0, 0.0], [2.0, 1.0, 0.0, 0.0])


def test_stale_rollouts_and_impossible_tokens_stay_bounded() -> None:
    batch = make_batch([0, 1], owner=[0, 0], offset=[0, 1])
    log_q = torch.tensor([-0.1, -0.2], requires_grad=True)
    targets = Targets(torch.ones(2, SIZE) / SIZE, torch.ones(2, dtype=torch.bool))
    rollout = RolloutTargets(targets, torch.tensor([-1.0, -1000.0]), torch.tensor([-60.0, -0.2]))
    values = long_term_values(log_q, rollout, batch)
    (gradient,) = torch.autograd.grad(values.sum(), log_q)
    assert gradient.tolist() == pytest.approx([MAX_IMPORTANCE * MAX_LOG_RATIO, 0.0])


def test_a_token_outside_the_students_vocabulary_has_no_weight() -> None:
    batch = make_batch([2, 0], owner=[0, 0], offset=[0, 1])
    logits = torch.zeros(2, 2, requires_grad=True)
    probs = torch.tensor([[0.2, 0.2, 0.6], [0.5, 0.3, 0.2]])
    rollout = RolloutTargets.from_dense(
        Targets(probs, torch.ones(2, dtype=torch.bool)), batch, torch.tensor([-1.0, -0.7])
    )
    result = loss(StudentOutput(logits, torch.tensor([0, 1]), SIZE), rollout, batch, preset("minillm"))
    (gradient,) = torch.autograd.grad(result.loss, logits)
    assert bool(gradient.isfinite().all())
    assert bool(result.values.isfinite().all())
