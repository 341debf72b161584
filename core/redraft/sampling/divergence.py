"""How far a draft's distribution q is from the target's p, as losses: pure functions, one value per row.

Every function takes probabilities `p` [n, atoms] and log-probabilities `log_q` [n, atoms] and returns [n] in their
dtype (float32, or float64 in tests). `p` is a constant; gradients flow to `log_q`. An *atom* is usually a token id:

- dense, n rows over a whole vocabulary: the atoms are the ids;
- sparse, the m most probable ids and the mass of all others: `with_tail` makes the rest one more atom, and everything
  below then works on m + 1 atoms. For a divergence this is exact on the m ids and a lower bound in value (merging
  outcomes never increases an f-divergence); only `forward_kl` can do without the merging, see `tail_draw`.

Zeros. A request with top-k or top-p has p = 0 at most ids: no function minds, but for `reverse_kl` see there. A draft
with a reduced vocabulary has q = 0 (`log_q` -inf, or below `UNREACHABLE`) at ids that no training can reach: they are
left out where they would make the value infinite, and `unreachable_mass` says how much of p they hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNREACHABLE = -1e4
"""log q at or below this counts as q = 0. exp underflows at -104 already; no logits of a model differ by this much."""

REVERSE_KL_FLOOR = 1e-6
"""Probability that `reverse_kl` gives to everything of p-probability 0, taken together."""

_ROUNDING = 2.0**-22  # what float32 sums leave of a probability that is 0
_TINY = 1e-30


def forward_kl(p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum p log(p / q), over the reachable atoms. Mean-seeking: q must cover what p may say.

    With one-hot p it is the cross-entropy.
    """
    log_q = _floored(log_q)
    return torch.where(log_q > UNREACHABLE, torch.xlogy(p, p) - p * log_q, 0.0).sum(dim=1)


def cross_entropy(p: Tensor, log_q: Tensor) -> Tensor:
    """-sum p log q, over the reachable atoms: `forward_kl` plus the entropy of p, so with its gradient."""
    log_q = _floored(log_q)
    return torch.where(log_q > UNREACHABLE, -p * log_q, 0.0).sum(dim=1)


def reverse_kl(p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) = sum q log(q / p). Mode-seeking: q must avoid what p would not say.

    Where p is 0 (truncated by top-k or top-p, or one-hot) the textbook value is infinite. Here all such atoms, and
    those with no more than rounding leaves of 0, are one event, to which p gives `REVERSE_KL_FLOOR`: the draft pays
    about 14 nats for each unit of mass that it puts there, however it spreads it, and p then sums to 1 + 1e-6 (values
    down to -1e-6 are possible).
    """
    log_q = _floored(log_q)
    q = log_q.exp()
    supported = p > _ROUNDING
    inside = torch.where(supported, q * (log_q - _log(p)), 0.0).sum(dim=1)
    outside = torch.where(supported, 0.0, q).sum(dim=1)
    return inside + outside * (outside.clamp(min=_TINY) / REVERSE_KL_FLOOR).log()


def jsd(p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence, 0 < beta < 1, as GKD defines it (Agarwal et al. 2024, eq. 1):

        beta KL(p || m) + (1 - beta) KL(q || m)   with m = beta p + (1 - beta) q

    Bounded by the entropy of (beta, 1 - beta). JSD / beta goes to the forward KL as beta goes to 0, JSD / (1 - beta)
    to the reverse KL as beta goes to 1.
    """
    log_q = _floored(log_q)
    q = log_q.exp()
    log_m = (beta * p + (1.0 - beta) * q).clamp(min=_TINY).log()
    from_p = torch.xlogy(p, p) - p * log_m
    return (beta * from_p + (1.0 - beta) * q * (log_q - log_m)).sum(dim=1)


def expected_acceptance(p: Tensor, q: Tensor) -> Tensor:
    """sum min(p, q): the chance that a token drafted from q is accepted (Leviathan et al. 2023). p, q [n, atoms] are
    probabilities.

    Over the m ids of a sparse target it is a lower bound, short of the truth by at most min(tail of p, tail of q);
    with the tail as an atom it is an upper bound.
    """
    return torch.minimum(p, q).sum(dim=1)


def total_variation(p: Tensor, log_q: Tensor) -> Tensor:
    """1 - sum min(p, q) = 1/2 sum |p - q|: the chance of a rejection. Its gradient vanishes where p and q do not
    overlap, so it polishes a draft and does not make one (Samarin et al. 2026)."""
    return 1.0 - expected_acceptance(p, _floored(log_q).exp())


def neg_log_acceptance(p: Tensor, log_q: Tensor) -> Tensor:
    """-log sum min(p, q) (LK-alpha of Samarin et al. 2026): total variation with its gradient divided by the
    acceptance, so that it does not vanish. With one-hot p it is the cross-entropy.

    Computed from logarithms: finite, with the right gradient, at any overlap. A row without a reachable atom is 0.
    """
    log_overlap = torch.minimum(_log(p), _floored(log_q))
    reachable = (log_overlap > UNREACHABLE).any(dim=1)
    return torch.where(reachable, -log_overlap.logsumexp(dim=1), 0.0)


def lk(p: Tensor, log_q: Tensor, kl_weight: Tensor) -> Tensor:
    """kl_weight KL(p || q) + (1 - kl_weight) TV(p, q) (LK-lambda of Samarin et al. 2026); see `lk_kl_weight`."""
    return kl_weight * forward_kl(p, log_q) + (1.0 - kl_weight) * total_variation(p, log_q)


def lk_kl_weight(acceptance: Tensor, eta: float) -> Tensor:
    """exp(-eta * acceptance), a constant for the gradient: KL while the draft is bad, TV as it gets good.

    `acceptance` is the expected acceptance, as a mean over the rows that are averaged into one loss.
    """
    return (-eta * acceptance.detach()).exp()


def unreachable_mass(p: Tensor, log_q: Tensor) -> Tensor:
    """Mass of p on atoms with q = 0: what a reduced vocabulary costs in acceptance, whatever the draft learns."""
    return torch.where(log_q > UNREACHABLE, 0.0, p).sum(dim=1)


def with_tail(p: Tensor, tail: Tensor, log_q: Tensor, log_q_tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Make all other ids one atom: (p [n, m + 1], log_q [n, m + 1]).

    Args:
        p, log_q: [n, m] at distinct ids; at a padded place p is 0 and log_q -inf.
        tail: [n], what p gives to all other ids.
        log_q_tail: [n], the same of q. None: log(1 - sum q), which rounds to -inf below about 1e-7.
    """
    if log_q_tail is None:
        log_q_tail = (1.0 - log_q.exp().sum(dim=1)).clamp(min=0.0).log()
    return torch.cat([p, tail.unsqueeze(1)], dim=1), torch.cat([log_q, log_q_tail.unsqueeze(1)], dim=1)


def tail_draw(log_q_tail: Tensor, log_q_drawn: Tensor, drawn: Tensor) -> Tensor:
    """What merging the tail left out of the forward KL (and of the cross-entropy), from one draw of p: add it.

    By the chain rule KL(p || q) = KL of the m + 1 atoms + tail * KL(p within the tail || q within the tail). The
    second part's gradient is that of -sum_tail p_v log(q_v / q_tail), and -log(q_y / q_tail), if a draw y of p fell
    into the tail, else 0, has this for its expectation. An emitted token is such a draw. The gradient at the m ids
    stays exact; only the tail's is noisy. The value comes out too large by tail * entropy of p within the tail.

    Args:
        log_q_tail, log_q_drawn: [n], log-probability of the tail and of the drawn id.
        drawn: [n] bool, whether the draw fell into the reachable part of the tail.
    """
    return torch.where(drawn, log_q_tail - log_q_drawn, 0.0)


def tail_draw_alone(tail: Tensor, log_q_tail: Tensor, log_q_drawn: Tensor, drawn: Tensor) -> Tensor:
    """As `tail_draw`, for a q with a reduced vocabulary: replaces the merged tail's term, because that asks q for all
    of `tail` [n] and an unknown part of it is unreachable. The draw knows: its expectation is the reachable part."""
    merged = torch.where(log_q_tail > UNREACHABLE, -tail * log_q_tail, 0.0)
    return torch.where(drawn, -log_q_drawn, 0.0) - merged


def _floored(log_q: Tensor) -> Tensor:
    """-inf becomes a number whose exp is 0 and which gets no gradient: 0 * -inf would be NaN."""
    return log_q.clamp(min=UNREACHABLE)


def _log(p: Tensor) -> Tensor:
    return torch.where(p > 0, p.clamp(min=_TINY).log(), UNREACHABLE)
