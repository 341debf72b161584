"""Who proposes for whom, and that q rows still belong to the right tokens after merging."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from redraft.sampling.params import SamplingParams
from redraft.speculation.fallback import FallbackProposer
from redraft.speculation.proposer import CERTAIN, NOTHING, Proposal, SequenceProposal
from redraft.speculation.state import SequenceState

VOCAB = 6


class Scripted:
    """Proposes what it is told for sequences it knows by their first token, with q rows that carry its number."""

    def __init__(self, name: str, number: float, script: dict[int, tuple[int, ...]], *, certain: bool = False) -> None:
        self.name = name
        self.number = number
        self.script = script
        self.certain = certain
        self.asked: list[tuple[list[int], list[int]]] = []
        self.settled: list[tuple[int, int]] = []

    def propose(self, states: Sequence[SequenceState], limits: Sequence[int]) -> Proposal:
        self.asked.append(([s.token_ids[0] for s in states], list(limits)))
        sequences, rows = [], 0
        for state, limit in zip(states, limits, strict=True):
            tokens = self.script.get(state.token_ids[0], ())[:limit]
            where = (CERTAIN,) * len(tokens) if self.certain else tuple(range(rows, rows + len(tokens)))
            rows += 0 if self.certain else len(tokens)
            sequences.append(SequenceProposal(tokens, where, self.name, "v") if tokens else NOTHING)
        return Proposal(tuple(sequences), torch.full((rows, VOCAB), self.number))

    def settle(self, state: SequenceState, num_accepted: int, proposal: SequenceProposal) -> None:
        self.settled.append((state.token_ids[0], num_accepted))


def states(count: int) -> list[SequenceState]:
    return [SequenceState([index], 1, SamplingParams(), key=0) for index in range(count)]


def test_the_next_is_asked_only_for_sequences_without_a_proposal() -> None:
    first = Scripted("a", 1.0, {0: (1, 2), 3: (4,)})
    second = Scripted("b", 2.0, {1: (5, 5, 5), 0: (3,)})
    third = Scripted("c", 3.0, {2: (2,)})
    merged = FallbackProposer([first, second, third]).propose(states(5), [4, 2, 1, 3, 0])
    assert first.asked == [([0, 1, 2, 3], [4, 2, 1, 3])]
    assert second.asked == [([1, 2], [2, 1])]
    assert third.asked == [([2], [1])]
    assert [own.token_ids for own in merged.sequences] == [(1, 2), (5, 5), (2,), (4,), ()]
    assert [own.proposer for own in merged.sequences] == ["a", "b", "c", "a", ""]
    owners = [[float(merged.probs[row, 0]) for row in own.prob_rows] for own in merged.sequences]
    assert owners == [[1, 1], [2, 2], [3], [1], []]
    assert len({row for own in merged.sequences for row in own.prob_rows}) == 6


def test_certain_tokens_stay_certain_beside_a_models() -> None:
    lookup = Scripted("lookup", 0.0, {1: (3, 3)}, certain=True)
    model = Scripted("model", 2.0, {0: (1, 1)})
    merged = FallbackProposer([lookup, model]).propose(states(2), [2, 2])
    assert [own.prob_rows for own in merged.sequences] == [(0, 1), (CERTAIN, CERTAIN)]
    drafted = merged.drafted_tokens([1, 0], "cpu")
    assert drafted.token_ids.tolist() == [3, 3, 1, 1]
    assert drafted.prob_row.tolist() == [-1, -1, 0, 1]
    assert drafted.probability_of(drafted.token_ids).tolist() == [1, 1, 2, 2]


def test_only_certain_tokens_or_none_at_all() -> None:
    lookup = Scripted("lookup", 0.0, {1: (3, 3)}, certain=True)
    merged = FallbackProposer([lookup]).propose(states(2), [2, 2])
    drafted = merged.drafted_tokens([0, 1], "cpu")
    assert drafted.probability_of(drafted.token_ids).tolist() == [1, 1]
    nothing = FallbackProposer([lookup]).propose(states(2), [0, 0])
    assert nothing.sequences == (NOTHING, NOTHING)


def test_the_proposer_of_a_sequence_is_the_one_that_settles() -> None:
    first, second = Scripted("a", 1.0, {0: (1,)}), Scripted("b", 2.0, {1: (1,)})
    both = FallbackProposer([first, second])
    assert both.name == "a+b"
    sequences = states(2)
    for number, own in enumerate(both.propose(sequences, [1, 1]).sequences):
        both.settle(sequences[number], number, own)
    assert first.settled == [(0, 0)]
    assert second.settled == [(1, 1)]
