"""Prompt lookup (Saxena 2023): the continuation of the latest earlier occurrence of the last n tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from redraft.speculation.length import LengthController
from redraft.speculation.proposer import CERTAIN, NOTHING, Proposal, SequenceProposal
from redraft.speculation.state import SequenceState


class NgramProposer:
    """Proposes without a model; its q is one-hot.

    Args:
        vocab_size: of the target.
        min_match, max_match: n-gram lengths tried, longest first.
        length: chooses how many tokens of a match to propose; None: as many as allowed.
    """

    name = "ngram"

    def __init__(
        self,
        vocab_size: int,
        *,
        min_match: int = 2,
        max_match: int = 4,
        length: LengthController | None = None,
    ) -> None:
        assert 1 <= min_match <= max_match
        self.vocab_size = vocab_size
        self.min_match = min_match
        self.max_match = max_match
        self.length = length

    def propose(self, states: Sequence[SequenceState], limits: Sequence[int]) -> Proposal:
        if self.length is not None:
            limits = self.length.choose(states, limits)
        return Proposal(
            tuple(self._propose_one(state, limit) for state, limit in zip(states, limits, strict=True)),
            torch.empty(0, self.vocab_size),
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
    ids = torch.tensor(token_ids)
    # candidates end (exclusively) at 1 .. len - 1: an occurrence must have at least one token after it
    matches = torch.ones(len(ids) - 1, dtype=torch.bool)
    best: torch.Tensor | None = None
    for back in range(min(max_match, len(ids) - 1)):
        last = len(ids) - 1 - back
        same = torch.zeros_like(matches)
        same[back:] = ids[: len(matches) - back] == ids[last]
        matches &= same
        if not bool(matches.any()):
            break
        if back + 1 >= min_match:
            best = matches.clone()
    if best is None:
        return ()
    ends = (best.nonzero().flatten() + 1).tolist()
    end = next((end for end in reversed(ends) if len(token_ids) - end >= limit), ends[0])
    return tuple(token_ids[end : end + limit])
