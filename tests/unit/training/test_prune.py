"""Pruning: the identity, a reload that changes nothing, ties, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from redraft.errors import ConfigError
from redraft.models.loader import load_model, weights_fingerprint
from redraft.models.ref import ModelKind, ModelRef
from redraft.models.tokenizer import check_compatible, load_tokenizer
from redraft_training.__main__ import app
from redraft_training.student.checkpoint import DRAFT_CONFIG
from redraft_training.student.layers import evenly_spaced_layers, prune_layers
from redraft_training.student.prune import init_draft
from tests.fakes import ARCHITECTURES, save_tiny, tiny_model

IDS = torch.arange(3, 43)[None]  # longer than the sliding window


def directory_ref(path: Path) -> ModelRef:
    return ModelRef(ModelKind.DIRECTORY, str(path))


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["init", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_layers_kept_is_the_same_model(arch: str) -> None:
    model = tiny_model(arch, layers=3)
    prune_layers(model, [0, 1, 2])
    assert torch.equal(model(IDS).logits, tiny_model(arch, layers=3)(IDS).logits)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_pruned_model_is_its_layers_and_reloads_equal(tmp_path: Path, arch: str) -> None:
    model = tiny_model(arch, layers=5)
    stack = model.model.layers
    kept = [stack[0], stack[3]]
    prune_layers(model, [0, 3])
    assert list(model.model.layers) == kept
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    model.save_pretrained(tmp_path)
    reloaded = load_model(directory_ref(tmp_path), progress=lambda _: None).model
    assert reloaded.config.num_hidden_layers == 2
    assert torch.equal(reloaded(IDS).logits, model(IDS).logits)
    # The KV cache's slots go by layer_idx: a wrong one shows only with the cache in use
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = reloaded.generate(IDS, use_cache=True, **options)
    assert torch.equal(cached, reloaded.generate(IDS, use_cache=False, **options))


@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
def test_layer_types_follow_their_layers(arch: str) -> None:
    model = tiny_model(arch, layers=5)
    prune_layers(model, [1, 3, 4])
    assert model.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize("tied", [True, False])
def test_ties_survive(tmp_path: Path, tied: bool) -> None:
    save_tiny(tmp_path / "t", layers=3, tied=tied)
    init_draft(directory_ref(tmp_path / "t"), tmp_path / "d", layers=[0, 2], progress=lambda _: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "d")
    shared = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert shared is tied


def test_init_writes_a_complete_draft_with_provenance(tmp_path: Path) -> None:
    target = save_tiny(tmp_path / "t", "qwen3", layers=4)
    code, out, _ = run("--target", str(target), "--num-layers", "2", "--output", str(tmp_path / "d"))
    assert (code, "0, 3" in out) == (0, True)
    provenance = json.loads((tmp_path / "d" / DRAFT_CONFIG).read_text())
    assert provenance["layers"] == [0, 3]
    assert provenance["target"] == {
        "name": "t",
        "revision": None,
        "weights_fingerprint": weights_fingerprint(target),
        "num_hidden_layers": 4,
    }
    tokenizer = load_tokenizer(directory_ref(tmp_path / "d"))
    check_compatible(load_tokenizer(directory_ref(target)), tokenizer)
    assert provenance["tokenizer_fingerprint"] == tokenizer.fingerprint
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}])
    expected = tiny_model("qwen3", layers=4)
    prune_layers(expected, [0, 3])
    draft = load_model(directory_ref(tmp_path / "d"), progress=lambda _: None).model
    assert torch.equal(draft(IDS).logits, expected(IDS).logits)


def test_init_keeps_the_targets_dtype_and_fills_an_empty_directory(tmp_path: Path) -> None:
    target = save_tiny(tmp_path / "t")
    tiny_model("llama").to(torch.bfloat16).save_pretrained(target)
    (tmp_path / "d").mkdir()
    init_draft(directory_ref(target), tmp_path / "d", layers=[1], progress=lambda _: None)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "d").dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ("0,9", "9 is out of range, the target has layers 0 to 2"),
        ("-1,2", "-1 is out of range"),
        ("0,1,1", "1 is given twice"),
        ("2,0", "ascending"),
        ("0,x", "expected numbers"),
        ("", "expected numbers"),
    ],
)
def test_bad_layers_are_one_clear_line(tmp_path: Path, layers: str, text: str) -> None:
    target = save_tiny(tmp_path / "t", layers=3)
    code, _, err = run("--target", str(target), "--layers", layers, "--output", str(tmp_path / "d"))
    last = err.strip().splitlines()[-1]
    assert (code, last.startswith("error: "), text in last) == (2, True, True)
    assert not (tmp_path / "d").exists()


def test_other_bad_input_is_one_clear_line(tmp_path: Path) -> None:
    target = str(save_tiny(tmp_path / "t", layers=3))
    free = str(tmp_path / "d")
    for arguments, status, text in [
        (["--target", target, "--layers", "0", "--output", target], 2, "not an empty directory"),
        (["--target", target, "--num-layers", "4", "--output", free], 2, "out of range"),
        (["--target", target, "--num-layers", "0", "--output", free], 2, "out of range"),
        (["--target", target, "--output", free], 2, "either --layers"),
        (["--target", target, "--layers", "0", "--num-layers", "1", "--output", free], 2, "either --layers"),
        (["--target", str(tmp_path / "none"), "--layers", "0", "--output", free], 1, "no directory"),
        (["--target", "a b", "--layers", "0", "--output", free], 1, "not a model name"),
    ]:
        code, _, err = run(*arguments)
        assert code == status
        assert text in err
        assert "Traceback" not in err


def test_evenly_spaced_layers() -> None:
    assert evenly_spaced_layers(4, 30) == (0, 10, 19, 29)
    assert evenly_spaced_layers(1, 30) == (0,)
    assert evenly_spaced_layers(30, 30) == tuple(range(30))
    for total in range(1, 40):
        for count in range(1, total + 1):
            chosen = evenly_spaced_layers(count, total)
            assert len(set(chosen)) == count
    with pytest.raises(ConfigError):
        evenly_spaced_layers(31, 30)
