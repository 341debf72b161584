"""A target in groups: the same model where its weights lie on the grid, another one, known as such, elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from redraft.kernels.library import CpuKernels
from redraft.models import packed as packed_module
from redraft.models.heads import embedding, output_head
from redraft.models.loader import LoadedModel, load_model
from redraft.models.packed import GroupLinear, NativeLinear, OneDnnLinear
from redraft.models.quantised import layer_linears
from redraft.models.ref import ModelKind, ModelRef
from redraft.models.rounding import WeightFormat, main, to_groups
from redraft.models.runner import Chunk, ModelRunner
from tests.fakes import tiny_model, tiny_tokenizer

IDS = [3 + i * 7 % 60 for i in range(29)]
ACTIVATIONS = 1e-3  # of the largest logit: what 16 bits of the activations may cost


def save(model: PreTrainedModel, directory: Path) -> ModelRef:
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return ModelRef(ModelKind.DIRECTORY, str(directory))


def load(ref: ModelRef, weights: WeightFormat = WeightFormat.FULL) -> LoadedModel:
    return load_model(ref, weights=weights, progress=lambda _: None)


def logits(loaded: LoadedModel) -> torch.Tensor:
    return run(ModelRunner(loaded.model, num_blocks=16, block_size=4, vocab_size=64), len(IDS))


def run(runner: ModelRunner, pieces: int) -> torch.Tensor:
    """All logits of `IDS`, computed so many at a time."""
    chunks = [IDS[i : i + pieces] for i in range(0, len(IDS), pieces)]
    starts = range(0, len(IDS), pieces)
    return torch.cat([runner.forward([Chunk(c, s, range(8), len(c))]) for c, s in zip(chunks, starts, strict=True)])


def on_grid(arch: str, weights: WeightFormat, *, tied: bool | None = None) -> PreTrainedModel:
    model = tiny_model(arch, tied=tied)
    assert not to_groups(model, weights)
    return model


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("stored", [WeightFormat.INT4, WeightFormat.INT8])
@pytest.mark.parametrize("asked", [WeightFormat.INT4, WeightFormat.INT8])
def test_weights_on_the_grid_stay_the_same_model(
    kernels: CpuKernels, tmp_path: Path, arch: str, stored: WeightFormat, asked: WeightFormat
) -> None:
    ref = save(on_grid(arch, stored), tmp_path)
    full, groups = load(ref), load(ref, asked)
    assert full.weights_fingerprint == groups.weights_fingerprint
    expected = logits(full)
    runner = ModelRunner(groups.model, num_blocks=16, block_size=4, vocab_size=64)
    kinds = [type(module) for module in runner.model.modules()]
    assert kinds.count(GroupLinear) == 2 * 7 + 1
    assert NativeLinear not in kinds
    ours = run(runner, len(IDS))
    close(ours, expected)
    for pieces in (1, 5):
        assert torch.equal(run(runner, pieces), ours), f"{pieces} tokens at once"


@pytest.mark.parametrize("weights", [WeightFormat.INT4, WeightFormat.INT8])
@pytest.mark.parametrize("tied", [True, False])
def test_other_weights_become_another_model_that_can_be_written_down(
    tmp_path: Path, weights: WeightFormat, tied: bool
) -> None:
    ref = save(tiny_model("llama", tied=tied), tmp_path / "full")
    full, rounded = load(ref), load(ref, weights)
    assert rounded.weights_fingerprint not in (full.weights_fingerprint, load(ref, other(weights)).weights_fingerprint)
    assert rounded.weights_fingerprint == load(ref, weights).weights_fingerprint
    for (name, before), (_, after) in zip(layer_linears(full.model), layer_linears(rounded.model), strict=True):
        assert not torch.equal(before.weight, after.weight), name
    head = output_head(rounded.model)
    assert head is not None
    assert (head.weight is embedding(rounded.model).weight) == tied
    assert main([ref.location, str(tmp_path / "written"), "--weights", weights]) == 0
    written = ModelRef(ModelKind.DIRECTORY, str(tmp_path / "written"))
    assert load(written).weights_fingerprint == load(written, weights).weights_fingerprint, "it lies on the grid"
    ours = logits(rounded)
    assert torch.equal(ours, logits(load(written, weights)))
    close(ours, logits(load(written)))


def close(ours: torch.Tensor, in_float32: torch.Tensor) -> None:
    torch.testing.assert_close(ours, in_float32, rtol=0.0, atol=ACTIVATIONS * float(in_float32.abs().max()))


def other(weights: WeightFormat) -> WeightFormat:
    return WeightFormat.INT8 if weights is WeightFormat.INT4 else WeightFormat.INT4


def test_without_kernels_the_same_numbers_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = save(tiny_model("llama"), tmp_path)
    with_kernels = logits(load(ref, WeightFormat.INT4))
    monkeypatch.setattr(packed_module, "library", lambda: None)
    loaded = load(ref, WeightFormat.INT4)
    without = logits(loaded)
    assert any(type(module) is OneDnnLinear for module in loaded.model.modules())
    close(with_kernels, without)


def test_inputs_that_are_no_multiple_of_32_stay_as_they_are() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj = torch.nn.Linear(33, 32, bias=False)
        before = model.model.layers[0].mlp.down_proj.weight.clone()
        to_groups(model, WeightFormat.INT4)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, before)


def test_main_reports_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none"), str(tmp_path / "out"), "--weights", "int4"]) == 1
    assert "error:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
