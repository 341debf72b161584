"""Which rotary embeddings have angles that depend on nothing but the position."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

_FIXED = {"default", "linear", "llama3", "yarn"}  # the others look at the positions of a pass, on the host


def has_fixed_angles(model: PreTrainedModel) -> bool:
    """Whether all of the model's rotary embeddings are known to be such."""
    untyped: Any = model
    kinds: Any = getattr(getattr(getattr(untyped, "model", None), "rotary_emb", None), "rope_type", None)
    named = kinds.values() if isinstance(kinds, dict) else [kinds]  # by kind of layer, or one for all
    return {*named} <= _FIXED
