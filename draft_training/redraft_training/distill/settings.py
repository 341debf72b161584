"""`DistillSettings`: everything a run's result depends on beside its data and the draft it began from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from redraft_training.distill.schedule import Decay
from redraft_training.objectives.objective import Objective
from redraft_training.objectives.presets import word_kd

Precision = Literal["auto", "fp32", "bf16"]

# They say how a run is watched, not what it computes: a checkpoint may be resumed with others.
_NOT_IDENTITY = frozenset({"checkpoint_every_batches", "max_minutes", "patience"})


class DistillSettings(BaseModel):
    """Raises pydantic's ValidationError, naming the setting, for values out of range."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    objective: Objective = word_kd()
    """What the draft learns from, by which measure, on which states. Default: word_kd."""
    epochs: Annotated[int, Field(ge=1)] = 4
    """Passes over the training data."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many tokens through the draft, if the epochs have more. The learning rate decays to this end."""
    learning_rate: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """Peak learning rate of AdamW. null: 1e-3 for a newborn draft, 4e-4 for one that has learnt before (expected
    acceptance of at least 0.2 when the run begins): at a newborn's rate it would forget."""
    warmup_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of the run over which the learning rate rises from 0."""
    decay: Decay = "cosine"
    """How the learning rate falls to 0 afterwards."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """A gradient longer than this is scaled down to it."""
    batch_tokens: Annotated[int, Field(ge=1)] = 2048
    """Tokens packed into one batch."""
    accumulation: Annotated[int, Field(ge=1)] = 1
    """Batches per optimiser step on each rank."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the order of the data, of rollouts and of dropout."""
    precision: Precision = "auto"
    """auto: bf16 autocast on an accelerator that has it, else fp32. Parameters stay float32 in any case."""
    checkpoint_every_batches: Annotated[int, Field(ge=1)] = 100
    """Batches of all ranks between checkpoints; the held-out sample is scored at each."""
    heldout_batches: Annotated[int, Field(ge=1)] = 8
    """Size of the held-out sample."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many held-out scores in a row without a new best. None: never."""
    max_minutes: Annotated[float, Field(gt=0.0)] | None = None
    """Stop this session after so many minutes, with a checkpoint. None: no limit."""

    @field_validator("objective", mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        """Settings of an objective change the default one; an `Objective` is meant as it is."""
        return {**word_kd().model_dump(exclude_unset=True), **value} if isinstance(value, dict) else value

    def identity(self) -> dict[str, Any]:
        """The settings that a resumed run must have in common with its checkpoint, ready for JSON."""
        return self.model_dump(mode="json", exclude=set(_NOT_IDENTITY))
