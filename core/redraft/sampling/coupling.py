"""The two ways of tying a draft's token to the target's distribution, both lossless for any draft (docs/lossless.md).

A verified sequence has k drafted tokens d_0..d_{k-1}, the q rows they were drawn from, and k + 1 target rows p_0..p_k.
Both rules emit the longest accepted prefix plus one token of the target's own: *recovered* if a draft token was
rejected, *bonus* if none was.

- `accept_maximal`: rejection sampling (Leviathan et al. 2023, Chen et al. 2023). d_j is accepted with probability
  min(1, p_j(d_j) / q_j(d_j)); a rejected one is replaced by a draw from max(p_j - q_j, 0), normalised. No coupling
  accepts more often: the rate is the expected acceptance sum_v min(p_v, q_v).
- `keyed_race` with `accept_choice`: the exponential race (Daliri et al. 2024). Both models pick argmin_v E_v / prob_v
  with the same E, so the emitted token is the target's own pick whatever the draft said: text does not depend on the
  draft at all.

Rows of several sequences are flattened; `Layout` says which row belongs to whom. Randomness is an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from redraft.kernels.library import kernels_for
from redraft.sampling.randomness import Purpose, exponentials, row_bits
from redraft.transfer import upload

_DRAW_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each sequence's rows lie among the flattened target rows.

    Sequence b owns rows first_row[b] .. first_row[b] + num_drafts[b]; example: num_drafts (2, 0, 1) gives
    first_row (0, 3, 4), num_rows 6, draft_rows [0, 1, 4] (the rows that test a drafted token).
    """

    num_drafts: tuple[int, ...]
    first_row: tuple[int, ...]
    draft_rows: Tensor  # [drafted tokens] int64

    @classmethod
    def of(cls, num_drafts: Sequence[int], device: torch.device | str = "cpu") -> Layout:
        first_row = tuple(accumulate((count + 1 for count in num_drafts[:-1]), initial=0)) if num_drafts else ()
        tested = [
            row for first, count in zip(first_row, num_drafts, strict=True) for row in range(first, first + count)
        ]
        return cls(tuple(num_drafts), first_row, upload(tested, torch.int64, device))

    @property
    def num_rows(self) -> int:
        return len(self.num_drafts) + sum(self.num_drafts)

    def accepted(self, tests: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where each sequence's accepted prefix ends, without asking the device.

        tests [drafted tokens] bool -> [sequences] int64 each: how many tokens it has, the row after it, and the index
        of the drafted token that was rejected there (-1: none).
        """
        longest, total = max(self.num_drafts, default=0), sum(self.num_drafts)
        start = accumulate(self.num_drafts[:-1], initial=0) if self.num_drafts else ()
        padded = [
            [*range(first, first + count), *([total] * (longest + 1 - count))]
            for first, count in zip(start, self.num_drafts, strict=True)
        ]
        drafts = upload(padded, torch.int64, tests.device).view(-1, longest + 1)
        passed = torch.nn.functional.pad(tests, (0, 1))[drafts]  # what is behind a sequence's last token fails
        num_accepted = passed.long().cumprod(dim=1).sum(dim=1)
        rejected = drafts.gather(1, num_accepted.unsqueeze(1)).squeeze(1)
        rows = upload(self.first_row, torch.int64, tests.device) + num_accepted
        return num_accepted, rows, torch.where(rejected == total, -1, rejected)


@dataclass(frozen=True, slots=True)
class DraftedTokens:
    """The drafted tokens of a step and the distributions they were drawn from.

    `probs` has one row per token that a model proposed; a token proposed with certainty (n-gram lookup) has none:
    its q is the one-hot row, stored as `prob_row` -1.
    """

    token_ids: Tensor  # [drafted tokens] int64
    prob_row: Tensor  # [drafted tokens] int64, -1: one-hot
    probs: Tensor  # [model-proposed tokens, vocab_size] float32

    def probability_of(self, token_ids: Tensor) -> Tensor:
        """q of other tokens, one in the place of each drafted one: [drafted tokens] int64 -> float32."""
        certain = (token_ids == self.token_ids).float()
        if not len(self.probs):
            return certain
        return torch.where(self.prob_row < 0, certain, self.probs[self.prob_row.clamp(min=0), token_ids])

    def residuals(self, rows: Tensor, drafts: Tensor) -> Tensor:
        """max(p - q, 0) where a drafted token was rejected, not normalised; p itself elsewhere.

        rows: p, [sequences, vocab_size]. drafts: index of the rejected token, [sequences] int64, -1: none.
        """
        if not len(self.token_ids):
            return rows
        own = drafts.clamp(min=0)
        is_certain = self.prob_row[own] < 0
        rest = rows.scatter_add(1, self.token_ids[own].unsqueeze(1), -is_certain.to(rows.dtype).unsqueeze(1))
        if len(self.probs):
            rest = torch.where(is_certain.unsqueeze(1), rest, rest - self.probs[self.prob_row[own].clamp(min=0)])
        rest = rest.clamp(min=0.0)
        # p equal to q up to rounding: a rejection has probability ~1e-7 and p itself is the limit of the residual
        has_none = (drafts < 0).unsqueeze(1) | (rest.sum(dim=1, keepdim=True) <= 0.0)
        return torch.where(has_none, rows, rest)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Per sequence, on the host."""

    num_accepted: tuple[int, ...]
    final_token: tuple[int, ...]  # the recovered or bonus token


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF draw: probs [rows, vocab_size] (need not be normalised), uniforms [rows] in (0, 1) -> ids [rows].

    Two searches in float64, first for the block of ids and then inside it, because a cumulative sum over a whole
    vocabulary is slow. Never returns an id of probability 0: the sum is flat there and the search takes the first id
    above.
    """
    kernels = kernels_for(probs)
    if kernels is not None:
        return kernels.draw(probs.contiguous(), uniforms.double().contiguous())
    rows = torch.arange(probs.shape[0], device=probs.device)
    blocks = torch.nn.functional.pad(probs, (0, -probs.shape[1] % _DRAW_BLOCK)).view(len(rows), -1, _DRAW_BLOCK)
    masses = blocks.sum(dim=2, dtype=torch.float64)
    block, rest = _search(masses, uniforms.double() * masses.sum(dim=1))
    inside, _ = _search(blocks[rows, block].double(), rest)
    return block * _DRAW_BLOCK + inside


def _search(masses: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The entry of masses [rows, n] at which the cumulative sum passes target [rows], and the target's rest in it."""
    cumulative = masses.cumsum(dim=1)
    # rounding can bring the target up to the total itself: then the last entry with any mass is meant
    total = cumulative[:, -1]
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    # a row of NaN (its sequence is about to fail) must not end the batch: any entry will do
    found = torch.searchsorted(cumulative, target.unsqueeze(1), right=True).clamp(max=masses.shape[1] - 1)
    before = (cumulative - masses).gather(1, found).squeeze(1)
    return found.squeeze(1), (target - before).clamp(min=0.0)


def race(probs: Tensor, exponentials: Tensor) -> Tensor:
    """argmin_v E_v / p_v: probs, exponentials [rows, vocab_size] -> ids [rows], distributed as probs."""
    return (exponentials / probs).argmin(dim=1)


def keyed_race(probs: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
    """The race with the exponential numbers of (key, position): probs [rows, vocab_size], keys and positions [rows]
    int64 -> ids [rows]. Whoever holds the same key and position, and nearly the same distribution, picks alike."""
    kernels = kernels_for(probs)
    if kernels is not None:
        return kernels.race(probs.contiguous(), row_bits(keys, positions, Purpose.RACE))
    return race(probs, exponentials(keys, positions, probs.shape[1]))


def accept_maximal(
    target: Tensor, drafted: DraftedTokens, layout: Layout, accept_uniforms: Tensor, recover_uniforms: Tensor
) -> Verdict:
    """Rejection sampling.

    Args:
        target: p, [layout.num_rows, vocab_size] float32, rows sum to 1.
        accept_uniforms: [drafted tokens] in (0, 1).
        recover_uniforms: [layout.num_rows] in (0, 1); a sequence uses that of the row its last token is drawn at.
    """
    tests = _tests(target, drafted, layout, accept_uniforms).tolist()
    num_accepted, rows, rejected, start = [], [], [], 0
    for first, count in zip(layout.first_row, layout.num_drafts, strict=True):
        accepted = [*tests[start : start + count], False].index(False)
        num_accepted.append(accepted)
        rows.append(first + accepted)
        rejected.append(start + accepted if accepted < count else -1)  # its index among all drafted tokens
        start += count
    final_rows, drafts = (upload(each, torch.int64, target.device) for each in (rows, rejected))
    tokens = _recovered(target, final_rows, drafted, drafts, recover_uniforms[final_rows])
    return Verdict(tuple(num_accepted), tuple(tokens.tolist()))


def settle_maximal(
    target: Tensor, drafted: DraftedTokens, layout: Layout, accept_uniforms: Tensor, recover_uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """As `accept_maximal`, on the device: number accepted and last token, [sequences] int64 each."""
    num_accepted, rows, rejected = layout.accepted(_tests(target, drafted, layout, accept_uniforms))
    return num_accepted, draw(drafted.residuals(target[rows], rejected), recover_uniforms[rows])


def _tests(target: Tensor, drafted: DraftedTokens, layout: Layout, uniforms: Tensor) -> Tensor:
    """Whether each drafted token passes: u < p / q. [drafted tokens] bool."""
    return uniforms * drafted.probability_of(drafted.token_ids) < target[layout.draft_rows, drafted.token_ids]


def settle_choice(choice: Tensor, drafted: DraftedTokens, layout: Layout) -> tuple[Tensor, Tensor]:
    """As `accept_choice`, on the device: choice [layout.num_rows] int64 -> number accepted and last token,
    [sequences] int64 each."""
    num_accepted, rows, _ = layout.accepted(choice[layout.draft_rows] == drafted.token_ids)
    return num_accepted, choice[rows]


def _recovered(target: Tensor, rows: Tensor, drafted: DraftedTokens, drafts: Tensor, chances: Tensor) -> Tensor:
    """Draw each sequence's last token at its row of `target`: from p, or from the residual max(p - q, 0) where
    drafted token `drafts` [sequences] was rejected (-1: none). [sequences] int64."""
    kernels = kernels_for(target) and kernels_for(drafted.probs)
    if kernels is not None:
        own = drafts.clamp(min=0)
        if len(drafted.token_ids):
            tokens, q_rows = drafted.token_ids[own], torch.where(drafts < 0, -2, drafted.prob_row[own])
        else:
            tokens, q_rows = own, torch.full_like(drafts, -2)
        return kernels.recover(target.contiguous(), rows, drafted.probs.contiguous(), q_rows, tokens, chances.double())
    return draw(drafted.residuals(target[rows], drafts), chances)


def accept_choice(choice: Sequence[int], drafts: Sequence[Sequence[int]]) -> Verdict:
    """The target's own pick at every row is emitted; a drafted token is accepted if it is that. Both couplings come to
    this at temperature 0, where p is one-hot.

    Worked example: choice (7, 8, 9, 4) with drafts ((7, 5), ()): the first sequence has 7 accepted and 8 emitted for 5,
    so 9, which followed 5, is of no use; the second, without a draft, emits 4.
    """
    num_accepted, final_token, first = [], [], 0
    for draft in drafts:
        count = 0
        while count < len(draft) and draft[count] == choice[first + count]:
            count += 1
        num_accepted.append(count)
        final_token.append(choice[first + count])
        first += len(draft) + 1
    return Verdict(tuple(num_accepted), tuple(final_token))


def expected_acceptance(target: Tensor, drafted: DraftedTokens, layout: Layout) -> Tensor:
    """sum_v min(p_v, q_v) at every tested row, [drafted tokens] float32 (= 1 - total variation distance)."""
    certain = target[layout.draft_rows, drafted.token_ids]
    if not len(drafted.probs):
        return certain
    q_rows = drafted.prob_row.clamp(min=0)
    kernels = kernels_for(target) and kernels_for(drafted.probs)
    if kernels is not None:
        overlap = kernels.overlaps(target.contiguous(), layout.draft_rows, drafted.probs.contiguous(), q_rows)
    else:
        overlap = torch.minimum(target[layout.draft_rows], drafted.probs[q_rows]).sum(dim=1)
    return torch.where(drafted.prob_row < 0, certain, overlap)
