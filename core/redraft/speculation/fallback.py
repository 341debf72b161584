"""Several proposers in order of preference: whoever has something to say about a sequence speaks for it."""

from __future__ import annotations

from collections.abc import Sequence

from redraft.speculation.proposer import Gathered, Proposal, Proposer, SequenceProposal
from redraft.speculation.state import SequenceState


class FallbackProposer:
    """Asks the first proposer for every sequence, the next for those that got nothing, and so on."""

    def __init__(self, proposers: Sequence[Proposer]) -> None:
        self.proposers = {proposer.name: proposer for proposer in proposers}
        self.name = "+".join(self.proposers)

    def propose(self, states: Sequence[SequenceState], limits: Sequence[int]) -> Proposal:
        gathered = Gathered(len(states))
        open_indices = [index for index, limit in enumerate(limits) if limit > 0]
        for proposer in self.proposers.values():
            if not open_indices:
                break
            part = proposer.propose([states[i] for i in open_indices], [limits[i] for i in open_indices])
            gathered.add(open_indices, part)
            open_indices = [index for index in open_indices if not gathered.chosen[index].token_ids]
        return gathered.proposal()

    def settle(self, state: SequenceState, num_accepted: int, proposal: SequenceProposal) -> None:
        self.proposers[proposal.proposer].settle(state, num_accepted, proposal)
