"""GGUF conversion on a tiny file written here: the weights, config and tokenizer come back as they were."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import pytest
import torch
from transformers import PreTrainedModel

from redraft.errors import ModelNotFound, UnsupportedModel
from redraft.models import gguf as conversion
from redraft.models.cache import Progress
from redraft.models.gguf import convert_gguf, shortest_float32
from redraft.models.loader import load_model
from redraft.models.ref import ModelRef
from redraft.models.tokenizer import Tokenizer, load_tokenizer
from tests.fakes import EOS, EOS_ID, PAD, PAD_ID, UNK, UNK_ID, tiny_model, tiny_tokenizer

LAYER_TENSORS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF's order of the rows of q and k: each head's rotary halves interleaved."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: PreTrainedModel, *, pre: str = "smollm") -> None:
    """Write a tiny Llama and `tiny_tokenizer(300)` as llama.cpp would, in fp32."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(tiny_tokenizer(300).backend_tokenizer.to_str())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in (EOS, PAD, UNK) else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_eos_token_id(EOS_ID)
    writer.add_bos_token_id(EOS_ID)
    writer.add_pad_token_id(PAD_ID)
    writer.add_unk_token_id(UNK_ID)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = model.state_dict()
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    writer.add_tensor("output.weight", state["lm_head.weight"].numpy())
    for layer in range(config.num_hidden_layers):
        for ours, theirs in LAYER_TENSORS.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            weight = permuted(weight, heads[ours]) if ours in heads else weight
            writer.add_tensor(f"blk.{layer}.{ours}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_conversion_gives_back_the_model(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=300)
    model.config.rms_norm_eps = 1e-5
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-5
    write_gguf(tmp_path / "tiny.gguf", model)
    lines: list[str] = []
    ref = ModelRef.parse(str(tmp_path / "tiny.gguf"))
    loaded = load_model(ref, cache_dir=tmp_path / "cache", progress=lines.append)
    ids = torch.arange(3, 43)[None]
    torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert loaded.name == "tiny"
    assert loaded.config.rms_norm_eps == 1e-5
    assert not hasattr(loaded.config, "quantization_config")
    assert sum("Converting" in line for line in lines) == 1
    assert str(tmp_path) not in (loaded.directory / "config.json").read_text()

    tokenizer = load_tokenizer(ref, cache_dir=tmp_path / "cache", progress=lines.append)
    assert sum("Converting" in line for line in lines) == 1  # found, not made again
    assert tokenizer.eos_token_ids == {EOS_ID}
    text = "aab 2026 h\u00e9llo\n"
    assert tokenizer.encode(text) == Tokenizer(tiny_tokenizer(300)).encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}]) == tokenizer.encode("ab")
    pre_tokenizer = json.loads((loaded.directory / "tokenizer.json").read_text())["pre_tokenizer"]
    assert [part["type"] for part in pre_tokenizer["pretokenizers"]] == ["Digits", "ByteLevel"]
    assert json.loads((loaded.directory / "tokenizer_config.json").read_text())["model_max_length"] == 512


@pytest.mark.parametrize(("pre", "noted"), [("homemade", True), ("gpt-2", False)])
def test_unknown_splitting_rule_is_said(tmp_path: Path, pre: str, noted: bool) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=300), pre=pre)
    lines: list[str] = []
    convert_gguf(tmp_path / "tiny.gguf", cache_dir=tmp_path, progress=lines.append)
    assert any("'homemade'" in line for line in lines) is noted


def test_what_is_no_gguf_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no GGUF file"):
        convert_gguf(tmp_path / "a.gguf", cache_dir=tmp_path)
    (tmp_path / "b.gguf").write_bytes(b"not a model")
    with pytest.raises(UnsupportedModel, match="not a GGUF file"):
        convert_gguf(tmp_path / "b.gguf", cache_dir=tmp_path / "cache", progress=lambda _: None)
    (tmp_path / "c.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(UnsupportedModel, match=r"cannot convert c\.gguf"):
        convert_gguf(tmp_path / "c.gguf", cache_dir=tmp_path / "cache", progress=lambda _: None)
    assert not any(path.is_dir() for path in (tmp_path / "cache" / "gguf").iterdir())


def test_concurrent_conversions_do_the_work_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = threading.Barrier(4)
    runs: list[str] = []

    def convert(path: Path, output: Path, progress: Progress) -> None:
        runs.append(path.name)
        (output / "config.json").touch()

    def call() -> Path:
        ready.wait()
        return convert_gguf(tmp_path / "a.gguf", cache_dir=tmp_path, progress=lambda _: None)[0]

    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(conversion, "_convert", convert)
    with ThreadPoolExecutor(4) as pool:
        directories = {call.result() for call in [pool.submit(call) for _ in range(4)]}
    assert len(directories) == 1
    assert [path.name for path in directories.pop().iterdir()] == ["config.json"]
    assert runs == ["a.gguf"]


def test_shortest_float32() -> None:
    assert shortest_float32(9.999999747378752e-06) == 1e-05
    assert shortest_float32(1e-05) == 1e-05  # a double that is no float32 is left alone
    assert shortest_float32(0.5) == 0.5
