"""Objectives as settings, the presets by name, and what each asks of a teacher."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from redraft.errors import ConfigError
from redraft_training.dataset.batch import Batch
from redraft_training.objectives.objective import Objective
from redraft_training.objectives.presets import PRESETS, preset
from redraft_training.objectives.supervision import merged, supervision
from redraft_training.objectives.targets import Targets
from tests.unit.training.objective_cases import GREEDY, SAMPLED, VOCAB, dense, make_batch, random_probs, sparse


class FakeTeacher:
    """Answers with other probabilities at every temperature, and notes what it was asked."""

    def __init__(self, *, is_sparse: bool) -> None:
        self.is_sparse = is_sparse
        self.asked: list[float | None] = []

    def targets(self, batch: Batch, *, temperature: float | None = None) -> Targets:
        self.asked.append(temperature)
        probs = random_probs(batch.num_positions, seed=int(10 * (temperature or 0.0)))
        return sparse(probs, 3 if temperature is None else 5) if self.is_sparse else dense(probs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 1.0}, "beta"),
        ({"temperature": 0.0}, "temperature"),
        ({"on_policy_fraction": 1.5}, "on_policy_fraction"),
        ({"how": "wasserstein"}, "how"),
        ({"what": "sequences", "on_policy_fraction": 0.5}, "must be 0"),
        ({"how": "policy_gradient"}, "rollout"),
        ({"how": "policy_gradient", "what": "sequences"}, "what=logits"),
        ({"what": "relations", "hidden_layers": ()}, "hidden_layers"),
        ({"divergence": "jsd"}, "divergence"),
    ],
)
def test_contradictions_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Objective.model_validate(settings)


def test_presets_have_names_and_can_be_overridden() -> None:
    expected = {"word_kd", "sequence_kd", "gkd", "distillspec", "minillm", "fitnets", "rkd", "lk"}
    assert set(PRESETS) == expected
    assert len({str(objective) for objective in PRESETS.values()}) == len(expected)
    overridden = Objective.model_validate({**preset("gkd").model_dump(), "how": "reverse_kl"})
    assert (overridden.how, overridden.on_policy_fraction) == ("reverse_kl", 0.5)
    for objective in PRESETS.values():
        assert Objective.model_validate_json(objective.model_dump_json()) == objective
    with pytest.raises(ConfigError, match="word_kd"):
        preset("hinton")


def test_layers_are_asked_for_only_where_hidden_states_are_used() -> None:
    pairs = ((2, 10), (4, 30))
    assert Objective(what="features", hidden_layers=pairs).draft_layers == (2, 4)
    assert Objective(what="relations", hidden_layers=pairs).target_layers == (10, 30)
    assert Objective(what="logits", hidden_layers=pairs).draft_layers == ()


def test_sequences_ask_no_teacher_and_others_say_that_they_need_one() -> None:
    batch = make_batch([4, -1])
    targets = supervision(None, batch, preset("sequence_kd"))
    assert targets.known.tolist() == [True, False]
    assert targets.ids is not None
    assert (targets.ids[0].tolist(), targets.probs[:, 0].tolist()) == ([4], [1.0, 0.0])
    with pytest.raises(ConfigError, match="what=sequences"):
        supervision(None, batch, preset("gkd"))


@pytest.mark.parametrize("is_sparse", [False, True])
def test_temperatures_that_a_teacher_is_asked_for(is_sparse: bool) -> None:
    def asked(objective: Objective, batch: Batch) -> list[float | None]:
        teacher = FakeTeacher(is_sparse=is_sparse)
        supervision(teacher, batch, objective)
        return teacher.asked

    mixed = make_batch([1, 2], rows=[GREEDY, SAMPLED])
    assert asked(Objective(temperature=3.0), mixed) == [3.0]
    assert asked(Objective(greedy_targets="hard"), mixed) == [None]
    assert asked(Objective(), make_batch([1, 2])) == [None]
    assert asked(Objective(), make_batch([1, 2], rows=[GREEDY, GREEDY])) == [1.0]
    assert sorted(map(str, asked(Objective(), mixed))) == ["1.0", "None"]


@pytest.mark.parametrize("is_sparse", [False, True])
def test_soft_targets_replace_only_the_greedy_rows(is_sparse: bool) -> None:
    teacher, batch = FakeTeacher(is_sparse=is_sparse), make_batch([1, 2, 3], rows=[SAMPLED, GREEDY, SAMPLED])
    own, soft = teacher.targets(batch), teacher.targets(batch, temperature=1.0)
    targets = supervision(teacher, batch, Objective())

    def spread(given: Targets) -> torch.Tensor:
        """As a row over the whole vocabulary."""
        if given.ids is None:
            return given.probs
        return torch.zeros(3, VOCAB).scatter_add(1, given.ids, given.probs)

    expected = torch.stack([spread(own)[0], spread(soft)[1], spread(own)[2]])
    torch.testing.assert_close(spread(targets), expected)
    if is_sparse:
        assert targets.tail is not None
        torch.testing.assert_close(targets.probs.sum(dim=1) + targets.tail, torch.ones(3))


def test_merging_keeps_who_is_known_and_what_was_drawn() -> None:
    probs = random_probs(2, 0)
    own, other = sparse(probs, 2, [11, 11]), sparse(probs, 3)
    chosen = merged(own, other, torch.tensor([False, True]))
    assert own.tail_ids is not None
    assert chosen.tail_ids is not None
    assert chosen.tail_ids.tolist() == [own.tail_ids[0].item(), -1]
