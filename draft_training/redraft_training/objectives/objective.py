"""`Objective`: what a draft learns from, by which measure, and on which states. Three settings, free to combine.

- WHAT: the target's distributions (`logits`), its text alone (`sequences`), or in addition to the distributions its
  hidden states, each for itself (`features`) or how they lie to each other (`relations`).
- HOW: the divergence between target and draft at one position, and the temperature of both sides.
- WHERE: on the target's text, or on states that the draft led to.

The named methods are values of it: `presets.py`. What is computed: `loss.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

What = Literal["logits", "sequences", "features", "relations"]
How = Literal["forward_kl", "reverse_kl", "jsd", "tv", "neg_log_alpha", "lk", "cross_entropy", "policy_gradient"]

Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Objective(BaseModel):
    """Raises pydantic's ValidationError, naming the setting, for values out of range or that contradict each other."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    what: What = "logits"
    """logits: the target's distributions. sequences: its text as hard labels, no teacher needed. features, relations:
    the distributions, and the hidden states with `hidden_weight`."""

    how: How = "forward_kl"
    """Divergence at one position (`redraft.sampling.divergence`); policy_gradient is MiniLLM's, on rollouts."""
    beta: float = Field(default=0.5, gt=0.0, lt=1.0)
    """jsd: weight of the target in the mixture; to 0 forward KL, to 1 reverse KL."""
    eta: float = Field(default=3.0, ge=0.0, allow_inf_nan=False)
    """lk: how fast KL gives way to total variation as the acceptance rises."""
    temperature: Positive | None = None
    """null: both sides at each request's own sampling parameters. A number: softmax(raw logits / temperature) on both
    sides for all requests, and the loss times its square (Hinton et al. 2015)."""
    greedy_targets: Literal["hard", "soft"] = "soft"
    """For requests at temperature 0, if `temperature` is null. hard: the one-hot distribution that they draw from.
    soft: softmax(raw logits), which has the same arg max and says more."""

    on_policy_fraction: Fraction = 0.0
    """Share of the loss on states that the draft led to (lambda of GKD); the rest is on the target's text."""
    on_policy_source: Literal["captured", "rollout"] = "captured"
    """captured: the drafted tokens in the traffic log, labelled by verification. rollout: text that the draft writes
    now and the target labels."""
    teacher_mixing: float = Field(default=0.2, ge=0.0, lt=1.0)
    """policy_gradient: rollout tokens are drawn from this much target and the rest draft."""

    hidden_weight: Positive = 1.0
    """features, relations: weight of the loss on hidden states, beside 1 for that on distributions."""
    hidden_layers: tuple[tuple[int, int], ...] = ((-1, -1),)
    """features, relations: pairs (draft, target) of hidden states; 0 is the embedding, i follows layer i, -1 is the
    last."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.what == "sequences" and self.on_policy_fraction > 0.0:
            raise ValueError(
                "on_policy_fraction must be 0 with what=sequences: the target wrote no text after the draft's"
            )
        if self.how == "policy_gradient":
            if self.what == "sequences":
                raise ValueError("how=policy_gradient needs the target's distributions: use what=logits")
            if self.on_policy_source != "rollout" or self.on_policy_fraction == 0.0:
                raise ValueError("how=policy_gradient needs on_policy_source=rollout and on_policy_fraction above 0")
        if self.uses_hidden_states and not self.hidden_layers:
            raise ValueError(f"hidden_layers must name at least one pair draft:target with what={self.what}")
        return self

    @property
    def uses_hidden_states(self) -> bool:
        return self.what in ("features", "relations")

    @property
    def needs_teacher(self) -> bool:
        """False: text alone will do."""
        return self.what != "sequences"

    @property
    def draft_layers(self) -> tuple[int, ...]:
        """Hidden states to ask the draft for."""
        return tuple(draft for draft, _ in self.hidden_layers) if self.uses_hidden_states else ()

    @property
    def target_layers(self) -> tuple[int, ...]:
        """Hidden states to ask the target for."""
        return tuple(target for _, target in self.hidden_layers) if self.uses_hidden_states else ()
