"""Packed drafts: put together again they compute the same, and nothing else is taken for one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from redraft.errors import ChecksumMismatch, ModelError, ModelNotFound
from redraft.models import demo_draft
from redraft.models.delta import pack_delta, unpack_delta
from redraft.models.draft import load_draft
from redraft.models.draft_vocab import DraftVocab
from redraft.models.loader import load_model
from redraft.models.quantised import DRAFT_QUANT, DraftQuant, dequantise, quantise
from redraft.models.ref import ModelKind, ModelRef
from redraft.models.source import resolve_source
from tests.fakes import save_tiny, tiny_model, tiny_tokenizer

IDS = torch.tensor([[3 + i * 7 % 60 for i in range(19)]])
VOCAB = DraftVocab((0, 4, 63))


def save_draft(directory: Path, arch: str, tied: bool, dtype: torch.dtype = torch.float32) -> None:
    """The target's ends, other layers; with a reduced vocabulary."""
    draft, target = tiny_model(arch, tied=tied, seed=5), tiny_model(arch, tied=tied)
    draft.get_input_embeddings().weight.copy_(target.get_input_embeddings().weight)
    draft.get_output_embeddings().weight.copy_(target.get_output_embeddings().weight)
    draft.to(dtype).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    VOCAB.write(directory)
    (directory / "draft_config.json").write_text('{"method": "test"}')


def logits(directory: Path) -> torch.Tensor:
    result: torch.Tensor = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(IDS).logits
    return result


@pytest.mark.parametrize(("arch", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("gemma3", True)])
def test_round_trip_in_int8(tmp_path: Path, arch: str, tied: bool) -> None:
    save_tiny(tmp_path / "t", arch, tied=tied)
    save_draft(tmp_path / "d", arch, tied)
    size = pack_delta(tmp_path / "d", tmp_path / "t", tmp_path / "p.safetensors")
    assert size == sum(path.stat().st_size for path in tmp_path.glob("p.*"))
    unpack_delta(tmp_path / "p.safetensors", tmp_path / "t", tmp_path / "u")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "d")
    found = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "u").named_parameters())
    assert found.keys() == dict(expected.named_parameters()).keys()
    for name, parameter in expected.named_parameters():
        in_layer = ".layers." in name and parameter.dim() == 2
        assert torch.equal(found[name], dequantise(*quantise(parameter)) if in_layer else parameter), name
    assert DraftVocab.read(tmp_path / "u") == VOCAB
    assert json.loads((tmp_path / "u" / "draft_config.json").read_text()) == {"method": "test"}
    assert DraftQuant.read(tmp_path / "u") == DraftQuant(8)
    target = load_model(ModelRef(ModelKind.DIRECTORY, str(tmp_path / "t")), progress=lambda _: None)
    draft = load_draft(ModelRef(ModelKind.DIRECTORY, str(tmp_path / "u")), target, progress=lambda _: None)
    assert draft.shares_embedding


def test_packing_what_was_unpacked_changes_nothing(tmp_path: Path) -> None:
    save_tiny(tmp_path / "t", tied=True)
    save_draft(tmp_path / "d", "llama", True)
    pack_delta(tmp_path / "d", tmp_path / "t", tmp_path / "p.safetensors")
    unpack_delta(tmp_path / "p.safetensors", tmp_path / "t", tmp_path / "u")
    pack_delta(tmp_path / "u", tmp_path / "t", tmp_path / "again.safetensors")
    unpack_delta(tmp_path / "again.safetensors", tmp_path / "t", tmp_path / "v")
    torch.testing.assert_close(logits(tmp_path / "v"), logits(tmp_path / "u"), rtol=1e-5, atol=1e-5)


def test_bfloat16_keeps_a_bfloat16_draft_exactly(tmp_path: Path) -> None:
    save_tiny(tmp_path / "t", tied=True)
    tiny_model("llama", tied=True).to(torch.bfloat16).save_pretrained(tmp_path / "t")
    save_draft(tmp_path / "d", "llama", True, torch.bfloat16)
    pack_delta(tmp_path / "d", tmp_path / "t", tmp_path / "p.safetensors", torch.bfloat16)
    unpack_delta(tmp_path / "p.safetensors", tmp_path / "t", tmp_path / "u")
    assert torch.equal(logits(tmp_path / "u"), logits(tmp_path / "d"))
    assert not (tmp_path / "u" / DRAFT_QUANT).exists()


def test_only_the_layers_are_stored(tmp_path: Path) -> None:
    save_tiny(tmp_path / "t", vocab_size=900, tied=True)
    model = tiny_model("llama", vocab_size=900, tied=True)
    model.model.layers[1].mlp.up_proj.weight.add_(0.01)
    model.save_pretrained(tmp_path / "d")
    tiny_tokenizer(900).save_pretrained(tmp_path / "d")
    pack_delta(tmp_path / "d", tmp_path / "t", tmp_path / "p.safetensors")
    assert (tmp_path / "p.safetensors").stat().st_size < 64 * 32 + 64 * 4 + 1000


def test_another_target_or_a_damaged_file_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "t", tied=True)
    save_tiny(tmp_path / "other", tied=True, seed=9)
    save_draft(tmp_path / "d", "llama", True)
    packed = tmp_path / "p.safetensors"
    pack_delta(tmp_path / "d", tmp_path / "t", packed)
    with pytest.raises(ChecksumMismatch, match="another target"):
        unpack_delta(packed, tmp_path / "other", tmp_path / "u")
    with pytest.raises(ModelError, match="not a single matrix"):
        pack_delta(tmp_path / "d", save_tiny(tmp_path / "q", layers=1, seed=8), tmp_path / "q.safetensors")
    tiny_tokenizer(60).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="tokenizer"):
        pack_delta(tmp_path / "d", tmp_path / "other", tmp_path / "q.safetensors")
    content = bytearray(packed.read_bytes())
    content[-1] ^= 1
    packed.write_bytes(content)
    with pytest.raises(ChecksumMismatch, match="damaged"):
        unpack_delta(packed, tmp_path / "t", tmp_path / "u")
    packed.with_suffix(".json").write_text('{"schema_version": 1}')
    with pytest.raises(ModelError, match="damaged"):
        unpack_delta(packed, tmp_path / "t", tmp_path / "u")
    packed.unlink()
    with pytest.raises(ModelNotFound):
        unpack_delta(packed, tmp_path / "t", tmp_path / "u")
    assert not (tmp_path / "u").exists()


def test_demo_draft_is_put_together_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = ModelRef.parse("demo-draft")
    assert (ref.kind, str(ref)) == (ModelKind.DEMO_DRAFT, "demo-draft")
    packed = tmp_path / "p.safetensors"
    monkeypatch.setattr(demo_draft, "DEMO_DRAFT_FILE", packed)
    with pytest.raises(ModelNotFound, match="not part of this build; make one with redraft-train init"):
        resolve_source(ref, cache_dir=tmp_path / "cache", progress=lambda _: None)
    target_dir = save_tiny(tmp_path / "t", tied=True)
    save_draft(tmp_path / "d", "llama", True)
    pack_delta(tmp_path / "d", target_dir, packed)
    monkeypatch.setattr(demo_draft, "demo_directory", lambda **_: (target_dir, "demo", "1"))
    lines: list[str] = []
    first = resolve_source(ref, cache_dir=tmp_path / "cache", progress=lines.append)
    assert resolve_source(ref, cache_dir=tmp_path / "cache", progress=lines.append) == first
    assert len(lines) == 1
    assert first.name == "demo-draft"
    target = load_model(ModelRef(ModelKind.DIRECTORY, str(target_dir)), progress=lambda _: None)
    draft = load_draft(ref, target, cache_dir=tmp_path / "cache", progress=lambda _: None)
    assert draft.shares_embedding
    assert draft.output_ids is not None
    assert draft.output_ids.tolist() == list(VOCAB.ids)
