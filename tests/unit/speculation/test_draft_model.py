"""The q a draft reports is the distribution its token was drawn from, whatever happened to its KV before."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import PreTrainedModel

from redraft.sampling.coupling import draw, race
from redraft.sampling.params import Coupling, SamplingParams
from redraft.sampling.randomness import Purpose, as_key_tensor, exponentials, uniforms
from redraft.speculation.draft_model import DraftModelProposer
from redraft.speculation.proposer import CERTAIN, Proposal
from redraft.speculation.state import SequenceState
from tests.engine_harness import FixedPrice
from tests.fakes import tiny_model
from tests.reference_decoding import check_state, make_runner, make_states, plain_distribution, plain_logits, step

VOCAB = 24
PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(seed=3),
    SamplingParams(temperature=0.8, top_p=0.95, coupling=Coupling.MAXIMAL),
    SamplingParams(temperature=1.3, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.25),
    SamplingParams(temperature=0.9, top_k=5, seed=9),
]
PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [5], [10, 11, 12, 10, 11, 12, 13, 14, 15], [7, 7, 7], [4, 9] * 8]
LIMITS = [4, 1, 3, 5, 2]


def draft(seed: int = 11, *, epoch: int = 0, max_catch_up: int = 512) -> DraftModelProposer:
    return DraftModelProposer(
        make_runner(tiny_model("llama", vocab_size=VOCAB, seed=seed)),
        version="d1",
        epoch=epoch,
        max_catch_up=max_catch_up,
    )


def plain(seed: int = 11) -> PreTrainedModel:
    return tiny_model("llama", vocab_size=VOCAB, seed=seed)


def assert_q_is_exact(proposal: Proposal, states: list[SequenceState], model: PreTrainedModel) -> None:
    """At every depth: q equals a plain forward's, and the token is the one that the sequence's randomness picks."""
    for state, own in zip(states, proposal.sequences, strict=True):
        for depth, (token, row) in enumerate(zip(own.token_ids, own.prob_rows, strict=True)):
            expected = plain_distribution(model, state, own.token_ids[:depth])
            if state.params.is_greedy:
                assert (row, token) == (CERTAIN, int(expected.argmax()))
                continue
            q = proposal.probs[row]
            torch.testing.assert_close(q, expected, atol=2e-5, rtol=1e-4)
            assert q[token] > 0
            key, position = as_key_tensor([state.key]), torch.tensor([state.num_output_tokens + depth])
            if state.coupling is Coupling.DRAFTER_INVARIANT:
                assert token == int(race(q[None], exponentials(key, position, VOCAB)))
            else:
                assert token == int(draw(q[None], uniforms(key, position, Purpose.DRAFT)))
        assert own.proposer == ("draft_model" if own.token_ids else "")
        assert own.draft_version == ("d1" if own.token_ids else "")


def advance(states: list[SequenceState], proposal: Proposal, proposer: DraftModelProposer, rng: random.Random) -> None:
    """Accept a random number of tokens and append a random one, as verification would."""
    for state, own in zip(states, proposal.sequences, strict=True):
        accepted = rng.randint(0, len(own.token_ids)) if own.token_ids else 0
        if own.token_ids:
            proposer.settle(state, accepted, own)
        state.token_ids.extend([*own.token_ids[:accepted], rng.randrange(VOCAB)])
        check_state(state)
        # what is kept is exactly what the draft has seen of the tokens now final
        if own.token_ids:
            missing = len(state.token_ids) - state.num_draft_computed
            assert missing == (2 if accepted == len(own.token_ids) else 1)


def test_q_is_exact_at_every_depth_and_after_every_kind_of_verdict() -> None:
    proposer, model, rng = draft(), plain(), random.Random(0)
    states = make_states(PROMPTS, PARAMS)
    for round_number in range(8):
        limits = LIMITS[round_number % 5 :] + LIMITS[: round_number % 5]
        proposal = proposer.propose(states, limits)
        assert [len(own.token_ids) for own in proposal.sequences] == limits
        assert_q_is_exact(proposal, states, model)
        advance(states, proposal, proposer, rng)


def test_a_batch_and_a_sequence_alone_draft_the_same() -> None:
    together = draft().propose(make_states(PROMPTS, PARAMS), LIMITS)
    proposer = draft()
    for index, state in enumerate(make_states(PROMPTS, PARAMS)):
        alone = proposer.propose([state], LIMITS[index : index + 1])
        assert alone.sequences[0].token_ids == together.sequences[index].token_ids
        rows = [row for row in together.sequences[index].prob_rows if row != CERTAIN]
        assert len(alone.probs) == len(rows)
        if rows:
            torch.testing.assert_close(alone.probs, together.probs[rows], atol=2e-5, rtol=1e-4)


def test_a_draft_that_stops_proposes_the_beginning_of_what_it_would_have() -> None:
    """By its own distribution before every token: never by the token."""
    model, lengths = plain(), set()
    whole = draft().propose(make_states(PROMPTS, PARAMS), LIMITS)
    for least_chance in (0.0, 0.05, 0.1, 0.2, 0.4, 1.1):
        proposer, states = draft(), make_states(PROMPTS, PARAMS)
        proposer.length = FixedPrice(least_chance)
        proposal = proposer.propose(states, LIMITS)
        assert_q_is_exact(proposal, states, model)
        for own, all_of_it in zip(proposal.sequences, whole.sequences, strict=True):
            assert own.token_ids == all_of_it.token_ids[: len(own.token_ids)]
            survival = 1.0
            for sure in own.sureness:
                survival *= sure  # nothing was learnt yet
            assert survival >= least_chance or not own.token_ids
            lengths.add(len(own.token_ids))
        if least_chance == 0.0:
            assert [own.token_ids for own in proposal.sequences] == [own.token_ids for own in whole.sequences]
    assert not any(own.token_ids for own in proposal.sequences), "nothing has a chance above 1"
    assert len(lengths) > 3


def test_sureness_is_the_largest_probability() -> None:
    states, model = make_states(PROMPTS, PARAMS), plain()
    proposer = draft()
    proposer.length = FixedPrice(0.0)
    for state, own in zip(states, proposer.propose(states, LIMITS).sequences, strict=True):
        assert len(own.sureness) == len(own.token_ids) > 0
        for depth, sure in enumerate(own.sureness):
            row = plain_logits(model, [*state.token_ids, *own.token_ids[:depth]])[-1]
            expected = (
                row.softmax(0) if state.params.is_greedy else plain_distribution(model, state, own.token_ids[:depth])
            )
            assert sure == pytest.approx(float(expected.max()), rel=1e-4)


@pytest.mark.parametrize("max_catch_up", [1, 3, 7, 20])
def test_catching_up_in_chunks_drafts_late_but_exactly(max_catch_up: int) -> None:
    """Only what fits the budget is run; nobody drafts before all of its tokens have been; q is exact when it does."""
    proposer, model = draft(max_catch_up=max_catch_up), plain()
    states = make_states(PROMPTS, PARAMS)
    ever_drafted: set[int] = set()
    for _ in range(12):
        before = [state.num_draft_computed for state in states]
        proposal = proposer.propose(states, LIMITS)
        ran = sum(state.num_draft_computed - b for state, b in zip(states, before, strict=True))
        assert 0 < ran <= max_catch_up
        assert_q_is_exact(proposal, states, model)
        for index, (state, own) in enumerate(zip(states, proposal.sequences, strict=True)):
            if own.token_ids:
                assert state.num_draft_computed == len(state.token_ids)
                ever_drafted.add(index)
                proposer.settle(state, 0, own)
                state.token_ids.append(1)
            check_state(state)
    # sequences that draft take one token each of the budget, so a budget below their number never serves them all
    assert len(ever_drafted) == min(max_catch_up, 5)


def test_a_long_prompt_does_not_keep_the_others_from_drafting() -> None:
    states = make_states([list(range(3, 23)) * 4, [5], [3, 4]], [SamplingParams(seed=1)] * 3)
    proposer = draft(max_catch_up=10)
    assert [len(own.token_ids) for own in proposer.propose(states, [3, 3, 3]).sequences] == [0, 3, 3]
    assert states[0].num_draft_computed == 7


def test_tokens_of_a_time_without_speculation_are_made_up_for() -> None:
    proposer, model = draft(), plain()
    states = make_states(PROMPTS, PARAMS)
    advance(states, proposer.propose(states, LIMITS), proposer, random.Random(1))
    for state in states:
        state.token_ids.extend([3, 1, 4, 1, 5, 9, 2, 6])
    assert proposer.propose(states, [0] * 5).sequences == proposer.propose(states, [0] * 5).sequences
    assert_q_is_exact(proposer.propose(states, LIMITS), states, model)


def test_a_swap_counts_old_kv_as_missing() -> None:
    old, new = draft(11), draft(12, epoch=1)
    states = make_states(PROMPTS, PARAMS)
    advance(states, old.propose(states, LIMITS), old, random.Random(2))
    for state in states:
        state.num_draft_marked_blocks = state.num_draft_computed // 4
    proposal = new.propose(states, LIMITS)
    assert_q_is_exact(proposal, states, plain(12))
    for state in states:
        assert state.draft_epoch == 1
        assert state.num_draft_marked_blocks == 0, "blocks still count as marked, but as the old draft's"


def test_end_tokens_are_banned_until_the_minimum_at_every_depth() -> None:
    """min_new_tokens 3: the first three tokens exclude the end tokens, later ones do not."""
    states = make_states([[3, 4, 5]], [SamplingParams(seed=1)], min_new_tokens=3, end_token_ids=tuple(range(20)))
    proposal = draft().propose(states, [5])
    assert_q_is_exact(proposal, states, plain())
    masses = [float(proposal.probs[row, :20].sum()) for row in proposal.sequences[0].prob_rows]
    assert masses[:3] == [0, 0, 0]
    assert min(masses[3:]) > 0


def test_kv_reach_through_real_steps() -> None:
    """With the real verifier: the draft's KV never reaches past the final tokens, and q stays exact throughout."""
    target, proposer, model = make_runner(plain(0)), draft(), plain()
    states = make_states(PROMPTS, PARAMS)
    for _ in range(10):
        step(states, target, proposer, 3)
    assert {state.num_draft_computed for state in states} != {0}
    assert_q_is_exact(proposer.propose(states, LIMITS), states, model)
