"""The demo model, downloaded and converted: the same weights, the same tokens, a sensible answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from redraft.models.demo import DEMO_SHA256, demo_gguf
from redraft.models.gguf import convert_gguf
from redraft.models.loader import LoadedModel, load_model
from redraft.models.ref import ModelRef
from redraft.models.tokenizer import Tokenizer, check_compatible, load_tokenizer
from redraft_training.student.prune import init_draft

pytestmark = pytest.mark.model

DEMO = ModelRef.parse("demo")
# Not any character: the vocabulary lacks some bytes of rare ones, which the tokenizer drops
ALPHABET = "abz ABZ 019 .,!?\n\t'\"<|>{}_\u00e9\u00df\u0416\u4e2d\u6587\u20ac\U0001f600\U0001f44d"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(DEMO)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO)


def test_config_is_a_plain_llama(loaded: LoadedModel, tokenizer: Tokenizer) -> None:
    config = loaded.config
    assert (loaded.name, loaded.revision) == ("SmolLM2-135M-Instruct", DEMO_SHA256)
    assert not hasattr(config, "quantization_config")
    assert config.rms_norm_eps == 1e-05
    assert config.max_position_embeddings == 8192
    assert loaded.model.generation_config.eos_token_id == 2
    assert loaded.model.num_parameters() == 134_515_008
    head, embedding = loaded.model.get_output_embeddings(), loaded.model.get_input_embeddings()
    assert head.weight.data_ptr() == embedding.weight.data_ptr()
    assert tokenizer.vocab_size == config.vocab_size == 49152
    assert tokenizer.eos_token_ids == {2}


def test_weights_equal_ggufs_own_dequantiser(loaded: LoadedModel) -> None:
    tensors = {tensor.name: tensor for tensor in GGUFReader(demo_gguf()).tensors}

    def reference(name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(dequantize(tensors[name].data, tensors[name].tensor_type)))

    def unpermuted(name: str, heads: int) -> torch.Tensor:
        # GGUF interleaves the two halves of each head's rotary pairs
        weight = reference(name)
        return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    model = loaded.model.model
    assert torch.equal(model.embed_tokens.weight, reference("token_embd.weight"))
    assert torch.equal(model.norm.weight, reference("output_norm.weight"))
    for index in (0, 17, 29):
        layer = model.layers[index]
        assert torch.equal(layer.self_attn.q_proj.weight, unpermuted(f"blk.{index}.attn_q.weight", 9))
        assert torch.equal(layer.self_attn.k_proj.weight, unpermuted(f"blk.{index}.attn_k.weight", 3))
        assert torch.equal(layer.self_attn.v_proj.weight, reference(f"blk.{index}.attn_v.weight"))
        assert torch.equal(layer.mlp.down_proj.weight, reference(f"blk.{index}.ffn_down.weight"))
        assert torch.equal(layer.input_layernorm.weight, reference(f"blk.{index}.attn_norm.weight"))


def test_greedy_chat_answers_and_ends(loaded: LoadedModel, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
    output = loaded.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20)[0]
    answer = output[len(prompt) :].tolist()
    text = tokenizer.decode(answer, skip_special_tokens=False)
    assert text == "The capital of France is Paris.<|im_end|>"
    assert answer[-1] in tokenizer.eos_token_ids


def test_digits_are_split_one_by_one(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a 2026")
    assert [tokenizer.token_text(token_id) for token_id in ids[-4:]] == ["2", "0", "2", "6"]
    assert '"Digits"' in tokenizer._backend.to_str()


def test_chat_template_adds_the_system_turn(tokenizer: Tokenizer) -> None:
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids[0] == 1


@settings(deadline=None)
@given(text=st.text(ALPHABET, max_size=40), ids=st.lists(st.integers(0, 49151), max_size=40), size=st.integers(1, 5))
def test_streamed_text_is_the_decoded_text(tokenizer: Tokenizer, text: str, ids: list[int], size: int) -> None:
    for sequence in (tokenizer.encode(text), ids):
        stream = tokenizer.detokenizer()
        pushed = [stream.push(sequence[at : at + size]) for at in range(0, len(sequence), size)]
        assert "".join(pushed) + stream.flush() == tokenizer.decode(sequence)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_second_conversion_is_found_not_made() -> None:
    first, _ = convert_gguf(demo_gguf())
    lines: list[str] = []
    again, digest = convert_gguf(demo_gguf(progress=lines.append), progress=lines.append)
    assert (again, digest, lines) == (first, DEMO_SHA256, [])


def test_first_draft_of_the_demo(tmp_path: Path, loaded: LoadedModel, tokenizer: Tokenizer) -> None:
    output = tmp_path / "draft"
    assert init_draft(DEMO, output, layers=[0, 10, 20, 29]) == (0, 10, 20, 29)
    draft_ref = ModelRef.parse(str(output))
    draft = load_model(draft_ref)
    assert draft.model.num_parameters() == 42_472_512
    assert torch.equal(draft.model.model.layers[1].mlp.up_proj.weight, loaded.model.model.layers[10].mlp.up_proj.weight)
    check_compatible(tokenizer, load_tokenizer(draft_ref))
