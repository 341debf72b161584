"""Rollouts: the student's own text, at the requests' parameters, the same whenever it is written again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from redraft.models.draft_vocab import DraftVocab
from redraft.models.runner import ModelRunner
from redraft_training.dataset.batch import Batch
from redraft_training.distill.errors import TrainingError
from redraft_training.distill.rollout import StudentRollouts
from redraft_training.objectives.objective import Objective
from redraft_training.objectives.policy_gradient import RolloutTargets
from redraft_training.objectives.presets import preset
from redraft_training.student.student_model import HFStudent
from tests.fakes import EOS_ID, tiny_model
from tests.unit.training.distill_runs import (
    PACK,
    VOCAB,
    Parts,
    assert_equal,
    load_student,
    parameters,
    plan,
    save_draft,
    teacher,
)

ON_POLICY = Objective(how="jsd", on_policy_fraction=0.5, on_policy_source="rollout")


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_draft(tmp_path_factory.mktemp("draft"))


def rollouts(student: HFStudent, objective: Objective = ON_POLICY, **options: Any) -> StudentRollouts:
    defaults: dict[str, Any] = {"max_new_tokens": 8, "seed": 3, "pack": PACK}
    return StudentRollouts(
        student, teacher(), objective, vocab_size=VOCAB, end_token_ids=(EOS_ID,), **{**defaults, **options}
    )


def first_batch() -> Batch:
    return next(plan(30).batches(0))


def test_greedy_rollouts_are_the_students_own_greedy_text(draft: Path) -> None:
    student = load_student(draft)
    batch = first_batch()
    written = rollouts(student).examples(batch, 0, 0)
    assert [made.prompt_token_ids for made in written] == [logged.prompt_token_ids for logged in batch.examples]
    reference = tiny_model("llama", layers=2)
    reference.model.layers = reference.model.layers[:1]  # the draft, by transformers' own code
    checked = 0
    for made, logged in zip(written, batch.examples, strict=True):
        assert 1 <= len(made.output_token_ids) <= min(8, len(logged.output_token_ids))
        assert made.params == logged.params
        assert made.labels == (None,) * len(made.output_token_ids)
        assert EOS_ID not in made.output_token_ids[:-1]
        if made.params.is_greedy:
            ids = (*made.prompt_token_ids, *made.output_token_ids)
            logits = reference(torch.tensor([ids]), use_cache=False).logits[0, len(made.prompt_token_ids) - 1 : -1]
            assert logits.argmax(1).tolist() == list(made.output_token_ids)
            checked += 1
    assert checked >= 2


def test_rollouts_are_a_function_of_the_students_parameters_and_the_key(draft: Path) -> None:
    student = load_student(draft)
    before = parameters(student)
    batch = first_batch()
    first = rollouts(student).examples(batch, 1, 5)
    torch.manual_seed(99)
    assert rollouts(student).examples(batch, 1, 5) == first
    assert rollouts(student).examples(batch, 1, 6) != first
    assert rollouts(student, seed=4).examples(batch, 1, 5) != first
    assert_equal(parameters(student), before)
    assert all(
        p.requires_grad == ("embed" not in n and "lm_head" not in n) for n, p in student.model.named_parameters()
    )
    # the student can go on training: its forward pass is as it was
    assert student(batch).logits.requires_grad
    with torch.no_grad():
        for parameter in student.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    assert rollouts(student).examples(batch, 1, 5) != first


def test_the_share_of_batches_is_lambda(draft: Path) -> None:
    student = load_student(draft)
    for share in (0.0, 0.3, 1.0):
        own = rollouts(student, Objective(on_policy_fraction=share, on_policy_source="rollout"))
        chosen = [own.replaces(epoch, index) for epoch in range(4) for index in range(500)]
        assert sum(chosen) / len(chosen) == pytest.approx(share, abs=0.04)


def test_a_reduced_vocabulary_stays_within_it(draft: Path) -> None:
    ids = tuple(range(0, VOCAB, 2))
    student = load_student(draft, vocab=DraftVocab(ids))
    written = rollouts(student).examples(first_batch(), 0, 0)
    assert {token for made in written for token in made.output_token_ids} <= set(ids)


@pytest.mark.parametrize("mixing", [False, True])
def test_policy_gradient_knows_how_its_tokens_were_drawn(draft: Path, mixing: bool) -> None:
    """Behaviour probabilities against both models run by transformers."""
    student, objective = load_student(draft), preset("minillm")
    runner = ModelRunner(tiny_model("llama", layers=2), num_blocks=64, block_size=16, vocab_size=VOCAB)
    own = rollouts(student, objective, teacher_runner=runner if mixing else None)
    batch = own.batch(first_batch(), 0, 0)
    targets = own.targets(batch)
    assert isinstance(targets, RolloutTargets)
    share = objective.teacher_mixing if mixing else 0.0
    target, reduced = tiny_model("llama", layers=2), tiny_model("llama", layers=2)
    reduced.model.layers = reduced.model.layers[:1]
    for position in range(batch.num_positions):
        example, offset = batch.examples[batch.owner[position]], int(batch.offset[position])
        prefix = torch.tensor([[*example.prompt_token_ids, *example.output_token_ids[:offset]]])
        p, q = (m(prefix, use_cache=False).logits[0, -1].softmax(0) for m in (target, reduced))
        drawn = example.output_token_ids[offset]
        expected = (share * p[drawn] + (1 - share) * q[drawn]).log()
        assert float(targets.behaviour_log_probs[position]) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("objective", [ON_POLICY, preset("minillm")], ids=["gkd", "minillm"])
def test_a_run_on_rollouts_is_resumed_exactly(draft: Path, tmp_path: Path, objective: Objective) -> None:
    def parts() -> Parts:
        return Parts.make(draft, train_examples=16, objective=objective, checkpoint_every_batches=2)

    def stop(row: Any) -> None:
        if row.step == 5:
            raise TrainingError("stop")

    straight, killed, resumed = parts(), parts(), parts()
    result = straight.run(tmp_path / "straight", rollouts=rollouts(straight.student, objective))
    with pytest.raises(TrainingError, match="stop"):
        killed.run(tmp_path / "resumed", rollouts=rollouts(killed.student, objective), on_progress=stop)
    resumed.run(tmp_path / "resumed", rollouts=rollouts(resumed.student, objective))
    assert_equal(parameters(resumed.student), parameters(straight.student))
    assert result.steps > 5
