"""A whole forward pass in one call of the native kernels, for the models whose every operation they have.

Those are Llama and what computes the same: RMSNorm, rotary positions over whole heads, attention over all of the past
with shared key/value heads, silu(gate) * up. Nothing of torch or Python runs between layers, which costs a small model
a third of its time. Any other model goes on through transformers' code, with the same kernels where they fit.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from ctypes import addressof
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from redraft.kernels.decoder import Decoder, DecoderLayer, LinearLayer
from redraft.kernels.library import MAX_HEAD_DIM, CpuKernels, library
from redraft.models.heads import embedding, output_head
from redraft.models.kv_cache import KVCache, kv_shape
from redraft.models.packed import fuse
from redraft.models.rotary import has_fixed_angles

if TYPE_CHECKING:
    from redraft.models.runner import Chunk

_FAMILIES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM)
_ROTARY_PAGE = 1024  # positions computed at once: always the same ones together, so always the same bits
_WIDTH = 16  # numbers; rows between the linear layers are whole multiples of it


def native_decoder(
    model: PreTrainedModel, cache: KVCache, block_size: int, vocab_size: int, output_ids: Tensor | None = None
) -> NativeDecoder | None:
    """A decoder that does what `model` does, with `cache` as its KV; None unless all of the model is covered.

    The model's linears must have been packed (`pack_linears`). They go on working, on the same memory. `vocab_size` and
    `output_ids` are those of the `ModelRunner`.
    """
    kernels = library()
    if kernels is None or type(model) not in _FAMILIES or not _is_covered(model, cache):
        return None
    untyped: Any = model
    layers = [_layer(layer) for layer in untyped.model.layers[: model.config.num_hidden_layers]]
    head = fuse([output_head(model) or nn.Identity()])
    whole = [layer for layer in layers if layer is not None]
    if head is None or not whole or len(whole) < len(layers):
        return None
    return NativeDecoder(model, whole, head, cache, block_size, vocab_size, output_ids, kernels)


def _is_covered(model: PreTrainedModel, cache: KVCache) -> bool:
    """Whether everything but the linear layers is what the kernels do."""
    untyped: Any = model
    config, table, rotary = model.config, embedding(model), untyped.model.rotary_emb
    kv_heads, head_dim = kv_shape(config)
    widths = (config.hidden_size, config.num_attention_heads * head_dim, kv_heads * head_dim)
    tensors = (cache.keys, *model.parameters())
    return (
        all(t.dtype is torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors)
        and type(table) is nn.Embedding
        and config.hidden_act in ("silu", "swish")
        and getattr(config, "sliding_window", None) is None
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
        and has_fixed_angles(model)
        and 2 * len(rotary.inv_freq) == head_dim
        and cache.keys.shape[1] == kv_heads
        and head_dim % 8 == 0
        and head_dim <= MAX_HEAD_DIM
        and all(width % _WIDTH == 0 for width in widths)
    )


def _layer(layer: Any) -> DecoderLayer | None:
    """Its weights for the kernels; None if they are not packed or of odd sizes."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv = fuse([attention.q_proj, attention.k_proj, attention.v_proj])
    output = fuse([attention.o_proj])
    gate_up = fuse([mlp.gate_proj, mlp.up_proj])
    down = fuse([mlp.down_proj])
    if qkv is None or output is None or gate_up is None or down is None:
        return None
    if down.k % _WIDTH:
        return None
    norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    return DecoderLayer(qkv, output, gate_up, down, *(weight.data_ptr() for weight in norms))


class NativeDecoder:
    """Runs chunks through a model that `native_decoder` has found to fit, with `cache` as its KV."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[DecoderLayer],
        head: LinearLayer,
        cache: KVCache,
        block_size: int,
        vocab_size: int,
        output_ids: Tensor | None,
        kernels: CpuKernels,
    ) -> None:
        untyped: Any = model
        inner = untyped.model
        table = embedding(model).weight
        assert isinstance(table, Tensor)
        num_outputs = int(untyped.get_output_embeddings().out_features)
        if output_ids is None and num_outputs < vocab_size:
            output_ids = torch.arange(num_outputs)
        ids = None if output_ids is None else output_ids.to(torch.int32)
        self._kernels = kernels
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._logits_width = int(head.n) if ids is None else vocab_size
        self._rotary = inner.rotary_emb
        self._angles = torch.empty(0, cache.keys.shape[-1])
        self._layers = (DecoderLayer * len(layers))(*layers)
        # the structures hold addresses only: what they point to must live as long, whatever becomes of the model
        self._held = (cache, ids, *model.parameters(), *model.buffers())
        self._model = Decoder(
            layers=addressof(self._layers),
            head=head,
            embedding=table.data_ptr(),
            final_norm=inner.norm.weight.data_ptr(),
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            output_ids=None if ids is None else ids.data_ptr(),
            num_outputs=num_outputs,
            logits_width=self._logits_width,
            num_layers=len(layers),
            vocab_size=table.shape[0],
            hidden=table.shape[1],
            heads=model.config.num_attention_heads,
            kv_heads=cache.keys.shape[1],
            head_dim=cache.keys.shape[3],
            num_slots=cache.keys.shape[2],
            block_size=block_size,
            epsilon=inner.norm.variance_epsilon,
            scale=inner.layers[0].self_attn.scaling,
        )

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Store the chunks' keys and values and return the wanted logits, [sum of num_logits, vocab_size] float32, in
        the order of the chunks; -inf for ids without an output. Raises IndexError for ids that are not there."""
        token_ids, described, blocks = array("i"), array("i"), array("i")
        num_logits = longest = 0
        for chunk in chunks:
            described.extend((len(chunk.token_ids), chunk.start, chunk.num_logits, len(blocks)))
            token_ids.extend(chunk.token_ids)
            blocks.extend(chunk.blocks(self._block_size))
            num_logits += chunk.num_logits
            longest = max(longest, chunk.end)
        if longest > len(self._angles):
            self._extend_rotary(longest)
        logits = torch.empty(num_logits, self._logits_width)
        self._kernels.decode(self._model, token_ids, described, blocks, logits)
        # a view costs an operation of torch's, tens of microseconds when a pass has just emptied the caches
        return logits if self._logits_width == self._vocab_size else logits[:, : self._vocab_size]

    def _extend_rotary(self, num_positions: int) -> None:
        """Make the table of angles cover so many positions: [positions, cos and sin, head_dim / 2]."""
        pages = [self._angles]
        for first in range(len(self._angles), num_positions, _ROTARY_PAGE):
            positions = torch.arange(first, first + _ROTARY_PAGE).unsqueeze(0)
            both = self._rotary(torch.zeros(1), positions)
            pages.append(torch.cat([half[0, :, : half.shape[-1] // 2] for half in both], dim=1))
        self._angles = torch.cat(pages)
        self._model.rotary = self._angles.data_ptr()
