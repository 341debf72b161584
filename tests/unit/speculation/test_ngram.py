"""Prompt lookup against a reference that looks at every earlier position in turn."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from redraft.sampling.params import SamplingParams
from redraft.speculation.cost import StepCost
from redraft.speculation.length import LengthController
from redraft.speculation.ngram import NgramProposer, find_continuation
from redraft.speculation.proposer import CERTAIN, NOTHING
from redraft.speculation.state import SequenceState


def reference(ids: list[int], limit: int, min_match: int, max_match: int) -> tuple[int, ...]:
    for size in range(max_match, min_match - 1, -1):
        suffix = ids[-size:]
        ends = [end for end in range(size, len(ids)) if len(suffix) == size and ids[end - size : end] == suffix]
        offers = [tuple(ids[end : end + limit]) for end in ends]
        if offers:
            return next((offer for offer in reversed(offers) if len(offer) == limit), offers[0])
    return ()


@given(
    ids=st.lists(st.integers(0, 2), min_size=1, max_size=30),
    limit=st.integers(1, 6),
    min_match=st.integers(1, 3),
    extra=st.integers(0, 3),
)
def test_agrees_with_the_reference(ids: list[int], limit: int, min_match: int, extra: int) -> None:
    found = find_continuation(ids, limit, min_match, min_match + extra)
    assert found == reference(ids, limit, min_match, min_match + extra)


def state(ids: list[int]) -> SequenceState:
    return SequenceState(ids, len(ids), SamplingParams(), key=0)


def test_proposals_are_certain_and_named() -> None:
    proposer = NgramProposer(min_match=2, max_match=3)
    result = proposer.propose(
        [state([1, 2, 3, 9, 1, 2]), state([1, 2, 3]), state([1, 2, 3, 9, 1, 2])],
        [2, 4, 0],
    )
    first, second, third = result.sequences
    assert first.token_ids == (3, 9)
    assert first.prob_rows == (CERTAIN, CERTAIN)
    assert (first.proposer, first.draft_version) == ("ngram", "ngram")
    assert second is third is NOTHING
    assert len(result.probs) == 0


def test_a_repetition_offers_as_much_as_allowed() -> None:
    assert find_continuation([9, 9, 9, 9, 9, 9], 3, 1, 2) == (9, 9, 9)
    assert find_continuation([1, 2, 1, 2, 1, 2, 1, 2], 4, 2, 3) == (1, 2, 1, 2)


def test_the_longest_match_wins_over_a_later_shorter_one() -> None:
    assert find_continuation([5, 1, 2, 7, 9, 2, 8, 1, 2], 1, 1, 3) == (7,)
    assert find_continuation([5, 1, 2, 7, 9, 2, 8, 1, 2], 1, 1, 1) == (8,)


def test_the_length_controller_is_asked_and_told() -> None:
    length = LengthController("ngram", StepCost(), None)
    proposer = NgramProposer(min_match=1, max_match=1, length=length)
    sequence = state([1, 2, 3, 1])
    proposal = proposer.propose([sequence], [2]).sequences[0]
    proposer.settle(sequence, 1, proposal)
    assert sequence.acceptance["ngram"].accepted == 1
    assert sequence.acceptance["ngram"].tested == 2
