"""What a proposer promises: tokens, and the q each of them was drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from redraft.models.buckets import resolved
from redraft.sampling.coupling import DraftedTokens
from redraft.speculation.state import SequenceState
from redraft.transfer import upload

CERTAIN = -1


@dataclass(frozen=True, slots=True)
class SequenceProposal:
    """Drafted tokens of one sequence.

    A token below 0 is not known to the host yet: -1 - i stands for `Proposal.drawn[i]`.
    `prob_rows[j]` is the row of `Proposal.probs` that token j was drawn from, or CERTAIN where q is one-hot.
    `sureness[j]` is the largest probability where token j was drawn; nothing if that was not looked at.
    """

    token_ids: tuple[int, ...] = ()
    prob_rows: tuple[int, ...] = ()
    proposer: str = ""
    draft_version: str = ""
    sureness: tuple[float, ...] = ()


NOTHING = SequenceProposal()


@dataclass(frozen=True, slots=True)
class Proposal:
    sequences: tuple[SequenceProposal, ...]
    probs: Tensor  # [model-proposed tokens, vocab_size] float32; `NO_PROBS` if all are certain
    drawn: Tensor | None = None  # [any] int64, tokens that are on the device only

    def drafted_tokens(self, order: Sequence[int], device: torch.device | str) -> DraftedTokens:
        """The tokens of the sequences listed in `order`, flattened for the couplings, on the target's device."""
        ids = [token for index in order for token in self.sequences[index].token_ids]
        rows = [row for index in order for row in self.sequences[index].prob_rows]
        tokens = upload(ids, torch.int64, device)
        return DraftedTokens(
            tokens if self.drawn is None else resolved(tokens, self.drawn.to(device)),
            upload(rows, torch.int64, device),
            self.probs.to(device),
        )

    def on_host(self) -> Proposal:
        """The same with every token known. Waits for the device if there is anything to wait for."""
        return self if self.drawn is None else self.with_known(self.drawn.tolist())

    def with_known(self, drawn: Sequence[int]) -> Proposal:
        """The same, given what `drawn` holds."""

        def known(proposal: SequenceProposal) -> SequenceProposal:
            tokens = tuple(token if token >= 0 else drawn[-1 - token] for token in proposal.token_ids)
            return replace(proposal, token_ids=tokens)

        return Proposal(tuple(map(known, self.sequences)), self.probs)


NO_PROBS = torch.empty(0, 0)


def nothing_proposed(count: int) -> Proposal:
    return Proposal((NOTHING,) * count, NO_PROBS)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The `probs` of several proposals, one after another; without a copy if only one has any."""
    filled = [part for part in parts if len(part)]
    if len(filled) > 1:
        return torch.cat(filled)
    return filled[0] if filled else NO_PROBS


class Gathered:
    """Proposals for parts of a batch of `count` sequences, put together; NOTHING for sequences that are in none."""

    def __init__(self, count: int) -> None:
        self.chosen = [NOTHING] * count
        self._probs: list[Tensor] = []
        self._drawn: list[Tensor] = []
        self._num_rows = self._num_drawn = 0

    def add(self, members: Sequence[int], part: Proposal) -> None:
        """What was proposed for the sequences at these indices."""
        for index, proposal in zip(members, part.sequences, strict=True):
            self.chosen[index] = _shifted(proposal, self._num_rows, self._num_drawn)
        self._probs.append(part.probs)
        self._num_rows += len(part.probs)
        if part.drawn is not None:
            self._drawn.append(part.drawn)
            self._num_drawn += len(part.drawn)

    def proposal(self) -> Proposal:
        return Proposal(tuple(self.chosen), joined(self._probs), torch.cat(self._drawn) if self._drawn else None)


def _shifted(proposal: SequenceProposal, num_rows: int, num_drawn: int) -> SequenceProposal:
    """The same proposal behind so many rows and drawn tokens of others."""
    if num_rows == num_drawn == 0:
        return proposal
    rows = tuple(row if row == CERTAIN else row + num_rows for row in proposal.prob_rows)
    tokens = tuple(token if token >= 0 else token - num_drawn for token in proposal.token_ids)
    return replace(proposal, token_ids=tokens, prob_rows=rows)


class Proposer(Protocol):
    """Any source of drafted tokens. Losslessness never depends on it, only speed does."""

    name: str

    def propose(self, states: Sequence[SequenceState], limits: Sequence[int]) -> Proposal:
        """Draft at most limits[i] tokens to follow states[i].token_ids; fewer, also none, is always allowed.

        `block_ids` of every state covers len(token_ids) + limits[i] positions.
        """

    def settle(self, state: SequenceState, num_accepted: int, proposal: SequenceProposal) -> None:
        """Called after verification, before the accepted tokens are appended to the state."""
