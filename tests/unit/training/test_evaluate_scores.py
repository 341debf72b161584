"""Teacher-forced α: against a forward pass per position, from either teacher, at the requests' own parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from redraft.models.draft_vocab import DraftVocab
from redraft.models.ref import ModelKind, ModelRef
from redraft.sampling.params import SamplingParams
from redraft.sampling.processors import SamplingRow, probabilities
from redraft_training.dataset.batch import Batch
from redraft_training.dataset.example import Branch, Example
from redraft_training.dataset.packing import PackSettings, pack
from redraft_training.dataset.teachers import CapturedTeacher, RerunTeacher
from redraft_training.evaluate.errors import NothingToScore
from redraft_training.evaluate.scores import DraftScores, position_buckets, score_drafts
from redraft_training.student.student import StudentOutput
from redraft_training.student.student_model import HFStudent
from tests.fakes import save_tiny, tiny_model
from tests.reference_decoding import plain_logits
from tests.unit.training.evaluate_examples import NUM_TOKENS, VOCAB, draft_scores, examples, scored

DRAFT_SEED = 11
GREEDY = SamplingParams(temperature=0.0)
TRUNCATED = SamplingParams(temperature=0.8, top_k=8, top_p=0.95)
PENALISED = SamplingParams(temperature=1.1, repetition_penalty=1.3, presence_penalty=0.4, logit_bias=((5, 2.0),))
PLAIN = SamplingParams(temperature=1.0)
MIXED = (GREEDY, TRUNCATED, PENALISED)
PACKING = PackSettings(row_tokens=64, batch_tokens=128, branches=False)


def student(path: Path, **options: object) -> HFStudent:
    save_tiny(path, vocab_size=VOCAB, seed=DRAFT_SEED)
    ref = ModelRef(ModelKind.DIRECTORY, str(path))
    return HFStudent.load(ref, progress=lambda _: None, **options)  # type: ignore[arg-type]


def rerun(seed: int = 0) -> RerunTeacher:
    return RerunTeacher(tiny_model("llama", vocab_size=VOCAB, seed=seed), vocab_size=VOCAB)


def score(one: object, held_out: list[Example], **teachers: object) -> DraftScores:
    batches = pack(held_out, PACKING)
    return score_drafts({"d": one}, batches, vocab_size=VOCAB, **teachers)["d"]  # type: ignore[dict-item, arg-type]


def reference(held_out: list[Example], allowed: tuple[int, ...] | None = None) -> list[list[float]]:
    """α of every position but the first by one forward pass of each model per example, nothing packed."""
    target, draft = (tiny_model("llama", vocab_size=VOCAB, seed=seed) for seed in (0, DRAFT_SEED))
    result = []
    for one in held_out:
        text = [*one.prompt_token_ids, *one.output_token_ids]
        first = len(one.prompt_token_ids)
        p_logits, q_logits = (plain_logits(model, text)[first:-1] for model in (target, draft))
        if allowed is not None:
            outside = [i for i in range(VOCAB) if i not in allowed]
            q_logits = q_logits.clone()
            q_logits[:, outside] = -torch.inf
        rows = [
            SamplingRow(one.params, one.prompt_token_ids, one.output_token_ids[:i])
            for i in range(1, len(one.output_token_ids))
        ]
        overlap = torch.minimum(probabilities(p_logits, rows), probabilities(q_logits, rows))
        result.append(overlap.sum(dim=1).tolist())
    return result


def assert_scores(found: DraftScores, held_out: list[Example], expected: list[list[float]]) -> None:
    by_id = {score.request_id: score for score in found.examples}
    assert sorted(by_id) == sorted(one.request_id for one in held_out)
    for one, own in zip(held_out, expected, strict=True):
        alpha = by_id[one.request_id].alpha
        assert np.isnan(alpha[0]), "the step that ends the prefill drafts nothing"
        np.testing.assert_allclose(alpha[1:], own, atol=1e-5)
        assert by_id[one.request_id].domain == one.domain


def test_rerun_equals_a_forward_pass_per_position(tmp_path: Path) -> None:
    held_out = examples(tiny_model("llama", vocab_size=VOCAB), MIXED)
    found = score(student(tmp_path / "d"), held_out, rerun=rerun())
    expected = reference(held_out)
    assert_scores(found, held_out, expected)
    assert 0.05 < np.mean(np.concatenate(expected)) < 0.95, "a test of nothing"
    assert (found.num_unscored, found.num_non_finite) == (0, 0)


def test_captured_labels_give_the_same_without_a_target(tmp_path: Path) -> None:
    held_out = examples(tiny_model("llama", vocab_size=VOCAB), (GREEDY, TRUNCATED), top_n=16)
    captured = score(student(tmp_path / "d"), held_out, captured=CapturedTeacher(VOCAB))
    assert captured.num_unscored == 0
    assert_scores(captured, held_out, reference(held_out))


def test_labels_that_are_not_exact_are_not_used(tmp_path: Path) -> None:
    """At temperature 1 four of 32 ids leave a tail: alone they score nothing, with the target at hand it is asked."""
    held_out = examples(tiny_model("llama", vocab_size=VOCAB), (PLAIN,), top_n=4)
    one, labels = student(tmp_path / "d"), CapturedTeacher(VOCAB)
    alone = score(one, held_out, captured=labels)
    assert alone.num_unscored == len(held_out) * (NUM_TOKENS - 1)
    with pytest.raises(NothingToScore):
        alone.overall()
    both = score(one, held_out, captured=labels, rerun=rerun())
    assert_scores(both, held_out, reference(held_out))


def test_at_temperature_0_alpha_is_the_share_of_agreeing_arg_maxes(tmp_path: Path) -> None:
    held_out = examples(tiny_model("llama", vocab_size=VOCAB), (GREEDY,))
    found = score(student(tmp_path / "d"), held_out, captured=CapturedTeacher(VOCAB))
    draft = tiny_model("llama", vocab_size=VOCAB, seed=DRAFT_SEED)
    agree = total = 0
    for one in held_out:
        logits = plain_logits(draft, [*one.prompt_token_ids, *one.output_token_ids])[len(one.prompt_token_ids) : -1]
        picks = logits.argmax(dim=1).tolist()
        agree += sum(a == b for a, b in zip(picks, one.output_token_ids[1:], strict=True))
        total += len(picks)
    assert found.overall().alpha == pytest.approx(agree / total)
    assert 0 < agree < total


def test_a_reduced_vocabulary_has_probability_0_elsewhere(tmp_path: Path) -> None:
    ids = tuple(range(0, VOCAB, 2))
    held_out = examples(tiny_model("llama", vocab_size=VOCAB), MIXED)
    found = score(student(tmp_path / "d", vocab=DraftVocab(ids)), held_out, rerun=rerun())
    assert_scores(found, held_out, reference(held_out, allowed=ids))


def test_the_target_itself_is_always_accepted(tmp_path: Path) -> None:
    held_out = examples(tiny_model("llama", vocab_size=VOCAB), MIXED)
    found = score(student(tmp_path / "d"), held_out, rerun=rerun(DRAFT_SEED))
    assert found.overall().alpha == pytest.approx(1.0, abs=1e-5)


def test_branches_change_nothing(tmp_path: Path) -> None:
    """What a rejected draft token leads to is no position at which the server tests a draft."""
    plain = examples(tiny_model("llama", vocab_size=VOCAB), MIXED)
    branched = [
        Example(
            e.request_id,
            e.sample_index,
            e.domain,
            e.created_unix_s,
            e.prompt_token_ids,
            e.output_token_ids,
            e.params,
            e.labels,
            (Branch(3, (7, 8), (None, None)),),
        )
        for e in plain
    ]
    settings = PackSettings(row_tokens=64, batch_tokens=128)
    found = score_drafts({"d": student(tmp_path / "d")}, pack(branched, settings), vocab_size=VOCAB, rerun=rerun())
    assert_scores(found["d"], plain, reference(plain))


class Broken:
    """A draft whose logits overflow everywhere, in training mode when it is handed over."""

    vocab_ids = None

    def __init__(self) -> None:
        self.model: nn.Module = nn.Linear(1, 1).train()
        self.modes: list[bool] = []

    def __call__(self, batch: Batch, *, hidden_layers: tuple[int, ...] = ()) -> StudentOutput:
        self.modes.append(self.model.training)
        logits: Tensor = torch.full((batch.num_positions, VOCAB), torch.nan)
        return StudentOutput(logits, None, VOCAB)

    def save(self, directory: Path) -> None:
        raise NotImplementedError


def test_logits_that_overflow_count_as_uniform_and_are_reported() -> None:
    held_out = examples(tiny_model("llama", vocab_size=VOCAB), (TRUNCATED,))
    broken = Broken()
    found = score(broken, held_out, rerun=rerun())
    assert found.num_non_finite == len(held_out) * (NUM_TOKENS - 1)
    for one in found.examples:  # at most 8 ids survive top-k, each overlapping by 1/32 at most
        assert (one.alpha[1:] <= 8 / VOCAB + 1e-6).all()
        assert (one.alpha[1:] > 0).all()
    assert set(broken.modes) == {False}, "dropout must be off while scoring"
    assert broken.model.training, "and on again afterwards"


def test_several_drafts_are_scored_on_one_pass_of_the_teacher(tmp_path: Path) -> None:
    held_out = examples(tiny_model("llama", vocab_size=VOCAB), MIXED)
    first, second = student(tmp_path / "a"), student(tmp_path / "b", vocab=DraftVocab((1, 2, 3)))

    class Counting:
        calls = 0

        def __init__(self) -> None:
            self.inner = rerun()

        def targets(self, batch: Batch, *, temperature: float | None = None) -> object:
            self.calls += 1
            return self.inner.targets(batch, temperature=temperature)

    teacher = Counting()
    batches = list(pack(held_out, PACKING))
    both = score_drafts({"a": first, "b": second}, batches, vocab_size=VOCAB, rerun=teacher)  # type: ignore[arg-type]
    assert teacher.calls == len(batches)
    assert both["a"].overall().alpha == pytest.approx(score(first, held_out, rerun=rerun()).overall().alpha)
    assert both["b"].overall().alpha < both["a"].overall().alpha


def test_aggregates_weigh_positions() -> None:
    found = draft_scores(
        "d",
        scored("a", [np.nan, 1.0, 0.5, 0.5, 0.0]),
        scored("b", [np.nan, 0.0], domain="chat"),
        scored("b", [np.nan, np.nan], domain="chat", sample_index=1),
    )
    overall = found.overall()
    assert (overall.alpha, overall.num_positions, overall.num_requests) == (0.4, 5, 2)
    assert {name: mean.alpha for name, mean in found.by_domain().items()} == {"chat": 0.0, "sql": 0.5}
    assert found.by_sampling()["greedy"].num_positions == 5
    by_position = found.by_position()
    assert {name: (mean.alpha, mean.num_requests) for name, mean in by_position.items()} == {
        "1": (0.5, 2),
        "2-3": (0.5, 1),
        "4-7": (0.0, 1),
    }
    assert found.num_unscored == 1


def test_position_buckets_cover_every_position_once() -> None:
    covered = [position for first, last in position_buckets(100) for position in range(first, last)]
    assert covered[:100] == list(range(1, 101))


def test_scoring_needs_a_teacher(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher"):
        score_drafts({}, [], vocab_size=VOCAB)
