"""The loop: it learns, stops where it should, goes on where it was, and says what went wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from redraft.errors import ConfigError
from redraft_training.distill import trainer
from redraft_training.distill.errors import CheckpointMismatch, NothingToTrain, TrainingDiverged
from redraft_training.distill.metrics import MetricsRow
from redraft_training.distill.settings import DistillSettings
from redraft_training.objectives.objective import Objective
from redraft_training.objectives.presets import preset
from redraft_training.objectives.targets import Targets
from tests.unit.training.distill_runs import Parts, assert_equal, load_student, parameters, plan, save_draft, teacher


class Interrupted(Exception):
    pass


def interrupt_at(step: int) -> Any:
    def stop(row: MetricsRow) -> None:
        if row.step == step:
            raise Interrupted

    return stop


def timeless(history: tuple[MetricsRow, ...]) -> list[str]:
    return [repr(replace(row, tokens_per_s=0.0, seconds=0.0)) for row in history]


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_draft(tmp_path_factory.mktemp("draft"))


def test_training_raises_acceptance_and_writes_the_best_draft(draft: Path, tmp_path: Path) -> None:
    untrained = Parts.make(draft, epochs=1, learning_rate=1e-12, max_tokens=1).run(tmp_path / "untrained").best_alpha
    parts = Parts.make(draft, train_examples=120, checkpoint_every_batches=10)
    frozen = parts.student.model.get_input_embeddings().weight.detach().clone()
    result = parts.run(tmp_path / "out")

    scores = [row.heldout_alpha for row in result.history if not math.isnan(row.heldout_alpha)]
    assert result.history[-1].loss < 0.7 * result.history[0].loss
    assert result.best_alpha == pytest.approx(max(scores), rel=1e-6)
    assert result.best_alpha > untrained + 0.03
    assert result.stopped == "completed"
    assert [row.step for row in result.history] == list(range(1, result.steps + 1))
    assert result.tokens == result.history[-1].tokens > 0

    # what was written is what the student now holds, and reloads to the same numbers
    reloaded = load_student(result.draft)
    assert_equal(parameters(reloaded), parameters(parts.student))
    assert torch.equal(parts.student.model.get_input_embeddings().weight, frozen)
    again = Parts.make(draft, epochs=1, learning_rate=1e-12, max_tokens=1)
    again.student = reloaded
    assert again.run(tmp_path / "again").best_alpha == pytest.approx(result.best_alpha, rel=1e-5)


def test_an_interrupted_run_goes_on_to_the_same_parameters(draft: Path, tmp_path: Path) -> None:
    straight = Parts.make(draft, accumulation=2)
    expected = straight.run(tmp_path / "straight")

    for step in (3, 5):  # before and after the first checkpoints, in different epochs
        resumed = Parts.make(draft, accumulation=2)
        with pytest.raises(Interrupted):
            resumed.run(tmp_path / "resumed", on_progress=interrupt_at(step))
    resumed = Parts.make(draft, accumulation=2)
    torch.manual_seed(123)  # the caller's random state must not matter
    result = resumed.run(tmp_path / "resumed")

    assert_equal(parameters(resumed.student), parameters(straight.student))
    assert timeless(result.history) == timeless(expected.history)
    assert (result.best_step, result.best_alpha, result.tokens) == (
        expected.best_step,
        expected.best_alpha,
        expected.tokens,
    )


def test_a_finished_run_is_not_repeated(draft: Path, tmp_path: Path) -> None:
    first = Parts.make(draft)
    result = first.run(tmp_path)
    rows: list[MetricsRow] = []
    again = Parts.make(draft)
    repeated = again.run(tmp_path, on_progress=rows.append)
    assert rows == []
    assert replace(repeated, history=()) == replace(result, history=())
    assert repr(repeated.history) == repr(result.history)
    assert_equal(parameters(again.student), parameters(first.student))
    # unless asked to
    Parts.make(draft).run(tmp_path, on_progress=rows.append, resume=False)
    assert len(rows) == result.steps


@pytest.mark.parametrize("change", ["settings", "data", "parent"])
def test_a_checkpoint_of_something_else_is_refused(draft: Path, tmp_path: Path, change: str) -> None:
    with pytest.raises(Interrupted):
        Parts.make(draft).run(tmp_path, on_progress=interrupt_at(6))
    other = Parts.make(draft)
    if change == "settings":
        other.settings = other.settings.model_copy(update={"learning_rate": 1e-2})
    elif change == "data":
        other.plan = plan(30, seed=5)
    else:
        with torch.no_grad():
            next(p for p in other.student.model.parameters() if p.requires_grad).add_(1e-3)
    expected = {"settings": "other settings .learning_rate", "data": "training data", "parent": "parent draft"}[change]
    with pytest.raises(CheckpointMismatch, match=expected):
        other.run(tmp_path)


def test_how_a_run_is_watched_may_change_on_resume(draft: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        Parts.make(draft).run(tmp_path, on_progress=interrupt_at(6))
    rows: list[MetricsRow] = []
    Parts.make(draft, checkpoint_every_batches=7).run(tmp_path, on_progress=rows.append)
    assert rows[0].step == 5  # after the checkpoint of step 4


def test_it_stops_when_nothing_improves(draft: Path, tmp_path: Path) -> None:
    # so small a learning rate that the score cannot change
    parts = Parts.make(draft, epochs=50, learning_rate=1e-12, patience=2, checkpoint_every_batches=2)
    result = parts.run(tmp_path)
    assert result.stopped == "no_improvement"
    assert result.steps == 6
    assert result.best_step == 2


def test_it_stops_at_max_tokens(draft: Path, tmp_path: Path) -> None:
    result = Parts.make(draft, epochs=50, max_tokens=700).run(tmp_path)
    assert result.stopped == "max_tokens"
    assert 700 <= result.tokens < 800
    assert result.history[-1].learning_rate < 0.1 * max(row.learning_rate for row in result.history)


def test_max_minutes_ends_a_session_that_the_next_continues(draft: Path, tmp_path: Path) -> None:
    def parts(**settings: Any) -> Parts:
        made = Parts.make(draft, **settings)
        made.heldout = None  # else the end of the session is scored too, and may be the best
        return made

    result = parts(max_minutes=1e-9).run(tmp_path)
    assert (result.stopped, result.steps) == ("max_minutes", 1)
    assert math.isnan(result.best_alpha)
    assert load_student(result.draft)
    straight, resumed = parts(), parts()
    straight.run(tmp_path / "straight")
    assert resumed.run(tmp_path).stopped == "completed"
    assert_equal(parameters(resumed.student), parameters(straight.student))


class BrokenTeacher:
    """NaN from some call on."""

    def __init__(self, teacher: Any, calls: int) -> None:
        self._teacher, self._calls = teacher, calls

    def targets(self, batch: Any, *, temperature: float | None = None) -> Targets:
        self._calls -= 1
        targets: Targets = self._teacher.targets(batch, temperature=temperature)
        return targets if self._calls > 0 else replace(targets, probs=targets.probs * math.nan)


def test_divergence_is_named_and_leaves_the_last_checkpoint(draft: Path, tmp_path: Path) -> None:
    broken = Parts.make(draft)
    broken.heldout = None
    before = parameters(broken.student)
    broken.teacher = BrokenTeacher(broken.teacher, 0)
    with pytest.raises(TrainingDiverged, match="lower the learning rate"):
        broken.run(tmp_path / "at once")
    assert_equal(parameters(broken.student), before)  # the bad step was not taken

    later = Parts.make(draft)
    later.heldout = None
    later.teacher = BrokenTeacher(later.teacher, 6)
    with pytest.raises(TrainingDiverged, match="step"):
        later.run(tmp_path / "later")
    straight = Parts.make(draft)
    straight.heldout = None
    straight.run(tmp_path / "straight")
    repaired = Parts.make(draft)
    repaired.heldout = None
    repaired.run(tmp_path / "later")
    assert_equal(parameters(repaired.student), parameters(straight.student))


def test_nothing_to_train_is_said(draft: Path, tmp_path: Path) -> None:
    empty = Parts.make(draft)
    empty.plan = plan(0)
    with pytest.raises(NothingToTrain, match="no training batch"):
        empty.run(tmp_path)
    frozen = Parts.make(draft)
    frozen.student.model.requires_grad_(False)
    with pytest.raises(NothingToTrain, match="trainable"):
        frozen.run(tmp_path)
    no_rollouts = Parts.make(draft, objective=preset("minillm"))
    with pytest.raises(ConfigError, match="rollout"):
        no_rollouts.run(tmp_path)


@pytest.mark.parametrize("name", ["word_kd", "sequence_kd", "gkd", "distillspec", "rkd", "lk"])
def test_every_objective_trains_through_the_loop(draft: Path, tmp_path: Path, name: str) -> None:
    objective = preset(name)
    parts = Parts.make(draft, objective=objective, epochs=5)
    parts.teacher = teacher(objective.target_layers)
    result = parts.run(tmp_path)
    fifth = len(result.history) // 5
    first, last = ([row.loss for row in part] for part in (result.history[:fifth], result.history[-fifth:]))
    assert sum(last) < 0.9 * sum(first)
    assert 0.0 < result.best_alpha < 1.0


def test_text_alone_trains_without_a_teacher(draft: Path, tmp_path: Path) -> None:
    parts = Parts.make(draft, objective=preset("sequence_kd"), epochs=4)
    parts.teacher = None
    result = parts.run(tmp_path)
    assert result.history[-1].loss < result.history[0].loss
    assert 0.0 <= result.best_alpha <= 1.0  # of the greedy requests


def test_features_projection_is_trained_and_resumed(draft: Path, tmp_path: Path) -> None:
    def parts() -> Parts:
        made = Parts.make(draft, objective=preset("fitnets"))
        made.teacher = teacher(made.settings.objective.target_layers)
        return made

    straight = parts()
    straight.run(tmp_path / "straight")
    with pytest.raises(Interrupted):
        parts().run(tmp_path / "resumed", on_progress=interrupt_at(6))
    resumed = parts()
    result = resumed.run(tmp_path / "resumed")
    assert_equal(parameters(resumed.student), parameters(straight.student))
    assert "head" not in " ".join(path.name for path in result.draft.iterdir())


def test_the_gradient_is_clipped_and_the_rate_follows_its_curve(draft: Path, tmp_path: Path) -> None:
    result = Parts.make(draft, warmup_share=0.3, learning_rate=2e-3).run(tmp_path)
    rates = [row.learning_rate for row in result.history]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[0] < rates[peak] <= 2e-3
    assert rates[-1] < 0.1 * rates[peak]
    assert 0.2 < peak / len(rates) < 0.4


def test_the_rate_is_chosen_by_what_the_draft_can_do(
    draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its expected acceptance is 0.46 here, of 40 ids; a run that goes on keeps the rate it began with."""

    def peak(threshold: float, output: str, **options: Any) -> float:
        monkeypatch.setattr(trainer, "_LEARNT_ALPHA", threshold)
        parts = Parts.make(draft, learning_rate=None, train_examples=60, warmup_share=0.0)
        return max(row.learning_rate for row in parts.run(tmp_path / output, **options).history)

    assert peak(0.6, "newborn") == pytest.approx(1e-3, rel=0.05)
    assert peak(0.4, "learnt") == pytest.approx(4e-4, rel=0.05)
    with pytest.raises(Interrupted):
        peak(0.4, "killed", on_progress=interrupt_at(6))
    assert peak(0.6, "killed") == pytest.approx(4e-4, rel=0.05)


def test_settings_are_checked() -> None:
    for wrong in ({"epochs": 0}, {"learning_rate": 0.0}, {"warmup_share": 1.0}, {"unknown": 1}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DistillSettings(**wrong)
    identity = DistillSettings(objective=Objective(how="tv")).identity()
    assert identity["objective"]["how"] == "tv"
    assert "patience" not in identity
