"""Steps that never ask the device, against steps that decide at the host: the same tokens, verdicts and labels."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from redraft.models.buckets import BucketLimits
from redraft.models.runner import ModelRunner
from redraft.sampling.coupling import (
    DraftedTokens,
    Layout,
    accept_choice,
    accept_maximal,
    settle_choice,
    settle_maximal,
)
from redraft.sampling.params import Coupling, SamplingParams
from redraft.speculation import ahead
from redraft.speculation.ahead import draft_ahead, verify_ahead
from redraft.speculation.draft_model import Draft, DraftModelProposer
from redraft.speculation.fallback import FallbackProposer
from redraft.speculation.ngram import NgramProposer
from redraft.speculation.proposer import Proposal, Proposer, SequenceProposal
from redraft.speculation.router import DraftRouter
from redraft.speculation.state import SequenceState
from redraft.speculation.step import StepOutput, StepResult, Verified, Work, begin_step, speculative_step
from redraft.speculation.verify import verify
from tests.fakes import runner_ahead, tiny_model
from tests.reference_decoding import BLOCK_SIZE, NUM_BLOCKS, make_states, step

VOCAB, NUM_TOKENS = 32, 16
PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [5], [10, 11, 12, 10, 11, 12, 10], [4, 9] * 10, [7, 7, 8]]
GREEDY = SamplingParams(temperature=0.0)
RACING = SamplingParams(seed=1, temperature=0.9, top_p=0.95)
TRUNCATED = SamplingParams(temperature=1.1, top_k=20, min_p=0.01)
BIASED = SamplingParams(seed=3, temperature=0.8, logit_bias=((5, 1.5), (9, -2.0)), coupling=Coupling.MAXIMAL)
PENALISED = SamplingParams(temperature=0.7, repetition_penalty=1.3)
BATCHES = {
    "greedy": [GREEDY] * 5,
    "race": [RACING] * 5,
    "maximal": [TRUNCATED] * 5,
    "mixed": [GREEDY, RACING, TRUNCATED, BIASED, GREEDY],
    "penalties": [GREEDY, PENALISED, TRUNCATED, RACING, PENALISED],
}


def make(seed: int, *, runs_ahead: bool) -> ModelRunner:
    model = tiny_model("llama", vocab_size=VOCAB, seed=seed)
    sizes = {"num_blocks": NUM_BLOCKS, "block_size": BLOCK_SIZE, "vocab_size": VOCAB}
    return runner_ahead(model, BucketLimits(8, 4), **sizes) if runs_ahead else ModelRunner(model, **sizes)


def drafting(seed: int, *, runs_ahead: bool, version: str = "d") -> DraftModelProposer:
    return DraftModelProposer(make(seed, runs_ahead=runs_ahead), version=version, epoch=seed, max_catch_up=16)


def lookup() -> NgramProposer:
    return NgramProposer(min_match=1, max_match=3)


def routed(*, runs_ahead: bool) -> DraftRouter:
    """Two versions, each with half of the sequences."""
    router = DraftRouter()
    versions = {name: drafting(seed, runs_ahead=runs_ahead, version=name) for name, seed in (("a", 11), ("b", 12))}
    router.set(versions, {"a": 0.5, "b": 0.5})
    return router


PROPOSERS: dict[str, Callable[[bool], Proposer | None]] = {
    "none": lambda ahead: None,
    "draft": lambda ahead: drafting(11, runs_ahead=ahead),
    "self": lambda ahead: drafting(0, runs_ahead=ahead),
    "ngram+draft": lambda ahead: FallbackProposer([lookup(), drafting(11, runs_ahead=ahead)]),
    "two drafts": lambda ahead: routed(runs_ahead=ahead),
}


def assert_alike(ours: StepResult, theirs: StepResult) -> None:
    assert ours.num_target_tokens == theirs.num_target_tokens
    for a, b in zip(ours.outputs, theirs.outputs, strict=True):
        assert (a.emitted, a.num_accepted, a.failed) == (b.emitted, b.num_accepted, b.failed)
        assert (a.proposal.token_ids, a.proposal.draft_version) == (b.proposal.token_ids, b.proposal.draft_version)
        assert a.expected_acceptance == pytest.approx(b.expected_acceptance, abs=1e-4)
        assert [row.ids for row in a.teacher] == [row.ids for row in b.teacher]
        for one, other in zip(a.teacher, b.teacher, strict=True):
            assert one.logits == pytest.approx(other.logits, abs=1e-3)
            assert one.logsumexp == pytest.approx(other.logsumexp, abs=1e-3)
            assert one.sampling_logsumexp == pytest.approx(other.sampling_logsumexp, abs=1e-3)
        assert [s.token_id for s in (*a.logprobs, *a.prompt_logprobs)] == [
            s.token_id for s in (*b.logprobs, *b.prompt_logprobs)
        ]
        assert [s.logprob for s in a.logprobs] == pytest.approx([s.logprob for s in b.logprobs], abs=1e-3)


CASES = [(p, b) for p in PROPOSERS for b in BATCHES if p == "draft" or b in ("mixed", "penalties")]


@pytest.mark.parametrize(("proposer", "batch"), CASES)
def test_step_by_step_like_the_host(proposer: str, batch: str) -> None:
    both: list[tuple[list[SequenceState], ModelRunner, Proposer | None]] = []
    for runs_ahead in (True, False):
        states = make_states(PROMPTS, BATCHES[batch], min_new_tokens=3, end_token_ids=(0, 5))
        for index, state in enumerate(states):
            state.route = index << 61
        both.append((states, make(0, runs_ahead=runs_ahead), PROPOSERS[proposer](runs_ahead)))
    accepted = 0
    while any(state.num_output_tokens < NUM_TOKENS for state in both[0][0]):
        ours, theirs = (step(*each, 3, chunk=6, teacher_top_n=4, logprobs=2) for each in both)
        assert_alike(ours, theirs)
        accepted += sum(output.num_accepted for output in ours.outputs)
    assert [state.token_ids for state in both[0][0]] == [state.token_ids for state in both[1][0]]
    assert accepted or proposer == "none"


def test_a_target_at_the_host_with_a_draft_that_runs_ahead() -> None:
    """As with a tensor-parallel target."""
    results: list[list[StepOutput]] = []
    for draft_ahead_too in (True, False):
        states = make_states(PROMPTS, BATCHES["mixed"])
        target, proposer = make(0, runs_ahead=False), drafting(11, runs_ahead=draft_ahead_too)
        results.append([output for _ in range(10) for output in step(states, target, proposer, 3).outputs])
    assert [output.emitted for output in results[0]] == [output.emitted for output in results[1]]


class Watching:
    def __init__(self) -> None:
        self.seen: list[Verified] = []

    def observe(self, verified: Sequence[Verified]) -> None:
        self.seen += [Verified(v.state, v.probs.clone(), v.proposal, v.expected_acceptance) for v in verified]


@pytest.mark.parametrize("batch", ["greedy", "mixed"])
def test_an_observer_sees_the_same(batch: str) -> None:
    watching: list[Watching] = []
    for runs_ahead in (True, False):
        states = make_states(PROMPTS, BATCHES[batch])
        observer, target, proposer = Watching(), make(0, runs_ahead=runs_ahead), drafting(11, runs_ahead=runs_ahead)
        for _ in range(6):
            work = [Work(state, state.num_pending, 3) for state in states]
            speculative_step(work, target, proposer, observer)
        watching.append(observer)
    for ours, theirs in zip(watching[0].seen, watching[1].seen, strict=True):
        assert ours.proposal.token_ids == theirs.proposal.token_ids
        torch.testing.assert_close(ours.probs, theirs.probs, rtol=1e-3, atol=1e-4)


def test_nothing_has_moved_before_the_verdicts_are_asked_for() -> None:
    states = make_states(PROMPTS, BATCHES["mixed"])
    target, proposer = make(0, runs_ahead=True), drafting(11, runs_ahead=True)
    step(states, target, proposer, 3)
    before = [(list(state.token_ids), state.num_computed) for state in states]
    under_way = begin_step([Work(state, 1, 3) for state in states], target, proposer)
    assert [(state.token_ids, state.num_computed) for state in states] == before
    assert all(output.emitted for output in under_way.finish().outputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("batch", ["greedy", "race", "maximal"])
def test_logits_that_are_not_finite_fail_their_sequence_alone(batch: str, value: float) -> None:
    params = BATCHES[batch][:2]
    states = make_states(PROMPTS[:2], params)
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(3))
    logits[2] = value
    proposal = Proposal((SequenceProposal((4,), (-1,)), SequenceProposal()), torch.empty(0, 0))
    verdicts, _ = verify_ahead(states, proposal, [0, 1], logits)()
    expected = verify(states, proposal, [0, 1], logits)
    assert [verdicts[i].finite for i in (0, 1)] == [expected[i].finite for i in (0, 1)] == [True, False]
    assert (verdicts[0].num_accepted, verdicts[0].final_token) == (expected[0].num_accepted, expected[0].final_token)


class Withheld:
    """In the place of `Download`: what would be asked of the device, and on which device it is."""

    tensors: tuple[torch.Tensor, ...] = ()

    def __init__(self, *tensors: torch.Tensor) -> None:
        type(self).tensors = tensors


@pytest.mark.parametrize("labels", [0, 4])
def test_no_step_of_verification_waits_for_the_device(labels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor on the meta device has a shape and no numbers: whoever asks it for one gets an exception."""
    monkeypatch.setattr(ahead, "Download", Withheld)
    states = make_states(PROMPTS, BATCHES["mixed"], min_new_tokens=3, end_token_ids=(0, 5))
    sequences = tuple(SequenceProposal((-1 - i, 7), (i, -1)) for i in range(5))
    proposal = Proposal(
        sequences, torch.empty(5, VOCAB, device="meta"), torch.empty(5, dtype=torch.int64, device="meta")
    )
    logits = torch.empty(15, VOCAB, device="meta")
    verify_ahead(states, proposal, range(5), logits, num_top=labels, with_probs=True)
    assert {tensor.device.type for tensor in Withheld.tensors} == {"meta"}
    with pytest.raises((RuntimeError, NotImplementedError)):
        verify(states, proposal.with_known([1] * 5), range(5), logits, num_top=labels)


def test_no_step_of_drafting_waits_for_the_device() -> None:
    class Meta:
        passes = 0

        def forward(self, chunks: Sequence[Any], drawn: torch.Tensor) -> torch.Tensor:
            self.passes += 1
            assert all(chunk.token_ids[0] < 0 for chunk in chunks)
            return torch.empty(len(chunks), VOCAB, device="meta")

    runner: Any = Meta()
    drafts = [
        Draft(state, limit)
        for state, limit in zip(make_states(PROMPTS, BATCHES["mixed"]), (3, 1, 2, 3, 3), strict=True)
    ]
    probs, drawn = draft_ahead(runner, drafts, torch.empty(5, VOCAB, device="meta"))
    assert runner.passes == 2
    assert drawn.shape == (12,)
    assert sum(len(part) for part in probs) == 6  # those that were not greedy
    references = [token for draft in drafts for token in draft.tokens]
    assert sorted(references) == list(range(-12, 0))


def random_case(seed: int) -> tuple[torch.Tensor, DraftedTokens, Layout]:
    """Up to six sequences with up to four drafted tokens each, some of them certain, over eight ids."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    counts = [rng.randrange(5) for _ in range(rng.randrange(1, 7))]
    layout, total = Layout.of(counts), sum(counts)
    certain = torch.tensor([rng.random() < 0.3 for _ in range(total)], dtype=torch.bool)
    rows = torch.where(certain, -1, (~certain).cumsum(0) - 1)
    q = torch.rand(int((~certain).sum()), 8).softmax(dim=1)
    return torch.rand(layout.num_rows, 8).softmax(dim=1), DraftedTokens(torch.randint(8, (total,)), rows, q), layout


@pytest.mark.parametrize("seed", range(60))
def test_verdicts_of_the_device_are_those_of_the_host(seed: int) -> None:
    target, drafted, layout = random_case(seed)
    accept = torch.rand(len(drafted.token_ids), dtype=torch.float64)
    recover = torch.rand(layout.num_rows, dtype=torch.float64)
    counts, tokens = settle_maximal(target, drafted, layout, accept, recover)
    expected = accept_maximal(target, drafted, layout, accept, recover)
    assert (tuple(counts.tolist()), tuple(tokens.tolist())) == (expected.num_accepted, expected.final_token)

    choice = torch.randint(3, (layout.num_rows,))
    near = DraftedTokens(drafted.token_ids % 3, drafted.prob_row, drafted.probs)
    counts, tokens = settle_choice(choice, near, layout)
    own = iter(near.token_ids.tolist())
    expected = accept_choice(choice.tolist(), [[next(own) for _ in range(n)] for n in layout.num_drafts])
    assert (tuple(counts.tolist()), tuple(tokens.tolist())) == (expected.num_accepted, expected.final_token)
