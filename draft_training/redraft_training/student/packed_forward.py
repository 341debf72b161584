"""A transformers model over a packed `Batch`: any decoder-only architecture, logits only where they are wanted.

Two things of the model are replaced, once. Its attention, because a batch brings its own mask, on top of which a layer
may have a sliding window or a soft cap. And its head, which computes only the positions asked for: whatever the
architecture does to logits afterwards (scaling, soft cap) is still done by its own code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from redraft.errors import UnsupportedModel
from redraft.models.heads import output_head, set_output_head
from redraft_training.dataset.batch import Batch

ATTENTION_NAME = "redraft_packed_rows"


@dataclass(frozen=True, slots=True)
class PackedOutput:
    """At a batch's n positions: logits [n, width] float32, and hidden states, one [n, hidden_size] per index asked."""

    logits: Tensor
    hidden: tuple[Tensor, ...]


class SelectiveHead(nn.Module):
    """An output head that looks only at the positions set in `selected`."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.selected: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [rows, length, hidden_size] -> logits [1, n, width]."""
        assert self.selected is not None, "call the model through packed_forward"
        rows: Tensor = self.linear(hidden.flatten(0, 1).index_select(0, self.selected))
        return rows.unsqueeze(0)


def prepare(model: PreTrainedModel, head: nn.Module | None = None) -> SelectiveHead:
    """Make `model` ready for `packed_forward`, in place; return the head it has from now on.

    `head` replaces the model's own linear head (for a reduced output vocabulary). May be repeated. Raises
    `UnsupportedModel` for a model without a head.
    """
    own = output_head(model) if head is None else head
    if own is None:
        raise UnsupportedModel(f"a {model.config.model_type} model has no output head")
    if isinstance(own, SelectiveHead):  # made ready before, for another teacher
        return own
    selective = SelectiveHead(own)
    set_output_head(model, selective)
    model.set_attn_implementation(ATTENTION_NAME)
    return selective


def packed_forward(
    model: nn.Module, head: SelectiveHead, batch: Batch, *, device: torch.device, hidden_layers: tuple[int, ...] = ()
) -> PackedOutput:
    """Run a prepared model (or a wrapper of it, as data parallelism makes) over a batch.

    `hidden_layers` are numbered as transformers does: 0 is the embedding, i comes after layer i, and the last one has
    gone through the final norm.
    """
    head.selected = batch.predict.to(device)
    try:
        output = model(
            input_ids=batch.input_ids.to(device),
            position_ids=batch.position_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            packed_positions=batch.position_ids.to(device),
            use_cache=False,
            output_hidden_states=bool(hidden_layers),
        )
        hidden = tuple(
            output.hidden_states[layer].flatten(0, 1).index_select(0, head.selected) for layer in hidden_layers
        )
    finally:
        head.selected = None
    return PackedOutput(output.logits[0].float(), hidden)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed_positions: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [rows, heads, length, head_dim], key and value [rows, kv_heads, length,
    head_dim], mask [rows, 1, length, length] bool -> [rows, length, heads, head_dim]."""
    if packed_positions is None or attention_mask is None:
        raise RuntimeError("packed attention needs a batch's own mask; call the model through packed_forward")
    if kwargs.get("s_aux") is not None:
        raise UnsupportedModel("attention sinks (s_aux) are not supported; choose another model")
    if sliding_window is not None:
        distance = packed_positions.unsqueeze(2) - packed_positions.unsqueeze(1)
        attention_mask = attention_mask & (distance < sliding_window).unsqueeze(1)
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is None:
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout if module.training else 0.0, scale=scale
        )
    else:
        scores = torch.tanh(query @ key.transpose(2, 3) * scale / softcap) * softcap
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        mixed = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, packed_attention)
