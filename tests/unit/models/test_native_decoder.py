"""A whole pass in the native kernels: equal to transformers' code, bit by bit independent of company, or not taken."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from redraft.models import native_decoder as module
from redraft.models.heads import output_head
from redraft.models.native_decoder import NativeDecoder
from redraft.models.packed import KernelLinear, NativeLinear, pack_linears_int8
from redraft.models.quantised import dequantise, layer_linears, quantise
from redraft.models.runner import Chunk, ModelRunner

VOCAB, BLOCK_SIZE, NUM_BLOCKS = 70, 4, 40
IDS = [3 + i * 7 % 60 for i in range(61)]
TABLE = [7, 2, 39, 4, 11, 0, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31]
OTHER = [1, 3, 5, 6, 8, 10, 12, 14]

pytestmark = pytest.mark.usefixtures("kernels")

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


def configured(kind: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    return kind(**(SIZES | changes))


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
COVERED = {
    "llama": configured(LlamaConfig),
    "llama, tied": configured(LlamaConfig, tie_word_embeddings=True),
    "llama, biases": configured(LlamaConfig, attention_bias=True, mlp_bias=True),
    "llama, one head each": configured(LlamaConfig, num_key_value_heads=6, head_dim=8),
    "llama3 positions": configured(LlamaConfig, rope_parameters=LLAMA3),
    "yarn positions": configured(LlamaConfig, rope_parameters=YARN),
    "mistral": configured(MistralConfig, sliding_window=None),
    "qwen2": configured(Qwen2Config),
}
NOT_COVERED = {
    "gemma2": configured(Gemma2Config),
    "qwen3": configured(Qwen3Config),
    "mixtral": configured(MixtralConfig, num_local_experts=2, sliding_window=None),
    "mistral with a window": configured(MistralConfig, sliding_window=16),
    "qwen2 with a window": configured(Qwen2Config, use_sliding_window=True, sliding_window=16, max_window_layers=1),
    "gelu": configured(LlamaConfig, hidden_act="gelu"),
    "positions by length": configured(
        LlamaConfig, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "odd head": configured(LlamaConfig, head_dim=12, num_attention_heads=4, num_key_value_heads=4),
    "odd width": configured(LlamaConfig, intermediate_size=88),
}


def built(config: PreTrainedConfig) -> PreTrainedModel:
    """A random model, biases and norms included; the same for the same config."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto: Any = AutoModelForCausalLM
        model: PreTrainedModel = auto.from_config(deepcopy(config))  # a runner writes into its model's config
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
            elif "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    torch.nn.Module.eval(model).requires_grad_(False)
    return model


def runner_of(model: PreTrainedModel, output_ids: Tensor | None = None) -> ModelRunner:
    return ModelRunner(model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, vocab_size=VOCAB, output_ids=output_ids)


def native(runner: ModelRunner) -> NativeDecoder:
    found = runner._native
    assert found is not None
    return found


def in_pieces(forward: Callable[[list[Chunk]], Tensor]) -> Tensor:
    """All logits of IDS, in pieces of several sizes, alone and between chunks of others, some without logits."""
    parts = [forward([Chunk(IDS[:19], 0, TABLE, 19)])]
    parts += [forward([Chunk(IDS[i : i + 1], i, TABLE, 1)]) for i in range(19, 22)]
    neighbours = [Chunk(IDS[5:16], 0, OTHER, 0), Chunk(IDS[30:34], 0, [33, 34], 2)]
    parts.append(forward([neighbours[0], Chunk(IDS[22:27], 22, TABLE, 5), neighbours[1]])[:5])
    parts.append(forward([neighbours[1], Chunk(IDS[27:52], 27, TABLE, 25), neighbours[0]])[2:])
    forward([Chunk(IDS[52:55], 52, TABLE, 0)])
    parts.append(forward([Chunk(IDS[52:], 52, TABLE, len(IDS) - 52)]))
    return torch.cat(parts)


@pytest.mark.parametrize("config", COVERED.values(), ids=COVERED)
def test_logits_are_those_of_transformers(config: PreTrainedConfig) -> None:
    expected = built(config)(torch.tensor([IDS])).logits[0]
    logits = in_pieces(native(runner_of(built(config))).forward)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(logits.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("config", COVERED.values(), ids=COVERED)
def test_a_row_is_bitwise_the_same_in_any_company(config: PreTrainedConfig) -> None:
    runner = runner_of(built(config))
    at_once = runner.forward([Chunk(IDS, 0, list(range(16)), len(IDS))])
    assert torch.equal(at_once, in_pieces(runner.forward))
    last = runner.forward([Chunk(IDS, 0, TABLE, 3), Chunk(IDS[:9], 0, [32, 33, 34], 1)])
    assert torch.equal(last, torch.cat([at_once[-3:], at_once[8:9]]))


@pytest.mark.parametrize("config", NOT_COVERED.values(), ids=NOT_COVERED)
def test_other_models_go_on_through_transformers(config: PreTrainedConfig) -> None:
    expected = built(config)(torch.tensor([IDS])).logits[0]
    runner = runner_of(built(config))
    assert runner._native is None
    torch.testing.assert_close(in_pieces(runner.forward), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_without_kernels_or_in_another_dtype_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    half = torch.nn.Module.to(built(COVERED["llama"]), dtype=torch.bfloat16)
    assert runner_of(half)._native is None
    monkeypatch.setattr(module, "library", lambda: None)
    assert runner_of(built(COVERED["llama"]))._native is None


def test_a_reduced_head_computes_its_ids_only() -> None:
    ids = torch.tensor([0, 2, 3, 5, 8, 13, 21, 34, 55, 69])
    whole = runner_of(built(COVERED["llama, tied"])).forward([Chunk(IDS, 0, TABLE, 5)])
    runner = runner_of(built(COVERED["llama, tied"]), ids)
    cut = native(runner).forward([Chunk(IDS, 0, TABLE, 5)])
    assert cut.shape == (5, VOCAB)
    assert torch.equal(cut[:, ids], whole[:, ids])
    assert torch.isneginf(cut).sum() == 5 * (VOCAB - 10)


@pytest.mark.parametrize("vocab_size", [VOCAB - 9, VOCAB, VOCAB + 20])
def test_logits_are_as_wide_as_the_tokenizer(vocab_size: int) -> None:
    runner = ModelRunner(built(COVERED["llama"]), num_blocks=16, block_size=4, vocab_size=vocab_size)
    logits = native(runner).forward([Chunk(IDS[:7], 0, range(2), 7)])
    expected = built(COVERED["llama"])(torch.tensor([IDS[:7]])).logits[0]
    assert logits.shape == (7, vocab_size)
    both = min(vocab_size, VOCAB)
    torch.testing.assert_close(logits[:, :both], expected[:, :both], rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert torch.isneginf(logits[:, both:]).all()


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_int8_layers_are_taken_as_they_are(name: str) -> None:
    rounded = built(COVERED[name])
    for _, linear in layer_linears(rounded):
        linear.weight.copy_(dequantise(*quantise(linear.weight)))
    expected = rounded(torch.tensor([IDS])).logits[0]
    model = built(COVERED[name])
    assert pack_linears_int8(model, head=None) == 3 * 7
    logits = in_pieces(native(runner_of(model)).forward)
    # quantised layers take activations in 16 bits
    torch.testing.assert_close(logits, expected, rtol=0.0, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("int8", [False, True])
def test_weights_are_held_once_and_the_module_still_works_on_them(int8: bool) -> None:
    model = built(COVERED["llama, biases"])
    if int8:
        pack_linears_int8(model, head=output_head(model))
    runner = runner_of(model)
    packed = [m for m in model.modules() if isinstance(m, KernelLinear)]
    assert len(packed) == 3 * 7 + 1
    for layer in model.model.layers:  # type: ignore[union-attr]
        attention, mlp = layer.self_attn, layer.mlp  # type: ignore[union-attr]
        for row in ([attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]):
            panels = [linear._panels for linear in row]
            assert [p.data_ptr() + p.nbytes for p in panels[:-1]] == [p.data_ptr() for p in panels[1:]]
            assert all(linear.weight_packed.panels is linear._panels for linear in row)
    assert not any(isinstance(m, torch.nn.Linear) for m in model.modules())
    chunks = [Chunk(IDS, 0, TABLE, len(IDS))]
    # a last bit of an activation may decide how it is rounded to 16
    tolerance = 1e-3 if int8 else 1e-4
    torch.testing.assert_close(
        runner.forward(chunks), runner._transformers_forward(chunks), rtol=tolerance, atol=tolerance
    )


def test_a_second_runner_of_a_model_shares_its_weights_with_the_first() -> None:
    model = built(COVERED["llama"])
    first = runner_of(model)
    places = [m._panels.data_ptr() for m in model.modules() if isinstance(m, NativeLinear)]
    second = runner_of(model)
    assert [m._panels.data_ptr() for m in model.modules() if isinstance(m, NativeLinear)] == places
    chunks = [Chunk(IDS, 0, TABLE, 4)]
    assert torch.equal(first.forward(chunks), second.forward(chunks))


def test_positions_beyond_a_page_of_angles() -> None:
    config = configured(LlamaConfig, num_hidden_layers=1, max_position_embeddings=4096)
    tokens = [IDS[i % 61] for i in range(module._ROTARY_PAGE + 40)]
    num_blocks = -(-len(tokens) // 16)
    runner = ModelRunner(built(config), num_blocks=num_blocks, block_size=16, vocab_size=VOCAB)
    expected = built(config)(torch.tensor([tokens])).logits[0, -50:]
    logits = runner.forward([Chunk(tokens, 0, range(num_blocks), 50)])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk([VOCAB], 0, TABLE),
        Chunk([-1], 0, TABLE),
        Chunk([1], 0, [NUM_BLOCKS]),
        Chunk([1], 4, [-1, 2]),
        Chunk([1, 2], 3, [1]),
    ],
    ids=["token too large", "token negative", "block too large", "block negative", "table too short"],
)
def test_ids_that_are_not_there_are_refused_and_nothing_is_stored(chunk: Chunk) -> None:
    runner = runner_of(built(COVERED["llama"]))
    with pytest.raises(IndexError):
        runner.forward([Chunk(IDS[:4], 0, [5]), chunk])
    assert not runner.cache.keys.any()


def test_a_chunk_without_wanted_logits_only_stores() -> None:
    runner = runner_of(built(COVERED["llama"]))
    assert runner.forward([Chunk(IDS[:9], 0, TABLE, 0)]).shape == (0, VOCAB)
    stored = runner.cache.keys.clone(), runner.cache.values.clone()
    runner.forward([Chunk(IDS[:9], 0, TABLE, 9)])
    assert torch.equal(stored[0], runner.cache.keys)
    assert torch.equal(stored[1], runner.cache.values)


def test_no_chunks_are_no_logits() -> None:
    assert runner_of(built(COVERED["llama"])).forward([]).shape == (0, VOCAB)
