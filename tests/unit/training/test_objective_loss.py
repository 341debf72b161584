"""`loss`: dense and sparse targets agree, tails are unbiased, and each setting does what its name says."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
from torch import Tensor

from redraft.errors import ConfigError
from redraft.sampling import divergence
from redraft.sampling.params import SamplingParams
from redraft.sampling.processors import SamplingRow, probabilities
from redraft_training.objectives.loss import LossResult, loss
from redraft_training.objectives.objective import How, Objective
from redraft_training.objectives.presets import preset
from redraft_training.objectives.supervision import hard_targets
from redraft_training.objectives.targets import Targets
from tests.unit.training.objective_cases import (
    GREEDY,
    SAMPLED,
    VOCAB,
    WARM,
    dense,
    make_batch,
    random_logits,
    random_probs,
    sparse,
    student,
)

DIVERGENCES = [how for how in get_args(How) if how != "policy_gradient"]


def run(
    logits: Tensor, targets: Targets, objective: Objective, vocab_ids: Tensor | None = None, **batch: object
) -> tuple[LossResult, Tensor]:
    """The result, and the loss's gradient at the logits."""
    next_ids = batch.pop("next_ids", [-1] * len(logits))
    made = make_batch(next_ids, **batch)  # type: ignore[arg-type]
    leaf = logits.detach().clone().requires_grad_()
    result = loss(student(leaf, vocab_ids), targets, made, objective)
    (gradient,) = torch.autograd.grad(result.loss, leaf)
    return result, gradient


def same(one: tuple[LossResult, Tensor], other: tuple[LossResult, Tensor]) -> None:
    torch.testing.assert_close(one[0].values, other[0].values, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(one[0].alpha, other[0].alpha, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(one[1], other[1], atol=2e-6, rtol=1e-5)


# ---- dense against sparse


@pytest.mark.parametrize("temperature", [None, 2.0])
@pytest.mark.parametrize("how", DIVERGENCES)
def test_sparse_with_every_id_is_dense(how: How, temperature: float | None) -> None:
    probs, logits = random_probs(5, 0), random_logits(5, 1)
    objective = Objective(how=how, temperature=temperature)
    rows = [SAMPLED, WARM, SAMPLED, WARM, WARM]
    same(
        run(logits, sparse(probs, VOCAB, padding=2), objective, rows=rows),
        run(logits, dense(probs), objective, rows=rows),
    )


@pytest.mark.parametrize("how", DIVERGENCES)
def test_sparse_is_dense_where_the_request_cuts_the_target(how: How) -> None:
    rows = [SamplingRow(SamplingParams(temperature=0.8, top_k=4)), GREEDY, SamplingRow(SamplingParams(top_p=0.7))]
    probs, logits = probabilities(random_logits(3, 2).detach(), rows), random_logits(3, 3)
    objective = Objective(how=how, greedy_targets="hard")
    assert int((probs > 0).sum(dim=1).max()) <= 6
    same(run(logits, sparse(probs, 6), objective, rows=rows), run(logits, dense(probs), objective, rows=rows))


@pytest.mark.parametrize("how", DIVERGENCES)
def test_sparse_is_dense_with_a_reduced_vocabulary(how: How) -> None:
    vocab_ids = torch.tensor([1, 2, 5, 6, 9, 11])
    probs, logits = random_probs(4, 4), random_logits(4, 5, width=6)
    objective = Objective(how=how)
    one = run(logits, sparse(probs, VOCAB), objective, vocab_ids)
    other = run(logits, dense(probs), objective, vocab_ids)
    # with all ids listed the missing ones are single atoms here and one merged atom there: same loss but for a constant
    torch.testing.assert_close(one[1], other[1], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(one[0].alpha, other[0].alpha)
    missing = 1.0 - float(probs[:, vocab_ids].sum(dim=1).mean())
    assert one[0].metrics["unreachable_mass"] == pytest.approx(missing, abs=1e-5)
    assert other[0].metrics["unreachable_mass"] == pytest.approx(missing, abs=1e-5)


@pytest.mark.parametrize("how", [how for how in DIVERGENCES if how != "lk"])
def test_gradient_matches_finite_differences(how: How) -> None:
    """Through temperature, the sparse log-softmax and its tail; the draw included. Not `lk`: its blend's weight moves
    with the logits but is a constant for the gradient."""
    probs, logits = random_probs(2, 6), random_logits(2, 7).detach()
    drawn = [int(probs[0].argmin()), int(probs[1].argmin())]
    targets, objective, rows = sparse(probs, 4, drawn), Objective(how=how), [WARM, SAMPLED]
    _, gradient = run(logits, targets, objective, next_ids=drawn, rows=rows)
    direction = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(8))
    step = 2e-3

    def at(shift: float) -> float:
        return float(run(logits + shift * direction, targets, objective, next_ids=drawn, rows=rows)[0].loss.detach())

    measured = (at(step) - at(-step)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(measured, abs=2e-3)


# ---- the tail


def test_forward_kl_on_captured_ids_has_the_full_gradient_in_expectation() -> None:
    """One row per possible emitted token, weighted by its probability: exact expectation."""
    probs, logits = random_probs(1, 9), random_logits(1, 10).detach()
    _, full = run(logits, dense(probs), Objective())

    def expected(objective: Objective, vocab_ids: Tensor | None = None, given: Tensor = logits) -> Tensor:
        rows = [
            run(given, sparse(probs, 3, [token]), objective, vocab_ids, next_ids=[token])[1] * probs[0, token]
            for token in range(VOCAB)
        ]
        return torch.stack(rows).sum(dim=0)

    torch.testing.assert_close(expected(Objective()), full, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(expected(Objective(how="cross_entropy")), full, atol=2e-6, rtol=1e-5)

    vocab_ids = torch.tensor([0, 3, 4, 7, 8, 10, 11])
    reduced = logits[:, vocab_ids]
    _, full_reduced = run(reduced, dense(probs), Objective(), vocab_ids)
    torch.testing.assert_close(expected(Objective(), vocab_ids, reduced), full_reduced, atol=2e-6, rtol=1e-5)

    _, undrawn = run(logits, sparse(probs, 3), Objective())  # off the path nothing was emitted
    assert float((undrawn - full).norm()) > 0.01


def test_emitted_token_is_no_draw_at_another_temperature_or_for_a_greedy_request() -> None:
    probs, logits = random_probs(1, 11), random_logits(1, 12)
    token = [int(probs.argmin())]
    for objective, row in ((Objective(temperature=2.0), SAMPLED), (Objective(), GREEDY)):
        with_token = run(logits, sparse(probs, 3, token), objective, next_ids=token, rows=[row])
        without = run(logits, sparse(probs, 3), objective, next_ids=token, rows=[row])
        torch.testing.assert_close(with_token[1], without[1])
    drawn = run(logits, sparse(probs, 3, token), Objective(), next_ids=token)
    assert float((drawn[1] - run(logits, sparse(probs, 3), Objective(), next_ids=token)[1]).norm()) > 0.1


def test_tokens_of_a_rollout_are_no_draws_of_the_target() -> None:
    probs, logits = random_probs(1, 38), random_logits(1, 39)
    token = [int(probs.argmin())]
    rollouts = Objective(on_policy_fraction=1.0, on_policy_source="rollout")
    with_token = run(logits, sparse(probs, 3, token), rollouts, next_ids=token)
    torch.testing.assert_close(with_token[1], run(logits, sparse(probs, 3), rollouts, next_ids=token)[1])


def test_alpha_of_sparse_targets_is_a_lower_bound_with_known_slack() -> None:
    probs, logits = random_probs(6, 13), random_logits(6, 14)
    truth = run(logits, dense(probs), Objective())[0]
    seen = run(logits, sparse(probs, 4), Objective())[0]
    assert bool((seen.alpha < truth.alpha).all())
    assert float(truth.alpha.mean()) <= float(seen.alpha.mean()) + seen.metrics["alpha_slack"]
    expected = torch.minimum(probs, logits.softmax(dim=1)).sum(dim=1)
    torch.testing.assert_close(truth.alpha, expected)
    assert truth.metrics["alpha_slack"] == 0.0


# ---- temperature and greedy requests


def test_fixed_temperature_is_hintons() -> None:
    """On both sides, the request's parameters ignored, and the gradient scaled back by its square."""
    raw, logits = random_logits(3, 15).detach(), random_logits(3, 16)
    rows = [GREEDY, WARM, SamplingRow(SamplingParams(repetition_penalty=2.0), (1, 2))]
    probs = (raw / 4.0).softmax(dim=1)
    result, gradient = run(logits, dense(probs), Objective(temperature=4.0), rows=rows)
    log_q = (logits / 4.0).log_softmax(dim=1)
    torch.testing.assert_close(result.values, 16.0 * divergence.forward_kl(probs, log_q).detach())
    torch.testing.assert_close(gradient, 4.0 * (log_q.exp() - probs).detach() / 3)


def test_request_temperature_divides_the_students_logits() -> None:
    probs, logits = random_probs(2, 17), random_logits(2, 18)
    result, _ = run(logits, dense(probs), Objective(), rows=[WARM, SAMPLED])
    log_q = torch.stack([(logits[0] / 0.7).log_softmax(0), logits[1].log_softmax(0)])
    torch.testing.assert_close(result.values, divergence.forward_kl(probs, log_q).detach())


def test_greedy_alpha_is_agreement_whatever_the_loss() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0]])
    probs = torch.tensor([[0.1, 0.6, 0.3], [0.1, 0.3, 0.6]])
    for targets in (dense(probs), sparse(probs, 2)):
        result, _ = run(logits, targets, Objective(), rows=[GREEDY, GREEDY])
        assert result.alpha.tolist() == [1.0, 0.0]


def test_greedy_token_that_was_not_captured_is_still_the_label() -> None:
    """Penalties can make the arg max a token that is not among the largest raw logits."""
    logits = random_logits(1, 37)
    uncaptured = Targets(
        probs=torch.zeros(1, 2),
        known=torch.tensor([True]),
        ids=torch.tensor([[3, 4]]),
        tail=torch.ones(1),
        tail_ids=torch.tensor([8]),
    )
    for token in (8, int(logits.argmax())):
        targets = dataclasses.replace(uncaptured, tail_ids=torch.tensor([token]))
        result, gradient = run(logits, targets, Objective(greedy_targets="hard"), next_ids=[token], rows=[GREEDY])
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor([token]))
        torch.testing.assert_close(result.loss, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
        assert result.alpha.item() == float(logits.argmax() == token)


# ---- what the settings tie together


def test_lambda_0_with_forward_kl_is_word_level_distillation() -> None:
    probs, logits = random_probs(4, 19), random_logits(4, 20)
    special = preset("gkd").model_copy(update={"how": "forward_kl", "on_policy_fraction": 0.0, "temperature": 1.0})
    depth = [0, 0, 1, 2]
    one, gradient = run(logits, dense(probs), special, depth=depth)
    other, expected = run(logits, dense(probs), preset("word_kd"), depth=depth)
    torch.testing.assert_close(one.loss, other.loss)
    torch.testing.assert_close(gradient, expected)
    kl = divergence.forward_kl(probs, logits.log_softmax(1))
    torch.testing.assert_close(one.loss, kl[:2].mean())
    assert gradient[2:].abs().max() == 0.0


def test_lambda_weighs_the_states_that_drafts_led_to() -> None:
    probs, logits = random_probs(4, 21), random_logits(4, 22)
    kl = divergence.forward_kl(probs, logits.log_softmax(1)).detach()
    depth = [0, 0, 1, 2]
    for fraction in (0.25, 1.0):
        result, _ = run(logits, dense(probs), Objective(on_policy_fraction=fraction), depth=depth)
        weights = torch.tensor([1.0, 1.0, fraction, fraction])
        torch.testing.assert_close(result.loss.detach(), (weights * kl).sum() / weights.sum())
        assert (result.num_positions, result.total_weight) == (4, float(weights.sum()))
    rollouts = Objective(on_policy_fraction=1.0, on_policy_source="rollout")
    assert run(logits, dense(probs), rollouts, depth=depth)[0].num_positions == 2


def test_positions_without_a_teacher_do_not_count() -> None:
    probs, logits = random_probs(3, 23), random_logits(3, 24)
    probs[1] = 0.0
    known = torch.tensor([True, False, True])
    for how in DIVERGENCES:
        objective = Objective(how=how)
        for targets in (dense(probs), sparse(probs, 4)):
            masked = dataclasses.replace(targets, known=known)
            result, gradient = run(logits, masked, objective)
            kept = dataclasses.replace(
                targets,
                probs=targets.probs[known],
                known=known[known],
                ids=None if targets.ids is None else targets.ids[known],
                tail=None if targets.tail is None else targets.tail[known],
                tail_ids=None if targets.tail_ids is None else targets.tail_ids[known],
            )
            expected, rows = run(logits[known], kept, objective)
            torch.testing.assert_close(result.loss, expected.loss)
            torch.testing.assert_close(gradient[known], rows)
            assert gradient[1].abs().max() == 0.0
            assert result.alpha.isnan().tolist() == [False, True, False]
            assert result.num_positions == 2


def test_nothing_known_gives_a_loss_of_zero_with_a_gradient() -> None:
    probs, logits = random_probs(2, 25), random_logits(2, 26)
    for targets in (dense(probs), sparse(probs, 3)):
        unknown = dataclasses.replace(targets, known=torch.zeros(2, dtype=torch.bool))
        result, gradient = run(logits, unknown, Objective(how="lk"))
        assert result.loss.item() == 0.0
        assert gradient.abs().max() == 0.0
        assert (result.num_positions, result.metrics) == (0, {})


def test_sequences_are_cross_entropy_on_the_text_and_need_no_teacher() -> None:
    logits = random_logits(4, 27)
    next_ids = [3, 0, -1, 7]
    batch = make_batch(next_ids, rows=[GREEDY, SAMPLED, SAMPLED, GREEDY], depth=[0, 0, 1, 0])
    result = loss(student(logits), hard_targets(batch), batch, preset("sequence_kd"))
    log_q = logits.log_softmax(1)
    expected = torch.stack([-log_q[0, 3], -log_q[1, 0], -log_q[3, 7]]).mean()
    torch.testing.assert_close(result.loss, expected)
    # a sampled token says nothing about p, a greedy one is its arg max
    assert result.alpha.isnan().tolist() == [False, True, True, False]
    assert result.alpha[0].item() == float(logits[0].argmax() == 3)


def test_hard_labels_outside_a_reduced_vocabulary_are_left_out() -> None:
    logits, vocab_ids = random_logits(2, 28, width=3), torch.tensor([2, 5, 9])
    batch = make_batch([5, 4])
    result = loss(student(logits, vocab_ids), hard_targets(batch), batch, preset("sequence_kd"))
    assert result.values.tolist() == pytest.approx([-logits.log_softmax(1)[0, 1].item(), 0.0])
    assert result.metrics["unreachable_mass"] == pytest.approx(0.5)


def test_lk_is_the_blend_at_the_batchs_acceptance() -> None:
    probs, logits = random_probs(3, 29), random_logits(3, 30)
    log_q = logits.log_softmax(1)
    alpha = divergence.expected_acceptance(probs, log_q.exp()).mean()
    weight = torch.exp(-3.0 * alpha)
    expected = weight * divergence.forward_kl(probs, log_q) + (1 - weight) * divergence.total_variation(probs, log_q)
    result, _ = run(logits, dense(probs), preset("lk"))
    torch.testing.assert_close(result.values, expected.detach())


def test_dense_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    probs, logits = random_probs(7, 31), random_logits(7, 32)
    whole = run(logits, dense(probs), preset("lk"))
    monkeypatch.setattr("redraft_training.objectives.rows.CHUNK_ELEMENTS", 3 * VOCAB)
    same(run(logits, dense(probs), preset("lk")), whole)


def test_evaluation_needs_no_gradient() -> None:
    probs, logits = random_probs(2, 33), random_logits(2, 34)
    with torch.no_grad():
        result = loss(student(logits), dense(probs), make_batch([-1, -1]), Objective())
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, divergence.forward_kl(probs, logits.log_softmax(1)).mean().detach())


def test_policy_gradient_refuses_logged_text() -> None:
    with pytest.raises(ConfigError, match="rollouts"):
        run(random_logits(2, 35), dense(random_probs(2, 36)), preset("minillm"))
