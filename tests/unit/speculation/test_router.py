"""Who drafts for whom when several versions serve, and what happens to a sequence whose version leaves."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from redraft.sampling.params import SamplingParams
from redraft.sampling.randomness import mix64
from redraft.speculation.cost import StepCost
from redraft.speculation.draft_model import DraftModelProposer
from redraft.speculation.length import LengthController
from redraft.speculation.proposer import NOTHING
from redraft.speculation.router import NO_EPOCH, DraftRouter
from redraft.speculation.state import SequenceState
from tests.fakes import tiny_model
from tests.reference_decoding import make_runner, plain_distribution, step

VOCAB = 24
MODELS = {"a": tiny_model("llama", vocab_size=VOCAB, seed=11), "b": tiny_model("llama", vocab_size=VOCAB, seed=12)}


def draft(version: str, **limits: int) -> DraftModelProposer:
    model = tiny_model("llama", vocab_size=VOCAB, seed=11 if version == "a" else 12)
    epoch = 1 if version == "a" else 2
    return DraftModelProposer(make_runner(model), version=version, epoch=epoch, **limits)


def state(index: int, *, length: int = 5) -> SequenceState:
    """With blocks of its own, and target KV of all but the last token."""
    tokens = [3 + (index + j) % 20 for j in range(length)]
    blocks = list(range(index * 8, index * 8 + 8))
    params = SamplingParams(temperature=0.9, seed=index)
    return SequenceState(
        tokens, 1, params, key=index, block_ids=blocks, num_computed=length - 1, route=mix64(index + 1)
    )


def test_shares_are_kept_by_new_sequences_and_choices_are_stable() -> None:
    router = DraftRouter()
    drafts = {"a": draft("a"), "b": draft("b")}
    router.set(drafts, {"a": 0.8, "b": 0.2})
    many = [SequenceState([1], 1, SamplingParams(), key=0, route=mix64(i)) for i in range(4000)]
    epochs = [router.epoch_of(s) for s in many]
    assert Counter(s.draft_version for s in many)["b"] == pytest.approx(800, abs=80)
    assert epochs == [drafts[s.draft_version].epoch for s in many]
    again = [SequenceState([1], 1, SamplingParams(), key=7, route=s.route) for s in many]
    assert [router.epoch_of(s) for s in again] == epochs  # by route alone
    router.set(drafts, {"b": 1.0})
    assert [router.epoch_of(s) for s in many] == epochs  # those in progress stay
    assert {router.epoch_of(SequenceState([1], 1, SamplingParams(), key=0, route=mix64(i))) for i in range(50)} == {2}


def test_the_last_route_and_a_version_without_a_share() -> None:
    router = DraftRouter()
    router.set({"a": draft("a"), "b": draft("b")}, {"a": 1.0, "b": 0.0})
    edge = SequenceState([1], 1, SamplingParams(), key=0, route=(1 << 64) - 1)
    assert router.epoch_of(edge) == 1


def test_drafts_are_on_trial_while_several_have_a_share() -> None:
    router = DraftRouter()
    drafts = {"a": draft("a"), "b": draft("b")}
    lengths = {version: LengthController("draft_model", StepCost(), StepCost()) for version in drafts}
    for version, length in lengths.items():
        drafts[version].length = length
    for shares, on_trial in (
        ({"a": 0.9, "b": 0.1}, True),
        ({"b": 1.0}, False),
        ({"a": 0.5, "b": 0.5}, True),
        ({}, False),
    ):
        router.set(drafts, shares)
        assert [length.is_on_trial for length in lengths.values()] == [on_trial] * 2


@pytest.mark.parametrize("shares", [{"a": 0.5}, {"a": 0.5, "c": 0.5}, {"a": 1.5, "b": -0.5}])
def test_shares_that_make_no_sense_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="shares"):
        DraftRouter().set({"a": draft("a"), "b": draft("b")}, shares)


def test_every_sequence_is_drafted_for_by_its_version_with_its_q() -> None:
    router = DraftRouter()
    router.set({"a": draft("a"), "b": draft("b")}, {"a": 0.5, "b": 0.5})
    states = [state(i) for i in range(6)]
    proposal = router.propose(states, [2, 3, 0, 1, 2, 3])
    owners = {own.draft_version for own in proposal.sequences if own.token_ids}
    assert owners == {"a", "b"}
    assert proposal.sequences[2] == NOTHING
    for s, own in zip(states, proposal.sequences, strict=True):
        for depth, row in enumerate(own.prob_rows):
            expected = plain_distribution(MODELS[own.draft_version], s, own.token_ids[:depth])
            torch.testing.assert_close(proposal.probs[row], expected, atol=2e-5, rtol=1e-4)
    rows = [row for own in proposal.sequences for row in own.prob_rows]
    assert len(rows) == len(set(rows)) == len(proposal.probs)


def test_a_sequence_moves_when_its_version_leaves_and_only_then() -> None:
    a, b = draft("a"), draft("b")
    router = DraftRouter()
    router.set({"a": a}, {"a": 1.0})
    target = make_runner(tiny_model("llama", vocab_size=VOCAB, seed=0))
    states = [state(i) for i in range(3)]
    for s in states:
        s.num_computed = 0
    step(states, target, router, 3)
    step(states, target, router, 3)
    router.set({"a": a, "b": b}, {"b": 1.0})
    kept = step(states, target, router, 3)
    assert {out.proposal.draft_version for out in kept.outputs} == {"a"}
    router.set({"b": b}, {"b": 1.0})
    proposal = router.propose(states, [2, 2, 2])
    assert {own.draft_version for own in proposal.sequences} == {"b"}
    assert {s.draft_epoch for s in states} == {2}
    for s, own in zip(states, proposal.sequences, strict=True):  # its KV was rebuilt, not taken over
        expected = plain_distribution(MODELS["b"], s, ())
        torch.testing.assert_close(proposal.probs[own.prob_rows[0]], expected, atol=2e-5, rtol=1e-4)


def test_without_drafts_nothing_is_proposed() -> None:
    router = DraftRouter()
    s = state(0)
    assert router.epoch_of(s) == NO_EPOCH
    assert router.propose([s], [3]).sequences == (NOTHING,)


def test_rebuilding_after_a_move_is_spread_over_steps() -> None:
    router = DraftRouter()
    router.set({"a": draft("a")}, {"a": 1.0})
    states = [state(i, length=20) for i in range(2)]
    router.propose(states, [1, 1])
    router.set({"b": draft("b", max_rebuild=8)}, {"b": 1.0})
    for expected in ([8, 0], [16, 0]):
        assert not any(own.token_ids for own in router.propose(states, [1, 1]).sequences)
        assert [s.num_draft_computed for s in states] == expected
    first, second = router.propose(states, [1, 1]).sequences
    assert first.token_ids
    assert not second.token_ids
    assert [s.num_draft_computed for s in states] == [20, 4]
