"""Int8 drafts: after training, calibrated on text, or during it, so that the distillation loss heals the rounding.

Post-training: every output's scale is the one, of a few that clip more or less, whose rounding changes the layer's
output least on calibration text. Quantisation-aware: the forward pass rounds the weights, the gradient passes as if it
had not (straight-through estimator, Bengio et al. 2013).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from redraft.models.cache import Progress, stderr_progress
from redraft.models.draft_vocab import DraftVocab
from redraft.models.loader import load_model
from redraft.models.quantised import LEVELS, dequantise, layer_linears, quantise
from redraft.models.ref import ModelRef
from redraft_training.student.importance import calibration_texts
from redraft_training.student.width import observing_inputs

# of the largest entry; close to 1 the steps are small, because one level is 1/127 of it
_CLIP_RATIOS = (1.0, 0.995, 0.99, 0.985, 0.98, 0.97, 0.96, 0.94, 0.92, 0.9, 0.85, 0.8, 0.7, 0.6)


class FakeQuantLinear(nn.Linear):
    """A linear layer whose weight is rounded to int8 in the forward pass and learns as if it were not."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., in_features] -> [.., out_features]."""
        return nn.functional.linear(x, fake_quantise(self.weight), self.bias)


def fake_quantise(weight: Tensor) -> Tensor:
    """`weight` [out, in] on its int8 grid, in its dtype; the gradient is that of the identity."""
    rounded = dequantise(*quantise(weight)).to(weight.dtype)
    return weight + (rounded - weight).detach()


def fake_quantise_layers(model: PreTrainedModel) -> None:
    """Make the linears of the model's layers quantisation-aware, in place; their parameters stay the same objects."""
    for name, linear in layer_linears(model):
        with torch.device("meta"):
            fake = FakeQuantLinear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        fake.weight, fake.bias = linear.weight, linear.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, fake)


@torch.inference_mode()
def calibrate_int8(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> None:
    """Round the linears of the model's layers to int8 grids that suit token `sequences`, in place.

    Raises `ConfigError` without any usable text.
    """
    texts = calibration_texts(sequences, model.device)
    linears = [linear for _, linear in layer_linears(model)]
    moments = [torch.zeros(linear.in_features, linear.in_features, device=model.device) for linear in linears]

    def observe(index: int, x: Tensor) -> None:
        rows = x.float().flatten(0, -2)
        moments[index] += rows.t() @ rows

    with observing_inputs(linears, observe):
        for text in texts:
            model(input_ids=text, use_cache=False, logits_to_keep=1)
    for linear, moment in zip(linears, moments, strict=True):
        scale = search_scales(linear.weight, moment)
        linear.weight.copy_(dequantise(*quantise(linear.weight, scale)))


def search_scales(weight: Tensor, moment: Tensor) -> Tensor:
    """The scales [out] for weight [out, in] whose rounding error moves the outputs least.

    `moment` [in, in] is the sum of x x^T over inputs x: an output's squared error is d moment d^T for a row's error d.
    """
    rows = weight.float()
    largest = rows.abs().amax(dim=1) / LEVELS
    best, best_error = largest, torch.full_like(largest, torch.inf)
    for ratio in _CLIP_RATIOS:
        error = dequantise(*quantise(rows, largest * ratio)) - rows
        squared = ((error @ moment) * error).sum(dim=1)
        better = squared < best_error
        best = torch.where(better, largest * ratio, best)
        best_error = torch.where(better, squared, best_error)
    return best


def quantise_checkpoint(
    draft: ModelRef, output: Path, sequences: Sequence[Sequence[int]], *, progress: Progress = stderr_progress
) -> None:
    """Write an int8 copy of a draft checkpoint to `output`, calibrated on token `sequences`.

    Raises `FileExistsError` if `output` is not empty, and whatever `load_model` and `calibrate_int8` raise.
    """
    from redraft_training.student.student_model import HFStudent  # it imports this module

    loaded = load_model(draft, progress=progress)
    calibrate_int8(loaded.model, sequences)
    student = HFStudent(loaded, vocab=DraftVocab.read(loaded.directory), quantise=True)
    student.provenance["quantisation"] = {"bits": 8, "method": "post_training", "sequences": len(sequences)}
    student.save(output)
