"""Several versions of the draft in service at once, each with its own share of the sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from redraft.speculation.draft_model import DraftModelProposer
from redraft.speculation.proposer import Gathered, Proposal, SequenceProposal
from redraft.speculation.state import SequenceState

NO_EPOCH = -1


class DraftRouter:
    """A proposer made of draft models, one per version; every sequence is drafted for by one of them.

    A sequence gets its version from `SequenceState.route` and the shares at that time, and keeps it for as long as
    the version is here: changing the shares touches new sequences only. If its version leaves, the next question moves
    it to one that is here, whose epoch differs, so that its draft KV is rebuilt before the next proposal. All samples
    of a request have one route, so they share a version and the prompt's draft KV.

    Not thread-safe: on the engine thread, between steps for everything that changes it.
    """

    name = DraftModelProposer.name

    def __init__(self) -> None:
        self._drafts: dict[str, DraftModelProposer] = {}
        self._shares: list[tuple[str, float]] = []  # (version, end of its interval in [0, 1])

    @property
    def versions(self) -> tuple[str, ...]:
        """Versions that draft for somebody, or did and may still."""
        return tuple(self._drafts)

    def set(self, drafts: Mapping[str, DraftModelProposer], shares: Mapping[str, float]) -> None:
        """Put these drafts into service.

        Args:
            drafts: by version; every one an epoch of its own. Those of now that are missing leave at once.
            shares: of new sequences, by version; they add up to 1, or there are none and nothing is drafted for
                new sequences. A draft without a share goes on with the sequences it has.
        """
        total = sum(shares.values())
        if shares and (min(shares.values()) < 0.0 or abs(total - 1.0) > 1e-6 or not shares.keys() <= drafts.keys()):
            raise ValueError(f"shares must be of drafts that are here and add up to 1: {dict(shares)}")
        self._drafts = dict(drafts)
        self._shares = []
        end = 0.0
        for version, share in sorted(shares.items()):
            if share > 0.0:
                end += share / total
                self._shares.append((version, end))
        for draft in self._drafts.values():
            if draft.length is not None:
                draft.length.is_on_trial = len(self._shares) > 1

    def epoch_of(self, state: SequenceState) -> int:
        """Epoch of the draft that the sequence belongs to, chosen now if it has none; NO_EPOCH without drafts."""
        draft = self._draft_of(state)
        return NO_EPOCH if draft is None else draft.epoch

    def propose(self, states: Sequence[SequenceState], limits: Sequence[int]) -> Proposal:
        groups: dict[str, list[int]] = {}
        for index, limit in enumerate(limits):
            if limit > 0 and (draft := self._draft_of(states[index])) is not None:
                groups.setdefault(draft.version, []).append(index)
        gathered = Gathered(len(states))
        for version, members in groups.items():
            part = self._drafts[version].propose([states[i] for i in members], [limits[i] for i in members])
            gathered.add(members, part)
        return gathered.proposal()

    def settle(self, state: SequenceState, num_accepted: int, proposal: SequenceProposal) -> None:
        self._drafts[proposal.draft_version].settle(state, num_accepted, proposal)

    def _draft_of(self, state: SequenceState) -> DraftModelProposer | None:
        draft = self._drafts.get(state.draft_version)
        if draft is None and self._shares:
            place = state.route / 2.0**64
            # rounding may leave the last end a hair below 1
            state.draft_version = next((version for version, end in self._shares if place < end), self._shares[-1][0])
            draft = self._drafts[state.draft_version]
        return draft
