"""Drafting and verification that never ask the device for anything, so that the host runs ahead of it.

What `draft_model` and `verify` decide at the host, token by token, a GPU decides for itself here: drafted tokens stay
on it and go straight into the next pass, and of a whole step only the verdicts come down, once. The rules, the random
numbers and so the output are the same; what is given up is the look at each token's sureness before going on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from redraft.models.runner import ModelRunner
from redraft.sampling.coupling import (
    DraftedTokens,
    Layout,
    draw,
    expected_acceptance,
    keyed_race,
    settle_choice,
    settle_maximal,
)
from redraft.sampling.logprobs import as_teacher_rows, summaries
from redraft.sampling.params import Coupling
from redraft.sampling.processors import SamplingRow, adjusted_logits, probabilities
from redraft.sampling.randomness import Purpose, as_key_tensor, uniforms
from redraft.speculation.proposer import NO_PROBS, Proposal
from redraft.speculation.state import SequenceState
from redraft.speculation.verify import Judgements, Rows, SequenceVerdict, row_keys
from redraft.transfer import Download, in_order, select_rows, upload

if TYPE_CHECKING:
    from redraft.speculation.draft_model import Draft


def draft_ahead(runner: ModelRunner, drafts: Sequence[Draft], logits: Tensor) -> tuple[list[Tensor], Tensor]:
    """Fill every draft up to its limit, by one pass for each token but the first.

    Args:
        drafts: without tokens yet, in sequences without penalties, which would need the tokens at the host. They are
            given references into the result, see `SequenceProposal`.
        logits: of the draft model where each sequence ends, [drafts, vocab_size].

    Returns:
        The parts of `Proposal.probs`, and `Proposal.drawn`.
    """
    probs: list[Tensor] = []
    drawn = torch.empty(0, dtype=torch.int64, device=logits.device)
    num_rows = 0
    active = list(drafts)
    while True:
        tokens, q = _drawn(logits, active)
        for index, draft in enumerate(active):
            num_rows = draft.take(-1 - len(drawn) - index, num_rows)
        probs.append(q)
        drawn = torch.cat([drawn, tokens])
        active = [draft for draft in active if len(draft.tokens) < draft.limit]
        if not active:
            return probs, drawn
        logits = runner.forward([draft.next_chunk() for draft in active], drawn)


def _drawn(logits: Tensor, drafts: Sequence[Draft]) -> tuple[Tensor, Tensor]:
    """A token per row of logits [drafts, vocab_size], [drafts] int64, and the q of those not drawn greedily."""
    rows = [draft.state.sampling_row(draft.tokens) for draft in drafts]
    greedy = [i for i, draft in enumerate(drafts) if draft.is_greedy]
    sampled = [i for i, draft in enumerate(drafts) if not draft.is_greedy]
    parts: list[tuple[list[int], Tensor]] = []
    q = NO_PROBS
    if greedy:
        scores = adjusted_logits(select_rows(logits, greedy), [rows[i] for i in greedy])
        parts.append((greedy, scores.argmax(dim=1)))
    if sampled:
        q = probabilities(select_rows(logits, sampled), [rows[i] for i in sampled])
        # a draft whose logits overflow must cost acceptance, not correctness: its token is drawn uniformly
        q = torch.where(q.isnan(), 1.0 / q.shape[1], q)
        parts.append((sampled, sample(q, [drafts[i] for i in sampled])))
    return in_order(parts), q


def sample(q: Tensor, drafts: Sequence[Draft]) -> Tensor:
    """Draw one token per row of q [drafts, vocab_size], each by its sequence's coupling: [drafts] int64."""
    racing = [i for i, draft in enumerate(drafts) if draft.state.coupling is Coupling.DRAFTER_INVARIANT]
    others = [i for i, draft in enumerate(drafts) if draft.state.coupling is not Coupling.DRAFTER_INVARIANT]
    parts: list[tuple[list[int], Tensor]] = []
    for members, pick in ((racing, keyed_race), (others, _draw_by_key)):
        if members:
            keys = as_key_tensor([drafts[i].state.key for i in members], q.device)
            at = [drafts[i].state.num_output_tokens + len(drafts[i].tokens) for i in members]
            parts.append((members, pick(select_rows(q, members), keys, upload(at, torch.int64, q.device))))
    return in_order(parts)


def _draw_by_key(q: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
    return draw(q, uniforms(keys, positions, Purpose.DRAFT))


Verdicts = dict[int, SequenceVerdict]


def verify_ahead(
    states: Sequence[SequenceState],
    proposal: Proposal,
    members: Sequence[int],
    logits: Tensor,
    *,
    num_top: int = 0,
    with_probs: bool = False,
) -> Callable[[], tuple[Verdicts, Proposal]]:
    """As `verify`, but only the function it returns waits, and gives the proposal with its tokens known besides."""
    device = logits.device
    rows = Rows.of_members(states, proposal, members)
    labels = summaries(logits, num_top, rows.sampling) if num_top else ()
    finite = (labels[2] if labels else logits.max(dim=1).values).isfinite()
    judgements = Judgements(rows)
    accepted, final, expected = ([torch.empty(0, dtype=torch.int64, device=device)] for _ in range(3))
    for coupling, own in rows.rules.items():
        picked = rows.all_of(own)
        *verdict, probs = _judged(
            coupling,
            [states[i] for i in own],
            select_rows(logits, picked),
            [rows.sampling[row] for row in picked],
            proposal.drafted_tokens(own, device),
            Layout.of([len(rows.of[i]) - 1 for i in own], device),
            with_probs,
        )
        for each, part in zip((accepted, final, expected), verdict, strict=True):
            each.append(part)
        judgements.add(own, probs if with_probs else None)
    known = proposal.drawn if proposal.drawn is not None else torch.empty(0, dtype=torch.int64)
    download = Download(torch.cat(accepted), torch.cat(final), torch.cat(expected), finite, known, *labels)

    def collect() -> tuple[Verdicts, Proposal]:
        counts, tokens, alphas, is_finite, drawn, *kept = download.wait()
        named = as_teacher_rows((kept[0], kept[1], kept[2], kept[3]), rows.sampling) if kept else ()
        verdicts = judgements.verdicts(counts.tolist(), tokens.tolist(), alphas.tolist(), is_finite.tolist(), named)
        return verdicts, proposal.with_known(drawn.tolist())

    return collect


def _judged(
    coupling: Coupling | None,
    states: Sequence[SequenceState],
    logits: Tensor,
    sampling: Sequence[SamplingRow],
    drafted: DraftedTokens,
    layout: Layout,
    with_probs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By one rule (None: greedy): number accepted and last token [sequences] int64, expected acceptance [drafted
    tokens] float32, p [rows, vocab_size] if wanted."""
    if coupling is None:
        choice = adjusted_logits(logits, sampling).argmax(dim=1)
        p = torch.nn.functional.one_hot(choice, logits.shape[1]).float() if with_probs else logits[:0]
        return *settle_choice(choice, drafted, layout), drafted.probability_of(choice[layout.draft_rows]), p
    p = probabilities(logits, sampling)
    alphas = expected_acceptance(p, drafted, layout)
    keys, positions = row_keys(states, layout.num_drafts, p.device)
    if coupling is Coupling.DRAFTER_INVARIANT:
        return *settle_choice(keyed_race(p, keys, positions), drafted, layout), alphas, p
    accept = uniforms(keys, positions, Purpose.ACCEPT)[layout.draft_rows]
    recover = uniforms(keys, positions, Purpose.RECOVER)
    return *settle_maximal(p, drafted, layout, accept, recover), alphas, p
