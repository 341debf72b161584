"""Narrower layers: fewer MLP channels and fewer groups of attention heads, the most important ones kept.

The importance of an MLP channel is its mean absolute activation times the norm of the weights that read it (Wanda, Sun
et al. 2024, summed over outputs); that of a group of heads (a key/value head with its queries) is the same sum over the
group's outputs. The width of the residual stream stays, so that embedding and head can be the target's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from redraft.errors import ConfigError, UnsupportedModel
from redraft.models.kv_cache import kv_shape
from redraft_training.student.importance import calibration_texts
from redraft_training.student.layers import decoder_stack

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def prune_width(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    *,
    intermediate_size: int | None = None,
    num_key_value_heads: int | None = None,
) -> None:
    """Keep that many MLP channels and key/value heads (with their query heads) in every layer, in place.

    The config follows, so the model stays a standard checkpoint of its architecture. `sequences` of token ids are what
    importance is measured on. Raises `ConfigError` for a number out of range or no text, `UnsupportedModel` for
    layers that are not built as Llama's, Qwen's, Mistral's and Gemma's are.
    """
    config = model.config
    kv_heads, head_dim = kv_shape(config)
    _check_range("--intermediate-size", intermediate_size, config.intermediate_size)
    _check_range("--num-key-value-heads", num_key_value_heads, kv_heads)
    parent, name = decoder_stack(model)
    layers = list(getattr(parent, name))
    blocks = [(_block(layer, _ATTENTION), _block(layer, _MLP)) for layer in layers]
    readers = [linear for attention, mlp in blocks for linear in (attention.o_proj, mlp.down_proj)]
    scores = _input_importance(model, readers, sequences)  # type: ignore[arg-type]
    group = config.num_attention_heads // kv_heads
    for index, (attention, mlp) in enumerate(blocks):
        if num_key_value_heads is not None:
            by_group = scores[2 * index].view(kv_heads, group * head_dim).sum(1)
            _keep_heads(attention, _best(by_group, num_key_value_heads), group * head_dim, head_dim)
        if intermediate_size is not None:
            _keep_channels(mlp, _best(scores[2 * index + 1], intermediate_size))
    if num_key_value_heads is not None:
        config.head_dim = head_dim  # else it would follow from the number of heads
        config.num_key_value_heads, config.num_attention_heads = num_key_value_heads, group * num_key_value_heads
    if intermediate_size is not None:
        config.intermediate_size = intermediate_size


def _check_range(flag: str, value: int | None, largest: int) -> None:
    if value is not None and not 1 <= value <= largest:
        raise ConfigError(f"{flag} {value} is out of range: the target has {largest}")


def _block(layer: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """The part of a layer that has these linear layers as children."""
    for module in layer.modules():
        if all(type(getattr(module, name, None)) is nn.Linear for name in names):
            return module
    raise UnsupportedModel(f"cannot make these layers narrower: they have no {', '.join(names)}")


@torch.inference_mode()
def _input_importance(
    model: PreTrainedModel, readers: Sequence[nn.Linear], sequences: Sequence[Sequence[int]]
) -> list[Tensor]:
    """For each linear layer, [in_features] float32: mean |input| times the norm of the weights that read it."""
    texts = calibration_texts(sequences, model.device)
    sums = [torch.zeros(linear.in_features, device=model.device) for linear in readers]
    with observing_inputs(readers, lambda index, x: sums[index].add_(x.float().abs().flatten(0, -2).sum(0))):
        for text in texts:
            model(input_ids=text, use_cache=False, logits_to_keep=1)
    positions = sum(text.shape[1] for text in texts)
    return [total / positions * linear.weight.float().norm(dim=0) for total, linear in zip(sums, readers, strict=True)]


@contextmanager
def observing_inputs(linears: Sequence[nn.Linear], observe: Callable[[int, Tensor], object]) -> Iterator[None]:
    """Call `observe(index, input)` whenever one of the linears runs."""

    def hook(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: (observe(index, args[0]), None)[1]

    handles = [linear.register_forward_pre_hook(hook(index)) for index, linear in enumerate(linears)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, ascending."""
    return scores.topk(count).indices.sort().values


def _keep_heads(attention: nn.Module, groups: Tensor, group_width: int, head_dim: int) -> None:
    queries, keys = _spans(groups, group_width), _spans(groups, head_dim)
    _keep_outputs(attention.q_proj, queries)
    _keep_outputs(attention.k_proj, keys)
    _keep_outputs(attention.v_proj, keys)
    _keep_inputs(attention.o_proj, queries)


def _keep_channels(mlp: nn.Module, channels: Tensor) -> None:
    _keep_outputs(mlp.gate_proj, channels)
    _keep_outputs(mlp.up_proj, channels)
    _keep_inputs(mlp.down_proj, channels)


def _spans(blocks: Tensor, width: int) -> Tensor:
    return (blocks.unsqueeze(1) * width + torch.arange(width, device=blocks.device)).flatten()


def _keep_outputs(linear: Tensor | nn.Module, rows: Tensor) -> None:
    assert isinstance(linear, nn.Linear)
    linear.weight = nn.Parameter(linear.weight.detach()[rows], requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[rows], requires_grad=linear.bias.requires_grad)
    linear.out_features = len(rows)


def _keep_inputs(linear: Tensor | nn.Module, columns: Tensor) -> None:
    assert isinstance(linear, nn.Linear)
    weight = linear.weight.detach()[:, columns].contiguous()
    linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    linear.in_features = len(columns)
