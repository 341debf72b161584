"""The target's verdict on what was drafted: how many tokens stand, and which one follows them.

A sequence with k drafted tokens has k + 1 rows of the target's logits: one before each of them, and one after the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redraft.sampling.coupling import (
    DraftedTokens,
    Layout,
    Verdict,
    accept_choice,
    accept_maximal,
    expected_acceptance,
    keyed_race,
)
from redraft.sampling.logprobs import TeacherRow, teacher_rows
from redraft.sampling.params import Coupling
from redraft.sampling.processors import SamplingRow, adjusted_logits, peaks, probabilities
from redraft.sampling.randomness import Purpose, as_key_tensor, uniforms
from redraft.speculation.proposer import CERTAIN, Proposal
from redraft.speculation.state import SequenceState
from redraft.transfer import select_rows, upload


@dataclass(frozen=True, slots=True)
class SequenceVerdict:
    """Verdict on one sequence, on the host.

    Attributes:
        final_token: the recovered or bonus token, emitted behind the `num_accepted` ones.
        expected: expected acceptance at each position whose drafted token was reached.
        finite: whether every row that the verdict rests on has finite logits.
        labels: of all k + 1 rows; none if they were not asked for.
        probs: p of the emitted tokens, [num_accepted + 1, vocab_size]; None if nobody needed them.
    """

    num_accepted: int
    final_token: int
    expected: tuple[float, ...]
    finite: bool
    labels: tuple[TeacherRow, ...]
    probs: Tensor | None


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences that are verified by the same rule, with their rows one after another."""

    members: list[int]
    drafts: list[tuple[int, ...]]
    logits: Tensor  # [rows, vocab_size]
    sampling: list[SamplingRow]
    choice: list[int]  # the id of each row's largest logit


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows of the target's logits are whose.

    Attributes:
        of: by member, in the order of the rows.
        sampling: of every row.
        rules: the members by the rule that verifies them: None at temperature 0, else their coupling.
    """

    of: dict[int, range]
    sampling: list[SamplingRow]
    rules: dict[Coupling | None, list[int]]

    @classmethod
    def of_members(cls, states: Sequence[SequenceState], proposal: Proposal, members: Sequence[int]) -> Rows:
        of: dict[int, range] = {}
        sampling: list[SamplingRow] = []
        rules: dict[Coupling | None, list[int]] = {}
        for i in members:
            draft = proposal.sequences[i].token_ids
            of[i] = range(len(sampling), len(sampling) + len(draft) + 1)
            sampling += [states[i].sampling_row(draft[:j]) for j in range(len(draft) + 1)]
            rules.setdefault(None if states[i].params.is_greedy else states[i].coupling, []).append(i)
        return cls(of, sampling, rules)

    def all_of(self, members: Sequence[int]) -> list[int]:
        return [row for i in members for row in self.of[i]]


class Judgements:
    """What the rules have said, group by group; `verdicts` puts it together once all of it is on the host."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._members: list[int] = []
        self._probs: dict[int, Tensor] = {}

    def add(self, members: Sequence[int], probs: Tensor | None) -> None:
        """A group that is judged. `probs`: p of its rows, [rows, vocab_size], if anybody needs them."""
        self._members += members
        if probs is not None:
            self._probs |= dict(zip(members, torch.split(probs, [len(self._rows.of[i]) for i in members]), strict=True))

    def verdicts(
        self,
        num_accepted: Sequence[int],
        final_token: Sequence[int],
        expected: Sequence[float],
        finite: Sequence[bool],
        labels: Sequence[TeacherRow],
    ) -> dict[int, SequenceVerdict]:
        """By member. The first three are in the order of the groups, the others by row."""
        result: dict[int, SequenceVerdict] = {}
        tested = 0
        for i, count, token in zip(self._members, num_accepted, final_token, strict=True):
            own = self._rows.of[i]
            num_drafted = len(own) - 1
            result[i] = SequenceVerdict(
                count,
                token,
                tuple(expected[tested : tested + min(count + 1, num_drafted)]),
                all(finite[row] for row in own[: count + 1]),
                tuple(labels[row] for row in own) if labels else (),
                self._probs[i][: count + 1] if self._probs else None,
            )
            tested += num_drafted
        return result


def verify(
    states: Sequence[SequenceState],
    proposal: Proposal,
    members: Sequence[int],
    logits: Tensor,
    *,
    num_top: int = 0,
    with_probs: bool = False,
) -> dict[int, SequenceVerdict]:
    """Sample the next token of these sequences, or verify what was drafted for them.

    Args:
        members: indices into `states` and `proposal.sequences`.
        logits: [rows, vocab_size], the members' rows one after another.
        num_top: how many of the largest logits the labels keep; 0: no labels.
        with_probs: whether verdicts shall have p.
    """
    rows = Rows.of_members(states, proposal, members)
    # what a step costs here is in passes over [rows, vocab_size]: the one for the labels also finds the largest
    labels = teacher_rows(logits, num_top, rows.sampling) if num_top else ()
    if num_top:
        choice, finite = [row.ids[0] for row in labels], [math.isfinite(row.logsumexp) for row in labels]
    else:
        largest, choice = peaks(logits)
        finite = [math.isfinite(value) for value in largest]

    judgements = Judgements(rows)
    accepted: list[int] = []
    final: list[int] = []
    expected: list[float] = []
    for coupling, own in rows.rules.items():
        picked = rows.all_of(own)
        group = _Group(
            own,
            [proposal.sequences[i].token_ids for i in own],
            select_rows(logits, picked),
            [rows.sampling[row] for row in picked],
            [choice[row] for row in picked],
        )
        if coupling is None:
            verdict, alphas, probs = _judge_greedy(group, proposal, with_probs)
        else:
            verdict, alphas, probs = _judge_sampled(coupling, group, proposal, states)
        judgements.add(own, probs if with_probs else None)
        accepted += verdict.num_accepted
        final += verdict.final_token
        expected += alphas
    return judgements.verdicts(accepted, final, expected, finite, labels)


def row_keys(states: Sequence[SequenceState], num_drafts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """What each row's random numbers are made of, key and position, [rows] int64 each: row j of a sequence is output
    position n + j."""
    keys: list[int] = []
    positions: list[int] = []
    for state, count in zip(states, num_drafts, strict=True):
        keys += [state.key] * (count + 1)
        positions += range(state.num_output_tokens, state.num_output_tokens + count + 1)
    return as_key_tensor(keys, device), upload(positions, torch.int64, device)


def _judge_greedy(group: _Group, proposal: Proposal, with_probs: bool) -> tuple[Verdict, list[float], Tensor | None]:
    """At temperature 0: the verdict, expected acceptance per drafted token, and p if asked for."""
    choice = group.choice
    adjusted = adjusted_logits(group.logits, group.sampling)
    if adjusted is not group.logits:
        choice = peaks(adjusted)[1]
    probs = None
    if with_probs:
        probs = torch.zeros_like(group.logits, dtype=torch.float32)
        probs[range(len(choice)), choice] = 1.0
    return accept_choice(choice, group.drafts), _greedy_acceptance(choice, group, proposal), probs


def _greedy_acceptance(choice: Sequence[int], group: _Group, proposal: Proposal) -> list[float]:
    """Expected acceptance at every drafted token where p is one-hot: q of the target's pick."""
    alphas: list[float] = []
    first = 0
    for i, draft in zip(group.members, group.drafts, strict=True):
        picks = choice[first : first + len(draft)]
        first += len(draft) + 1
        for pick, token, row in zip(picks, draft, proposal.sequences[i].prob_rows, strict=True):
            alphas.append(float(pick == token) if row == CERTAIN else float(proposal.probs[row, pick]))
    return alphas


def _judge_sampled(
    coupling: Coupling, group: _Group, proposal: Proposal, states: Sequence[SequenceState]
) -> tuple[Verdict, list[float], Tensor]:
    """Above temperature 0: the verdict, expected acceptance per drafted token, and p."""
    device = group.logits.device
    probs = probabilities(group.logits, group.sampling)
    drafted, layout = proposal.drafted_tokens(group.members, device), Layout.of([len(d) for d in group.drafts], device)
    verdict = _couple(coupling, probs, drafted, layout, [states[i] for i in group.members], group.drafts)
    return verdict, expected_acceptance(probs, drafted, layout).tolist(), probs


def _couple(
    coupling: Coupling,
    probs: Tensor,
    drafted: DraftedTokens,
    layout: Layout,
    states: Sequence[SequenceState],
    drafts: Sequence[tuple[int, ...]],
) -> Verdict:
    """Apply one coupling with each sequence's own randomness."""
    keys, positions = row_keys(states, layout.num_drafts, probs.device)
    if coupling is Coupling.DRAFTER_INVARIANT:
        return accept_choice(keyed_race(probs, keys, positions).tolist(), drafts)
    accept = uniforms(keys, positions, Purpose.ACCEPT)[layout.draft_rows]
    # keyed by the row the token ends up on, which is known only after acceptance: give every row its own number
    return accept_maximal(probs, drafted, layout, accept, uniforms(keys, positions, Purpose.RECOVER))
