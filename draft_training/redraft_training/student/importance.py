"""Which layers a draft should keep, measured on calibration text.

*Block influence* (ShortGPT, Men et al. 2024, eq. 1): how far a layer turns the residual stream, 1 - cos(input, output);
one pass, but every layer is judged among all the others, most of which a small draft will not have.
*Greedy*: start from those of largest influence and exchange them one at a time, the least influential first, for the
layer that brings the pruned model closest to the target, in KL(target || pruned) of the next token. Never worse on the
calibration text, for count * layers passes of a model of `count` layers. (To start from none and only add is cheaper to
explain and much worse: the first layer chosen is the best one to have alone.)
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedModel

from redraft.errors import ConfigError
from redraft_training.student.layers import decoder_stack, only_layers

# of all calibration positions, spread evenly; a row of logits is 0.2 MB for 50 thousand ids
_MAX_POSITIONS = 128
_MAX_SEQUENCES = 64
_MAX_LENGTH = 512


class Importance(StrEnum):
    """How layers are chosen; EVEN needs no calibration text."""

    EVEN = "even"
    BLOCK_INFLUENCE = "block_influence"
    GREEDY = "greedy"


def choose_layers(
    target: PreTrainedModel, sequences: Sequence[Sequence[int]], count: int, *, method: Importance = Importance.GREEDY
) -> tuple[int, ...]:
    """The `count` layers (0-based, ascending) that matter most on token `sequences`.

    At most 64 sequences of 512 tokens are looked at. `target` is as it was afterwards. Raises `ConfigError` without any
    usable text or for a count out of range.
    """
    total = int(target.config.num_hidden_layers)
    if not 1 <= count <= total:
        raise ConfigError(f"--num-layers {count} is out of range: the target has {total} layers")
    texts = calibration_texts(sequences, target.device)
    if method is Importance.EVEN:
        raise ConfigError("evenly spaced layers are not chosen from calibration text")
    influence = block_influence(target, texts)
    ranked = sorted(range(total), key=lambda layer: -influence[layer])
    chosen = ranked[:count] if method is Importance.BLOCK_INFLUENCE else _exchanged(target, texts, ranked, count)
    return tuple(sorted(chosen))


def calibration_texts(sequences: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """At most 64 texts, [1, at most 512] int64 each. Raises `ConfigError` if there is none of at least 2 tokens."""
    texts = [torch.tensor([list(ids[:_MAX_LENGTH])], device=device) for ids in sequences if len(ids) >= 2]
    if not texts:
        raise ConfigError("there is no calibration text of at least 2 tokens: give more, or choose --layers by hand")
    return texts[:_MAX_SEQUENCES]


@torch.inference_mode()
def block_influence(model: PreTrainedModel, texts: Sequence[Tensor]) -> list[float]:
    """1 - cos(input, output) of every layer, its mean over the positions of `texts`, [1, length] int64 each."""
    parent, name = decoder_stack(model)
    stack: nn.ModuleList = getattr(parent, name)
    sums = [0.0] * len(stack)

    def hook(index: int) -> Any:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            sums[index] += float((1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)).sum())

        return observe

    handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(stack)]
    try:
        for text in texts:
            model(input_ids=text, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    positions = sum(text.shape[1] for text in texts)
    return [value / positions for value in sums]


def _exchanged(target: PreTrainedModel, texts: list[Tensor], ranked: list[int], count: int) -> list[int]:
    """One exchange for each of the first `count` of the `ranked` layers."""
    stride = -(-sum(text.shape[1] for text in texts) // _MAX_POSITIONS)
    teacher = [_log_probs(target, text, stride) for text in texts]
    console = Console(stderr=True)
    kept = ranked[:count]
    rounds = track(
        reversed(ranked[:count]),
        f"Choosing {count} layers",
        total=count,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    for layer in rounds:
        kept.remove(layer)
        # the layer itself first, so that it stays where nothing is better
        candidates = [layer, *(other for other in ranked if other != layer and other not in kept)]
        scores = [_divergence(target, sorted([*kept, other]), texts, teacher, stride) for other in candidates]
        kept.append(candidates[scores.index(min(scores))])
    return kept


def _divergence(
    model: PreTrainedModel, layers: list[int], texts: list[Tensor], teacher: list[Tensor], stride: int
) -> float:
    """Sum over the positions looked at of KL(target || the model of `layers` alone)."""
    total = 0.0
    with only_layers(model, layers):
        for text, expected in zip(texts, teacher, strict=True):
            log_probs = _log_probs(model, text, stride)
            total += float(nn.functional.kl_div(log_probs, expected, reduction="sum", log_target=True))
    return total


@torch.inference_mode()
def _log_probs(model: PreTrainedModel, text: Tensor, stride: int) -> Tensor:
    """[positions, vocab_size] float32: every `stride`-th position, the last one included."""
    wanted = torch.arange(text.shape[1] - 1, -1, -stride, device=text.device)
    logits: Tensor = model(input_ids=text, use_cache=False, logits_to_keep=wanted).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)
