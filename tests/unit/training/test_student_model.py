"""The student: a packed batch says what the plain model says, only the middle learns, and what is saved is standard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from redraft.errors import ModelError
from redraft.models.draft import load_draft
from redraft.models.draft_vocab import DraftVocab
from redraft.models.heads import embedding
from redraft.models.loader import load_model
from redraft.models.ref import ModelKind, ModelRef
from redraft.models.runner import Chunk, ModelRunner
from redraft_training.student.checkpoint import DRAFT_CONFIG
from redraft_training.student.prune import init_draft
from redraft_training.student.student_model import HFStudent
from tests.fakes import ARCHITECTURES, save_tiny, tiny_model
from tests.unit.training.student_batches import branch_batch, packed_batch

A = [3 + i * 7 % 60 for i in range(23)]  # longer than the sliding window
B = [5 + i * 11 % 50 for i in range(9)]
IDS = (0, 3, 4, 9, 21, 40, 62)


def student_of(path: Path, **options: object) -> HFStudent:
    return HFStudent.load(ModelRef(ModelKind.DIRECTORY, str(path)), progress=lambda _: None, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_rows_equal_each_text_alone(tmp_path: Path, arch: str) -> None:
    student = student_of(save_tiny(tmp_path, arch, layers=3))
    where = [(0, 0), (0, 22), (0, 23), (0, 31), (1, 8), (1, 20), (1, 31)]
    output = student(packed_batch([[A, B], [B, A]], where, length=35), hidden_layers=(0, 1, 3))
    model = tiny_model(arch, layers=3)
    alone = {id(text): model(torch.tensor([text]), output_hidden_states=True) for text in (A, B)}
    places = [(A, 0), (A, 22), (B, 0), (B, 8), (B, 8), (A, 11), (A, 22)]
    expected = torch.stack([alone[id(text)].logits[0, i] for text, i in places])
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=2e-5)
    assert (output.vocab_ids, output.vocab_size) == (None, 64)
    for layer, hidden in zip((0, 1, 3), output.hidden, strict=True):
        states = torch.stack([alone[id(text)].hidden_states[layer][0, i] for text, i in places])
        torch.testing.assert_close(hidden, states, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_a_branch_sees_the_text_it_left_and_itself(tmp_path: Path, arch: str) -> None:
    student = student_of(save_tiny(tmp_path, arch))
    branch, start = [7, 9, 30], 19
    logits = student(branch_batch(A, start, branch)).logits
    model = tiny_model(arch)
    torch.testing.assert_close(logits[: len(A)], model(torch.tensor([A])).logits[0], rtol=1e-4, atol=2e-5)
    off_path = model(torch.tensor([A[:start] + branch])).logits[0, start:]
    torch.testing.assert_close(logits[len(A) :], off_path, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_reduced_vocabulary_gives_the_same_columns(tmp_path: Path, tied: bool) -> None:
    path = save_tiny(tmp_path, tied=tied)
    batch = packed_batch([[A]], [(0, 4), (0, 20)])
    whole = student_of(path)(batch)
    reduced = student_of(path, vocab=DraftVocab(IDS))(batch)
    assert reduced.vocab_ids is not None
    assert reduced.vocab_ids.tolist() == list(IDS)
    torch.testing.assert_close(reduced.logits, whole.logits[:, list(IDS)])
    assert reduced.logits.dtype is torch.float32


@pytest.mark.parametrize("vocab", [None, DraftVocab(IDS)])
def test_layers_and_final_norm_learn_and_nothing_else(tmp_path: Path, vocab: DraftVocab | None) -> None:
    student = student_of(save_tiny(tmp_path, "qwen3"), vocab=vocab)
    batch = packed_batch([[A, B]], [(0, 3), (0, 30)])
    student(batch).logits.logsumexp(1).sum().backward()
    learning = {name for name, p in student.model.named_parameters() if p.requires_grad}
    assert learning == {
        name for name, _ in tiny_model("qwen3").named_parameters() if "layers." in name or "norm" in name
    }
    with_gradient = {name for name, p in student.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == learning


@pytest.mark.parametrize(("arch", "tied"), [("llama", True), ("llama", False), ("gemma3", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_draft_is_standard_and_serves(tmp_path: Path, arch: str, tied: bool, dtype: torch.dtype) -> None:
    origin = save_tiny(tmp_path / "origin", arch, tied=tied)
    tiny_model(arch, tied=tied).to(dtype).save_pretrained(origin)
    student = student_of(origin, vocab=DraftVocab(IDS))
    student.provenance["method"] = "test"
    optimiser = torch.optim.SGD([p for p in student.model.parameters() if p.requires_grad], lr=0.05)
    batch = packed_batch([[A]], [(0, i) for i in range(len(A))])
    student(batch).logits.logsumexp(1).sum().backward()
    optimiser.step()
    student.save(tmp_path / "draft")
    after = student(batch).logits.detach()  # it goes on working
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    assert plain.dtype is dtype
    tolerance = {"rtol": 1e-4, "atol": 2e-5} if dtype is torch.float32 else {"rtol": 0.1, "atol": 0.2}
    torch.testing.assert_close(plain.float()(torch.tensor([A])).logits[0][:, list(IDS)], after, **tolerance)
    assert torch.equal(
        embedding(plain).weight, tiny_model(arch, tied=tied).to(dtype).float().get_input_embeddings().weight
    )
    provenance = json.loads((tmp_path / "draft" / DRAFT_CONFIG).read_text())
    assert (provenance["method"], provenance["draft_vocab_size"]) == ("test", len(IDS))
    target = load_model(ModelRef(ModelKind.DIRECTORY, str(origin)), progress=lambda _: None)
    draft = load_draft(ModelRef(ModelKind.DIRECTORY, str(tmp_path / "draft")), target, progress=lambda _: None)
    assert draft.shares_embedding
    runner = ModelRunner(draft.model, num_blocks=8, block_size=4, vocab_size=64, output_ids=draft.output_ids)
    served = runner.forward([Chunk(A, 0, range(6), len(A))])[:, list(IDS)]
    torch.testing.assert_close(served, after, **tolerance)


def test_saving_again_and_loading_back_changes_nothing(tmp_path: Path) -> None:
    student = student_of(save_tiny(tmp_path / "a"), vocab=DraftVocab(IDS))
    student.save(tmp_path / "b")
    student_of(tmp_path / "b").save(tmp_path / "c")
    for file in ("model.safetensors", "config.json", "draft_vocab.json", "tokenizer.json"):
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "c" / file).read_bytes()
    with pytest.raises(FileExistsError):
        student.save(tmp_path / "b")


def test_saved_draft_assists_transformers(tmp_path: Path) -> None:
    target_dir = save_tiny(tmp_path / "t", layers=4)
    init_draft(
        ModelRef(ModelKind.DIRECTORY, str(target_dir)), tmp_path / "d", layers=[0, 1, 3], progress=lambda _: None
    )
    student_of(tmp_path / "d", vocab=DraftVocab(IDS)).save(tmp_path / "s")
    target = AutoModelForCausalLM.from_pretrained(target_dir)
    assistant = AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "s")) == 64
    ids = torch.tensor([A])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12, "pad_token_id": 1}
    assert torch.equal(target.generate(ids, **options), target.generate(ids, assistant_model=assistant, **options))


def test_student_uses_its_targets_embedding(tmp_path: Path) -> None:
    target = load_model(ModelRef(ModelKind.DIRECTORY, str(save_tiny(tmp_path, tied=True))), progress=lambda _: None)
    student = student_of(tmp_path, target=target)
    weight = embedding(target.model).weight
    assert any(p is weight for p in student.model.parameters())
    assert sum(p.shape == weight.shape and torch.equal(p, weight) for p in student.model.parameters()) == 1


def test_ids_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="64"):
        student_of(save_tiny(tmp_path), vocab=DraftVocab((1, 64)))
