"""The target's verdict on what was drafted: how many tokens stand, and which one follows them.

A sequence with k drafted tokens has k + 1 rows of the target's logits: one before each of them, and one after the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

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
from redraft.transfer import upload


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
    """
    drafts = [proposal.sequences[i].token_ids for i in members]
    sampling = [states[i].sampling_row(d[:j]) for i, d in zip(members, drafts, strict=True) for j in range(len(d) + 1)]
    # what a step costs here is in passes over [rows, vocab_size]: the one for the labels also finds the largest
    labels = teacher_rows(logits, num_top, sampling) if num_top else ()
    if num_top:
        choice, finite = [row.ids[0] for row in labels], [math.isfinite(row.logsumexp) for row in labels]
    else:
        largest, ids = peaks(logits)
        choice, finite = ids, [math.isfinite(value) for value in largest]

    ends = accumulate(len(d) + 1 for d in drafts)
    rows_of = {i: range(end - len(d) - 1, end) for i, d, end in zip(members, drafts, ends, strict=True)}
    result: dict[int, SequenceVerdict] = {}
    for coupling, own in by_rule(states, members).items():
        rows = [row for i in own for row in rows_of[i]]
        group = _Group(
            own,
            [proposal.sequences[i].token_ids for i in own],
            logits if len(rows) == len(logits) else logits[rows],
            [sampling[row] for row in rows],
            [choice[row] for row in rows],
        )
        if coupling is None:
            verdict, alphas, probs = _judge_greedy(group, proposal, with_probs)
        else:
            verdict, alphas, probs = _judge_sampled(coupling, group, proposal, states)
        tested = start = 0
        for i, d, count, token in zip(own, group.drafts, verdict.num_accepted, verdict.final_token, strict=True):
            rests_on = rows_of[i][: count + 1]
            result[i] = SequenceVerdict(
                count,
                token,
                tuple(alphas[tested : tested + min(count + 1, len(d))]),
                all(finite[row] for row in rests_on),
                tuple(labels[row] for row in rows_of[i]) if labels else (),
                None if probs is None else probs[start : start + count + 1],
            )
            tested += len(d)
            start += len(d) + 1
    return result


def by_rule(states: Sequence[SequenceState], members: Sequence[int]) -> dict[Coupling | None, list[int]]:
    """The members by the rule that verifies them: None at temperature 0, else their coupling."""
    rules: dict[Coupling | None, list[int]] = {}
    for i in members:
        rules.setdefault(None if states[i].params.is_greedy else states[i].coupling, []).append(i)
    return rules


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
