"""Drafting and verification that never ask the device for anything, so that the host runs ahead of it.

What `draft_model` and `verify` decide at the host, token by token, a GPU decides for itself here: drafted tokens stay
on it and go straight into the next pass, and of a whole step only the verdicts come down, once. The rules, the random
numbers and so the output are the same; what is given up is the look at each token's sureness before going on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
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
from redraft.speculation.proposer import CERTAIN, NO_PROBS, Proposal
from redraft.speculation.state import SequenceState
from redraft.speculation.verify import SequenceVerdict, by_rule, row_keys
from redraft.transfer import Download, upload

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
            draft.tokens.append(-1 - len(drawn) - index)
            draft.rows.append(CERTAIN if draft.is_greedy else num_rows)
            num_rows += not draft.is_greedy
        probs.append(q)
        drawn = torch.cat([drawn, tokens])
        active = [draft for draft in active if len(draft.tokens) < draft.limit]
        if not active:
            return probs, drawn
        logits = runner.forward([draft.next_chunk() for draft in active], drawn)


def _drawn(logits: Tensor, drafts: Sequence[Draft]) -> tuple[Tensor, Tensor]:
    """A token per row of logits [drafts, vocab_size], [drafts] int64, and the q of those not drawn greedily."""
    rows = [draft.state.sampling_row(draft.tokens) for draft in drafts]
    tokens = torch.empty(len(drafts), dtype=torch.int64, device=logits.device)
    greedy = [i for i, draft in enumerate(drafts) if draft.is_greedy]
    sampled = [i for i, draft in enumerate(drafts) if not draft.is_greedy]
    if greedy:
        scores = adjusted_logits(_rows(logits, greedy), [rows[i] for i in greedy])
        tokens = tokens.index_copy(0, upload(greedy, torch.int64, logits.device), scores.argmax(dim=1))
    if not sampled:
        return tokens, NO_PROBS
    q = probabilities(_rows(logits, sampled), [rows[i] for i in sampled])
    # a draft whose logits overflow must cost acceptance, not correctness: its token is drawn uniformly
    q = torch.where(q.isnan(), 1.0 / q.shape[1], q)
    racing = [at for at, i in enumerate(sampled) if drafts[i].state.coupling is Coupling.DRAFTER_INVARIANT]
    others = [at for at, i in enumerate(sampled) if drafts[i].state.coupling is not Coupling.DRAFTER_INVARIANT]
    for members in filter(None, (racing, others)):
        own = [drafts[sampled[at]] for at in members]
        keys = as_key_tensor([draft.state.key for draft in own], q.device)
        ahead = [draft.state.num_output_tokens + len(draft.tokens) for draft in own]
        positions = upload(ahead, torch.int64, q.device)
        mine = _rows(q, members)
        picks = (
            keyed_race(mine, keys, positions)
            if members is racing
            else draw(mine, uniforms(keys, positions, Purpose.DRAFT))
        )
        tokens = tokens.index_copy(0, upload([sampled[at] for at in members], torch.int64, q.device), picks)
    return tokens, q


def _rows(logits: Tensor, indices: list[int]) -> Tensor:
    """These rows, in ascending order; without a copy if they are all."""
    return (
        logits if len(indices) == len(logits) else logits.index_select(0, upload(indices, torch.int64, logits.device))
    )


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
    drafts = [proposal.sequences[i].token_ids for i in members]
    sampling = [states[i].sampling_row(d[:j]) for i, d in zip(members, drafts, strict=True) for j in range(len(d) + 1)]
    labels = summaries(logits, num_top, sampling) if num_top else ()
    finite = (labels[2] if labels else logits.max(dim=1).values).isfinite()
    ends = accumulate(len(d) + 1 for d in drafts)
    rows_of = {i: range(end - len(d) - 1, end) for i, d, end in zip(members, drafts, ends, strict=True)}
    order: list[int] = []
    accepted, final, expected = ([torch.empty(0, dtype=torch.int64, device=device)] for _ in range(3))
    probs: dict[int, Tensor] = {}
    for coupling, own in by_rule(states, members).items():
        rows = [row for i in own for row in rows_of[i]]
        verdict = _judged(
            coupling,
            [states[i] for i in own],
            _rows(logits, rows),
            [sampling[row] for row in rows],
            proposal.drafted_tokens(own, device),
            Layout.of([len(proposal.sequences[i].token_ids) for i in own], device),
            with_probs,
        )
        for each, part in zip((accepted, final, expected), verdict[:3], strict=True):
            each.append(part)
        order += own
        if with_probs:
            counts = [len(rows_of[i]) for i in own]
            probs |= dict(zip(own, torch.split(verdict[3], counts), strict=True))
    known = proposal.drawn if proposal.drawn is not None else torch.empty(0, dtype=torch.int64)
    download = Download(torch.cat(accepted), torch.cat(final), torch.cat(expected), finite, known, *labels)

    def collect() -> tuple[Verdicts, Proposal]:
        counts, tokens, alphas, is_finite, drawn, *rows_kept = download.wait()
        kept = as_teacher_rows((rows_kept[0], rows_kept[1], rows_kept[2], rows_kept[3]), sampling) if rows_kept else ()
        good, alpha = is_finite.tolist(), alphas.tolist()
        verdicts: Verdicts = {}
        tested = 0
        for i, count, token in zip(order, counts.tolist(), tokens.tolist(), strict=True):
            rows, num_drafted = rows_of[i], len(rows_of[i]) - 1
            verdicts[i] = SequenceVerdict(
                count,
                token,
                tuple(alpha[tested : tested + min(count + 1, num_drafted)]),
                all(good[row] for row in rows[: count + 1]),
                tuple(kept[row] for row in rows) if kept else (),
                probs[i][: count + 1] if with_probs else None,
            )
            tested += num_drafted
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
