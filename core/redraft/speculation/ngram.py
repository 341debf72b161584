"""Prompt lookup (Saxena 2023): the continuation of the latest earlier occurrence of the last n tokens."""

from __future__ import annotations

from collections.abc import Sequence

from redraft.speculation.length import LengthController
from redraft.speculation.proposer import CERTAIN, NO_PROBS, NOTHING, Proposal, SequenceProposal
from redraft.speculation.state import SequenceState


class NgramProposer:
    """Proposes without a model; its q is one-hot.

    Args:
        min_match, max_match: n-gram lengths tried, longest first.
        length: chooses how many tokens of a match to propose; None: as many as allowed.
    """

    name = "ngram"

    def __init__(self, *, min_match: int = 2, max_match: int = 4, length: LengthController | None = None) -> None:
        assert 1 <= min_match <= max_match
        self.min_match = min_match
        self.max_match = max_match
        self.length = length

    def propose(self, states: Sequence[SequenceState], limits: Sequence[int]) -> Proposal:
        if self.length is not None:
            limits = self.length.choose(states, limits)
        return Proposal(
            tuple(self._propose_one(state, limit) for state, limit in zip(states, limits, strict=True)), NO_PROBS
        )

    def settle(self, state: SequenceState, num_accepted: int, proposal: SequenceProposal) -> None:
        if self.length is not None:
            self.length.observe(state, num_accepted, len(proposal.token_ids))

    def _propose_one(self, state: SequenceState, limit: int) -> SequenceProposal:
        if limit <= 0:
            return NOTHING
        found = find_continuation(state.token_ids, limit, self.min_match, self.max_match)
        return SequenceProposal(found, (CERTAIN,) * len(found), self.name, self.name) if found else NOTHING


def find_continuation(token_ids: list[int], limit: int, min_match: int, max_match: int) -> tuple[int, ...]:
    """At most `limit` tokens that followed an earlier occurrence of the longest matching suffix.

    Of several occurrences the latest with `limit` tokens after it is taken, or else the earliest, which has the most:
    text that repeats itself (9, 9, 9, 9) would otherwise always offer one token.
    Example: (1, 2, 3, 9, 1, 2) with min_match 2 and limit 2 gives (3, 9).
    """
    last, size = token_ids[-1], len(token_ids)
    ends: list[int] = []  # (exclusive) of the longest occurrences
    longest, end = min_match, 0
    for _ in range(token_ids.count(last) - 1):  # the last of them is the suffix itself
        end = token_ids.index(last, end) + 1
        length = 1
        while length < min(max_match, end) and token_ids[end - 1 - length] == token_ids[size - 1 - length]:
            length += 1
        if length > longest:
            ends, longest = [end], length
        elif length == longest:
            ends.append(end)
    if not ends:
        return ()
    end = next((end for end in reversed(ends) if size - end >= limit), ends[0])
    return tuple(token_ids[end : end + limit])
