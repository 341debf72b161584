"""The methods by name. Each is an `Objective`; any setting of it can be overridden.

What every one shares here: the target's labels come from verification where they can, the loss is averaged over
positions, and the student is compared uncut (`scores.py`).
"""

from __future__ import annotations

from redraft.errors import ConfigError
from redraft_training.objectives.objective import Objective


def word_kd() -> Objective:
    """Word-level distillation: Hinton et al. 2015; Kim & Rush 2016.

    tau^2 KL(p || q) at every position of the target's text, p and q = softmax(raw logits / tau), tau = 1. Differs from
    the paper: no term on ground-truth labels, as there are none. tau above 1 needs a re-run target: captured labels
    cover too little of a flat distribution.
    """
    return Objective(how="forward_kl", temperature=1.0)


def sequence_kd() -> Objective:
    """Sequence-level distillation: Kim & Rush 2016.

    -log q(y_t) on the text y that the target wrote. Needs no labels, so it also works with a black-box target. Differs:
    the text is what was served, a sample at the request's parameters, not the mode found by beam search.
    """
    return Objective(what="sequences", how="cross_entropy", temperature=1.0)


def gkd() -> Objective:
    """Generalised knowledge distillation: Agarwal et al. 2024.

    (1 - lambda) E over the target's text + lambda E over the student's states, of JSD(beta); lambda = beta = 1/2.
    Differs: the student's states are its logged proposals (`on_policy_source=rollout` for texts of its own), and p is
    at the request's own sampling parameters.
    """
    return Objective(how="jsd", beta=0.5, temperature=None, on_policy_fraction=0.5)


def distillspec() -> Objective:
    """DistillSpec: Zhou et al. 2024.

    GKD for speculative decoding: the draft's own states (lambda = 1), at the sampling parameters of serving, with a
    divergence chosen by task and decoding; the paper finds no single best one (`how`), forward KL is the start.
    """
    return Objective(how="forward_kl", temperature=None, on_policy_fraction=1.0)


def minillm() -> Objective:
    """MiniLLM: Gu et al. 2024; the gradient is in `policy_gradient.py`.

    Sequence-level KL(q || p) by policy gradient on texts drawn from 0.2 p + 0.8 q: single-step decomposition, length
    normalisation, clipped importance weights. Differs: no language-modelling loss on a pre-training corpus.
    """
    return Objective(
        how="policy_gradient", temperature=1.0, on_policy_fraction=1.0, on_policy_source="rollout", teacher_mixing=0.2
    )


def fitnets() -> Objective:
    """FitNets: Romero et al. 2015.

    1/2 ||u - r(v)||^2 between the target's hidden state u and the student's v through a learned linear map r, beside
    word-level distillation. Differs: both losses together instead of in two stages; the norm is relative (`hidden.py`).
    """
    return Objective(what="features", how="forward_kl", temperature=1.0)


def rkd() -> Objective:
    """Relational knowledge distillation: Park et al. 2019, RKD-DA.

    Huber loss between the distances, and the angles, that hidden states of a batch's positions form in target and
    student (weights 1 : 2), beside word-level distillation. Differs: positions in place of images; 64 a batch.
    """
    return Objective(what="relations", how="forward_kl", temperature=1.0)


def lk() -> Objective:
    """LK losses: Samarin et al. 2026 (arXiv 2602.23881), the adaptive blend.

    w KL(p || q) + (1 - w) TV(p, q), w = exp(-3 alpha) with alpha the batch's mean expected acceptance: acceptance
    itself is optimised once the draft is good enough for its gradient to carry. `how=neg_log_alpha` is their other
    loss. Differs: at each request's own sampling parameters instead of one temperature.
    """
    return Objective(how="lk", eta=3.0, temperature=None)


PRESETS = {method.__name__: method() for method in (word_kd, sequence_kd, gkd, distillspec, minillm, fitnets, rkd, lk)}


def preset(name: str) -> Objective:
    """The objective of that name. Raises ConfigError naming those there are."""
    if name not in PRESETS:
        raise ConfigError(f"no objective is called {name!r}: choose one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
