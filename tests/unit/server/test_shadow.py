"""The shadow's α is that of the candidate at the positions that were verified, and it costs what it may."""

from __future__ import annotations

import pytest
import torch

from redraft.sampling.params import SamplingParams
from redraft.sampling.randomness import mix64
from redraft.speculation.draft_model import DraftModelProposer
from redraft.speculation.proposer import NOTHING, SequenceProposal
from redraft.speculation.state import SequenceState
from redraft.speculation.step import Verified, Work, speculative_step
from redraft_server.rollout import shadow
from redraft_server.rollout.shadow import ShadowScorer
from tests.fakes import tiny_model
from tests.reference_decoding import make_runner, make_states, plain_distribution

VOCAB = 24
ANY_TIME = 1e9
PARAMS = [
    SamplingParams(temperature=0.9, seed=1),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.1, top_p=0.9, repetition_penalty=1.3, presence_penalty=0.4),
]
PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13]]


def states() -> list[SequenceState]:
    made = make_states(PROMPTS, PARAMS, min_new_tokens=3, end_token_ids=(0,))
    for index, state in enumerate(made):
        state.route = mix64(index)
    return made


class Kept:
    """An observer that keeps what it is lent."""

    def __init__(self, inner: ShadowScorer) -> None:
        self.inner = inner
        self.seen: list[tuple[SequenceState, int, torch.Tensor, tuple[float, ...]]] = []

    def observe(self, verified: list[Verified]) -> None:
        for v in verified:
            self.seen.append((v.state, len(v.state.token_ids), v.probs.clone(), v.expected_acceptance))
        self.inner.observe(verified)


def test_alpha_at_every_verified_position_is_exact_and_paired_with_what_served() -> None:
    target = make_runner(tiny_model("llama", vocab_size=VOCAB, seed=0))
    active = DraftModelProposer(make_runner(tiny_model("llama", vocab_size=VOCAB, seed=11)), version="a")
    candidate = tiny_model("llama", vocab_size=VOCAB, seed=12)
    reference = tiny_model("llama", vocab_size=VOCAB, seed=12)
    scorer = ShadowScorer(make_runner(candidate), 1.0, time_share=ANY_TIME)
    observer = Kept(scorer)
    mine = states()
    for _ in range(6):
        work = [Work(s, s.num_pending, 3) for s in mine]
        speculative_step(work, target, active, observer)  # type: ignore[arg-type]
    alphas: list[float] = []
    paired: list[float] = []
    served: list[float] = []
    for state, end, probs, expected in observer.seen:
        assert torch.allclose(probs.sum(1), torch.ones(len(probs)))
        for j, p in enumerate(probs):
            before = SequenceState(
                state.token_ids[: end - len(probs) + j],
                state.num_prompt_tokens,
                state.params,
                state.key,
                state.min_new_tokens,
                state.end_token_ids,
            )
            alpha = float(torch.minimum(p, plain_distribution(reference, before, ())).sum())
            alphas.append(alpha)
            if j < len(expected):
                paired.append(alpha)
                served.append(expected[j])
    score = scorer.score
    assert score.num_positions == len(alphas) > 20
    assert score.expected_sum == pytest.approx(sum(alphas), rel=1e-4)
    assert score.num_paired == len(paired) > 5
    assert score.difference == pytest.approx((sum(paired) - sum(served)) / len(paired), abs=1e-4)
    assert not scorer.is_broken


def emitted(state: SequenceState, probs: torch.Tensor) -> Verified:
    return Verified(state, probs, NOTHING, ())


def uniform(rows: int = 1) -> torch.Tensor:
    return torch.full((rows, VOCAB), 1.0 / VOCAB)


def long_state(length: int) -> SequenceState:
    (state,) = make_states([[3]], [SamplingParams()])
    state.token_ids = [3 + j % 20 for j in range(length)]
    state.num_admissions = 1
    return state


def test_a_long_prompt_is_caught_up_with_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "MAX_TOKENS", 8)
    runner = make_runner(tiny_model("llama", vocab_size=VOCAB, seed=12))
    sizes: list[int] = []
    forward = runner.forward

    def counted(chunks: list[object]) -> torch.Tensor:
        sizes.append(sum(len(chunk.token_ids) for chunk in chunks))  # type: ignore[attr-defined]
        return forward(chunks)  # type: ignore[arg-type]

    runner.forward = counted  # type: ignore[method-assign, assignment]
    scorer = ShadowScorer(runner, 1.0, time_share=ANY_TIME)
    state = long_state(20)
    for _ in range(4):
        scorer.observe([emitted(state, uniform())])
        state.token_ids.append(5)
    assert sizes == [8, 8, 5, 1]
    assert scorer.score.num_positions == 2
    state.num_admissions += 1  # preempted: its KV lies elsewhere now
    scorer.observe([emitted(state, uniform())])
    assert sizes[-1] == 8
    assert scorer.score.num_positions == 2


def test_it_rests_after_a_pass() -> None:
    scorer = ShadowScorer(make_runner(tiny_model("llama", vocab_size=VOCAB, seed=12)), 1.0, time_share=1e-9)
    state = long_state(6)
    for _ in range(5):
        scorer.observe([emitted(state, uniform())])
        state.token_ids.append(5)
    assert scorer.score.num_positions == 1


def test_only_the_share_that_may_be_followed_and_never_too_many() -> None:
    scorer = ShadowScorer(make_runner(tiny_model("llama", vocab_size=VOCAB, seed=12)), 0.0, time_share=ANY_TIME)
    scorer.observe([emitted(long_state(6), uniform())])
    assert scorer.score.num_positions == 0
    everybody = ShadowScorer(make_runner(tiny_model("llama", vocab_size=VOCAB, seed=12)), 1.0, time_share=ANY_TIME)
    crowd = [long_state(3) for _ in range(shadow.MAX_SEQUENCES + 3)]
    everybody.observe([emitted(state, uniform()) for state in crowd])
    assert everybody.score.num_positions == shadow.MAX_SEQUENCES


def test_a_lookup_in_service_is_nothing_to_compare_with() -> None:
    scorer = ShadowScorer(make_runner(tiny_model("llama", vocab_size=VOCAB, seed=12)), 1.0, time_share=ANY_TIME)
    looked_up = SequenceProposal((5,), (-1,), "ngram", "ngram")
    scorer.observe([Verified(long_state(6), uniform(), looked_up, (0.5,))])
    assert scorer.score.num_positions == 1
    assert scorer.score.difference is None


def test_an_error_ends_the_scoring_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    scorer = ShadowScorer(make_runner(tiny_model("llama", vocab_size=VOCAB, seed=12)), 1.0, time_share=ANY_TIME)
    scorer.observe([emitted(long_state(6), torch.ones(1, VOCAB + 1))])
    assert scorer.is_broken
    assert "shadow scoring failed" in caplog.text
    scorer.observe([emitted(long_state(6), uniform())])
    assert scorer.score.num_positions == 0
