"""Int8 drafts: what is trained, saved and served are the same numbers, and calibration is worth its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from redraft.errors import ConfigError, ModelError
from redraft.kernels.library import library
from redraft.models.draft import load_draft
from redraft.models.draft_vocab import DraftVocab
from redraft.models.heads import output_head
from redraft.models.loader import load_model
from redraft.models.packed import Int8Linear
from redraft.models.quantised import DRAFT_QUANT, DraftQuant, dequantise, layer_linears, quantise
from redraft.models.ref import ModelKind, ModelRef
from redraft.models.runner import Chunk, ModelRunner
from redraft_training.student.quantise import calibrate_int8, fake_quantise, quantise_checkpoint, search_scales
from redraft_training.student.student_model import HFStudent
from tests.fakes import save_tiny, tiny_model
from tests.linear_layers import random
from tests.unit.training.student_batches import packed_batch

TEXTS = [[3 + (i * step) % 60 for i in range(23)] for step in (7, 11, 13)]
IDS = (0, 3, 4, 9, 21, 40, 62)


def ref(path: Path) -> ModelRef:
    return ModelRef(ModelKind.DIRECTORY, str(path))


def test_rounding_is_to_the_nearest_and_finds_its_own_grid_again() -> None:
    weight = random(20, 33)
    weight[3] = 0
    values, scale = quantise(weight)
    rounded = dequantise(values, scale)
    assert ((rounded - weight).abs() <= scale.unsqueeze(1) / 2 * (1 + 1e-5)).all()
    clipped, smaller = quantise(weight, scale * 0.7)
    for grid, step in ((values, scale), (clipped, smaller)):
        again, scale_again = quantise(dequantise(grid, step))
        assert torch.equal(again, grid)
        torch.testing.assert_close(scale_again, step, rtol=1e-6, atol=0)


def test_gradient_passes_the_rounding_unchanged() -> None:
    weight = random(4, 6).requires_grad_(True)
    factor = random(4, 6, seed=1)
    (fake_quantise(weight) * factor).sum().backward()
    torch.testing.assert_close(weight.grad, factor)


def test_searched_scales_minimise_the_error_of_the_outputs() -> None:
    weight, x = random(8, 32), random(200, 32, seed=1)
    weight[:, 5] = 40.0  # an outlier, on an input that is almost never there
    x[:, 5] *= 0.001
    moment = x.t() @ x

    def error(scale: torch.Tensor) -> torch.Tensor:
        return ((dequantise(*quantise(weight, scale)) - weight) @ x.t()).square().sum(1)

    largest = weight.abs().amax(1) / 127
    found = search_scales(weight, moment)
    assert error(found).sum() < error(largest).sum() * 0.6
    for ratio in (0.6, 0.8, 1.0):
        assert (error(found) <= error(largest * ratio) * (1 + 1e-4)).all()


def test_calibrated_layers_are_on_their_grid_and_closer_than_plain_rounding() -> None:
    model, calibrated = tiny_model("llama"), tiny_model("llama")
    calibrate_int8(calibrated, TEXTS)
    for _, linear in layer_linears(calibrated):
        torch.testing.assert_close(dequantise(*quantise(linear.weight)), linear.weight, rtol=1e-6, atol=1e-9)
    first = model.model.layers[0]
    x = torch.cat([first.input_layernorm(model.model.embed_tokens(torch.tensor(text))) for text in TEXTS])
    exact, ours = first.self_attn.q_proj.weight, calibrated.model.layers[0].self_attn.q_proj.weight
    assert ((ours - exact) @ x.t()).norm() < ((dequantise(*quantise(exact)) - exact) @ x.t()).norm()
    with pytest.raises(ConfigError, match="no calibration text"):
        calibrate_int8(calibrated, [])


@pytest.mark.parametrize(("arch", "tied"), [("llama", True), ("qwen2", False), ("gemma2", True)])
def test_trained_saved_and_served_numbers_agree(tmp_path: Path, arch: str, tied: bool) -> None:
    student = HFStudent.load(
        ref(save_tiny(tmp_path / "o", arch, tied=tied)), vocab=DraftVocab(IDS), quantise=True, progress=lambda _: None
    )
    batch = packed_batch([TEXTS[:1]], [(0, i) for i in range(23)])
    before = student(batch).logits
    before.logsumexp(1).sum().backward()
    optimiser = torch.optim.SGD([p for p in student.model.parameters() if p.requires_grad], lr=0.02)
    optimiser.step()
    after = student(batch).logits.detach()
    assert not torch.equal(after, before)
    student.save(tmp_path / "d")
    assert DraftQuant.read(tmp_path / "d") == DraftQuant(8)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "d")
    for _, linear in layer_linears(plain):
        torch.testing.assert_close(dequantise(*quantise(linear.weight)), linear.weight, rtol=1e-6, atol=1e-9)
    again = HFStudent.load(ref(tmp_path / "d"), progress=lambda _: None)
    torch.testing.assert_close(again(batch).logits.detach(), after, rtol=1e-4, atol=2e-5)
    target = load_model(ref(tmp_path / "o"), progress=lambda _: None)
    draft = load_draft(ref(tmp_path / "d"), target, progress=lambda _: None)
    assert draft.quant == DraftQuant(8)
    runner = ModelRunner(draft.model, num_blocks=8, block_size=4, vocab_size=64, output_ids=draft.output_ids)
    served = runner.forward([Chunk(TEXTS[0], 0, range(6), 23)])[:, list(IDS)]
    if library() is not None:
        assert isinstance(output_head(draft.model), Int8Linear)
        assert sum(isinstance(module, Int8Linear) for module in draft.model.modules()) == 2 * 7 + 1
        # the kernels take activations in 16 bits
        torch.testing.assert_close(served, after, rtol=0.0, atol=1e-3 * float(after.abs().max()))
    else:  # the layers agree, the head is not rounded
        torch.testing.assert_close(served, after, rtol=0.1, atol=0.1)


def test_quantise_checkpoint_keeps_a_bfloat16_draft_s_grid(tmp_path: Path) -> None:
    save_tiny(tmp_path / "o", tied=True)
    tiny_model("llama", tied=True).to(torch.bfloat16).save_pretrained(tmp_path / "o")
    DraftVocab(IDS).write(tmp_path / "o")
    quantise_checkpoint(ref(tmp_path / "o"), tmp_path / "q", TEXTS, progress=lambda _: None)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert saved.dtype is torch.float32
    expected = load_model(ref(tmp_path / "o"), progress=lambda _: None).model
    calibrate_int8(expected, TEXTS)
    ids = torch.tensor([TEXTS[2]])
    torch.testing.assert_close(saved(ids).logits, expected(ids).logits, rtol=1e-4, atol=2e-5)
    assert DraftVocab.read(tmp_path / "q") == DraftVocab(IDS)
    target = load_model(ref(tmp_path / "o"), progress=lambda _: None)
    assert load_draft(ref(tmp_path / "q"), target, progress=lambda _: None).shares_embedding


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 1, "bits": 4}', '{"schema_version": 2, "bits": 8}'])
def test_damaged_or_foreign_quantisation_is_refused(tmp_path: Path, text: str) -> None:
    assert DraftQuant.read(tmp_path) is None
    (tmp_path / DRAFT_QUANT).write_text(text)
    with pytest.raises(ModelError):
        DraftQuant.read(tmp_path)
