"""The two ends of a language model, embedding and head: found in any architecture, cut, and shared between models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from redraft.errors import UnsupportedModel


def embedding(model: PreTrainedModel) -> nn.Module:
    """The module whose `weight` [vocab, hidden_size] is the embedding."""
    found: nn.Module = model.get_input_embeddings()
    return found


def output_head(model: PreTrainedModel) -> nn.Module | None:
    """The module that makes logits of hidden states: a linear layer, or what has been put in its place."""
    untyped: Any = model
    found: nn.Module | None = untyped.get_output_embeddings()
    return found


def set_output_head(model: PreTrainedModel, head: nn.Module) -> None:
    """Put `head` in the place of the model's own."""
    untyped: Any = model
    untyped.set_output_embeddings(head)


def sliced_head(head: nn.Linear, ids: Tensor) -> nn.Linear:
    """A copy of the rows `ids` [size] of an output head, frozen, on its device and in its dtype."""
    rows = ids.to(head.weight.device)
    bias: Tensor | None = head.bias
    small = nn.Linear(head.in_features, len(rows), bias=bias is not None, device="meta")
    small.weight = nn.Parameter(head.weight.detach()[rows], requires_grad=False)
    if bias is not None:
        small.bias = nn.Parameter(bias.detach()[rows], requires_grad=False)
    return small


def reduce_head(model: PreTrainedModel, ids: Tensor) -> None:
    """Cut the model's head to the rows `ids` [size], in place; a head of just as many rows is taken as cut already.

    Raises `UnsupportedModel` if the head is not a plain linear layer.
    """
    head = output_head(model)
    if getattr(head, "out_features", None) == len(ids):
        return
    if type(head) is not nn.Linear:
        raise UnsupportedModel(f"the head of a {model.config.model_type} model cannot be cut to a draft vocabulary")
    set_output_head(model, sliced_head(head, ids))


def share_embedding(draft: PreTrainedModel, target: PreTrainedModel) -> bool:
    """Make the draft's embedding the target's tensor if the two are equal, a head tied to it included; say whether."""
    ours, theirs = embedding(draft), embedding(target)
    own, shared = ours.weight, theirs.weight
    if not isinstance(own, nn.Parameter) or not isinstance(shared, nn.Parameter) or not _equal(own, shared):
        return False
    head = output_head(draft)
    if head is not None and getattr(head, "weight", None) is own:
        head.weight = shared
    ours.weight = shared
    return True


def share_head(draft: PreTrainedModel, target: PreTrainedModel) -> bool:
    """Make the draft's head the target's module, packed or not, if both compute the same; say whether.

    Call it after `share_embedding`. The weights of an untied head that the target's runner has packed already cannot be
    compared: such a draft keeps its own.
    """
    ours, theirs = output_head(draft), output_head(target)
    if type(ours) is not nn.Linear or theirs is None or any(_has_bias(head) for head in (ours, theirs)):
        return False
    if type(theirs) is nn.Linear:
        same = _equal(ours.weight, theirs.weight)
    else:
        same = bool(target.config.tie_word_embeddings) and ours.weight is embedding(target).weight
    if same:
        set_output_head(draft, theirs)
    return same


def _has_bias(head: nn.Module) -> bool:
    return any(getattr(head, name, None) is not None for name in ("bias", "_bias"))


def _equal(a: Tensor, b: Tensor) -> bool:
    # a shard of a tensor-parallel model is of another type than a tensor
    same_kind = type(a) is type(b) and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return same_kind and (a is b or torch.equal(a, b))
