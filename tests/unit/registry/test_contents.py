"""What may be published: a checkpoint, whole, with nothing in it that could run."""

from __future__ import annotations

from pathlib import Path

import pytest

from redraft.files import sha256_file
from redraft.registry.contents import check_directory, describe_directory
from redraft.registry.errors import CorruptDraft, UnsafeDraft
from tests.unit.registry.fakes import make_draft


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    return make_draft(tmp_path / "draft")


def test_every_file_with_hash_and_size(draft: Path) -> None:
    (draft / ".cache").mkdir()  # hidden: not part of the draft
    files = describe_directory(draft)
    assert sorted(files) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert files["model.safetensors"].bytes == 3000
    assert files["model.safetensors"].sha256 == sha256_file(draft / "model.safetensors")
    check_directory(draft, files)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "state.PKL", "x.pth", "rng.npz"])
def test_pickles_are_refused_even_beside_safetensors(draft: Path, name: str) -> None:
    (draft / name).write_bytes(b"cos\nsystem\n")
    with pytest.raises(UnsafeDraft, match="pickle"):
        describe_directory(draft)


@pytest.mark.parametrize("name", ["modeling_x.py", "run.sh", "manifest.json", "a b.json", "model.so"])
def test_code_and_names_of_the_registry_itself_are_refused(draft: Path, name: str) -> None:
    (draft / name).write_text("x", encoding="utf-8")
    with pytest.raises(UnsafeDraft, match="cannot hold"):
        describe_directory(draft)


def test_directories_are_refused(draft: Path) -> None:
    (draft / "checkpoint.json").mkdir()
    with pytest.raises(UnsafeDraft, match="not a plain file"):
        describe_directory(draft)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_foreign_directory_is_refused(draft: Path, missing: str) -> None:
    (draft / missing).unlink()
    with pytest.raises(CorruptDraft, match=r"config\.json|safetensors"):
        describe_directory(draft)
    with pytest.raises(CorruptDraft, match="no draft directory"):
        describe_directory(draft / "nowhere")


def test_a_directory_that_differs_from_its_description(draft: Path) -> None:
    files = describe_directory(draft)
    (draft / "extra.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CorruptDraft, match=r"also holds extra\.json"):
        check_directory(draft, files)
    (draft / "extra.json").unlink()
    weights = draft / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")  # same size
    with pytest.raises(CorruptDraft, match=r"another version of model\.safetensors"):
        check_directory(draft, files)
    (draft / "tokenizer.json").unlink()
    with pytest.raises(CorruptDraft, match=r"misses tokenizer\.json"):
        check_directory(draft, files)
