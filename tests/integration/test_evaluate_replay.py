"""Replay through `speculative_step`: the target's text, and what teacher-forced scores say of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from redraft.models.ref import ModelKind, ModelRef
from redraft.models.runner import ModelRunner
from redraft.sampling.params import SamplingParams
from redraft.speculation.draft_model import DraftModelProposer
from redraft_training.dataset.example import Example
from redraft_training.dataset.packing import PackSettings, pack
from redraft_training.dataset.teachers import RerunTeacher
from redraft_training.evaluate.errors import NothingToScore
from redraft_training.evaluate.prediction import predict
from redraft_training.evaluate.replay import ReplayResult, ReplaySettings, replay
from redraft_training.evaluate.scores import score_drafts
from redraft_training.student.student_model import HFStudent
from tests.fakes import save_tiny, tiny_model
from tests.reference_decoding import make_runner, plain_decode

VOCAB = 32
DRAFT_SEED = 11
PROMPTS = [(3, 4, 5, 6, 7), (9, 8), (10, 11, 12, 10, 11, 12, 10), (4, 9, 4, 9, 4), (20, 21, 22), (7, 7, 7)]
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=1.2, top_k=12)
SETTINGS = ReplaySettings(num_speculative_tokens=3, max_new_tokens=24, batch_size=4, prefill_tokens=8)


def held_out(params: SamplingParams, copies: int = 1) -> list[Example]:
    """Prompts only: a replay does not look at the outputs."""
    return [
        Example(f"r{copy}-{i}", 0, ("sql", "chat")[i % 2], 0.0, prompt, (), params, ())
        for copy in range(copies)
        for i, prompt in enumerate(PROMPTS)
    ]


def run(examples: list[Example], settings: ReplaySettings = SETTINGS, draft_seed: int = DRAFT_SEED) -> ReplayResult:
    target, draft = (make_runner(tiny_model("llama", vocab_size=VOCAB, seed=seed)) for seed in (0, draft_seed))
    return replay(examples, target, DraftModelProposer(draft, version="d"), settings)


def check_identities(found: ReplayResult, k: int) -> None:
    assert found.num_output_tokens == found.accepted + found.verify_steps - found.truncated
    assert len(found.histogram) == k + 1
    assert sum(j * count for j, count in enumerate(found.histogram)) == found.accepted
    assert sum(depth.tested for depth in found.depths) == found.tested.tested
    for groups in (found.domains, found.positions):
        assert sum(group.tested for group in groups.values()) == found.tested.tested
        assert sum(group.accepted for group in groups.values()) == found.accepted


def test_greedy_replay_is_the_targets_text() -> None:
    found = run(held_out(GREEDY))
    model = tiny_model("llama", vocab_size=VOCAB)
    assert list(found.output_token_ids) == [tuple(plain_decode(model, prompt, GREEDY, 24)) for prompt in PROMPTS]
    check_identities(found, 3)
    assert 0 < found.accepted < found.drafted
    assert found.tested.expected_acceptance == found.tested.acceptance, "greedy: what is expected is what happens"


@pytest.mark.parametrize("k", [1, 3, 5])
def test_prediction_from_scores_is_exact_at_temperature_0(k: int, tmp_path: Path) -> None:
    """Teacher-forced α of the text, walked as the server walks it, gives every count of the replay."""
    found = run(held_out(GREEDY), replace(SETTINGS, num_speculative_tokens=k, prefill_tokens=64))
    texts = [
        replace(example, output_token_ids=output, labels=(None,) * len(output))
        for example, output in zip(held_out(GREEDY), found.output_token_ids, strict=True)
    ]
    save_tiny(tmp_path / "d", vocab_size=VOCAB, seed=DRAFT_SEED)
    student = HFStudent.load(ModelRef(ModelKind.DIRECTORY, str(tmp_path / "d")), progress=lambda _: None)
    teacher = RerunTeacher(tiny_model("llama", vocab_size=VOCAB), vocab_size=VOCAB)
    batches = pack(texts, PackSettings(row_tokens=64, batch_tokens=64, branches=False))
    scores = score_drafts({"d": student}, batches, vocab_size=VOCAB, rerun=teacher)["d"]
    predicted = predict(scores, k)
    assert predicted.verify_steps == found.verify_steps
    assert predicted.drafted == found.drafted
    assert predicted.histogram == tuple(map(float, found.histogram))
    assert predicted.accepted == tuple(float(depth.accepted) for depth in found.depths)
    assert predicted.tested == tuple(float(depth.tested) for depth in found.depths)
    assert predicted.mean_acceptance_length == pytest.approx(found.mean_acceptance_length)


def test_realised_acceptance_converges_to_the_expected_one() -> None:
    """Each tested draft is a coin with its own α; over many of them the counts must agree within 4.5 sigma."""
    found = run(held_out(SAMPLED, copies=12), replace(SETTINGS, max_requests=1000, batch_size=8))
    check_identities(found, 3)
    tallies = [found.tested, *found.depths, *found.domains.values()]
    assert found.tested.tested > 1200
    for tally in tallies:
        sigma = 0.5 / math.sqrt(tally.tested)  # at most
        assert abs(tally.acceptance - tally.expected_acceptance) < 4.5 * sigma
    assert 0.1 < found.tested.acceptance < 0.9


def test_a_draft_equal_to_the_target_is_always_accepted() -> None:
    found = run(held_out(GREEDY), draft_seed=0)
    assert found.accepted == found.drafted
    assert found.acceptance_rate == 1.0
    assert found.mean_acceptance_length > 3.0


def test_the_same_seed_gives_the_same_replay_in_any_batch() -> None:
    """Unseeded requests get their randomness from the replay's seed, not from their neighbours or the clock."""
    seeded = SamplingParams(temperature=1.0, seed=5)
    examples = [*held_out(SAMPLED)[:3], *held_out(seeded)[3:]]
    one, again = run(examples), run(examples)
    assert one.output_token_ids == again.output_token_ids
    assert one.histogram == again.histogram
    alone = run(examples, replace(SETTINGS, batch_size=1))
    assert alone.output_token_ids == one.output_token_ids
    other = run(examples, replace(SETTINGS, seed=1))
    assert other.output_token_ids[:3] != one.output_token_ids[:3]
    assert other.output_token_ids[3:] == one.output_token_ids[3:], "a request's own seed is its own"


def test_end_of_text_cuts_what_was_verified_behind_it() -> None:
    plain = run(held_out(GREEDY))
    end = plain.output_token_ids[0][5]
    found = run(held_out(GREEDY), replace(SETTINGS, end_token_ids=frozenset({end})))
    for before, after in zip(plain.output_token_ids, found.output_token_ids, strict=True):
        expected = before[: before.index(end) + 1] if end in before else before
        assert after == expected
    check_identities(found, 3)


def test_a_small_cache_is_shared_in_turns_and_long_prompts_are_left_out() -> None:
    model, other = (tiny_model("llama", vocab_size=VOCAB, seed=seed) for seed in (0, DRAFT_SEED))
    small = {"num_blocks": 16, "block_size": 4, "vocab_size": VOCAB}
    target, draft = ModelRunner(model, **small), ModelRunner(other, **small)
    too_long = replace(held_out(GREEDY)[0], prompt_token_ids=tuple(np.resize([3, 4, 5], 60).tolist()))
    proposer = DraftModelProposer(draft, version="d")
    found = replay([too_long, *held_out(GREEDY)], target, proposer, SETTINGS)
    assert (found.num_requests, found.num_skipped) == (len(PROMPTS), 1)
    assert found.output_token_ids == run(held_out(GREEDY)).output_token_ids
    with pytest.raises(NothingToScore, match="fits"):
        replay([too_long], target, proposer, SETTINGS)


def test_the_work_is_bounded() -> None:
    found = run(held_out(GREEDY), replace(SETTINGS, max_requests=2, max_new_tokens=3))
    assert found.num_requests == 2
    assert found.num_output_tokens == 6
