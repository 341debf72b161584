"""Pruning by measurement: what does nothing is what goes, and the result is a standard checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from redraft.errors import ConfigError, UnsupportedModel
from redraft.models.draft_vocab import DraftVocab
from redraft.models.ref import ModelKind, ModelRef
from redraft.sampling.params import SamplingParams
from redraft_training.dataset.example import Example
from redraft_training.student.checkpoint import DRAFT_CONFIG
from redraft_training.student.importance import Importance, block_influence, choose_layers
from redraft_training.student.layers import only_layers
from redraft_training.student.prune import DraftShape, init_draft
from redraft_training.student.vocabulary import coverage, draft_vocabulary
from redraft_training.student.width import prune_width
from tests.fakes import ARCHITECTURES, save_tiny, tiny_model

TEXTS = [[3 + (i * step) % 60 for i in range(19)] for step in (7, 11, 13)]
IDS = torch.tensor([TEXTS[1]])
NO_EFFECT = (1, 3, 4)


def mostly_idle(arch: str = "llama") -> PreTrainedModel:
    """Six layers, three of which add nothing to the residual stream."""
    model = tiny_model(arch, layers=6)
    for index in NO_EFFECT:
        layer = model.model.layers[index]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    return model


@pytest.mark.parametrize("method", [Importance.BLOCK_INFLUENCE, Importance.GREEDY])
def test_layers_without_effect_are_not_chosen(method: Importance) -> None:
    model = mostly_idle()
    assert choose_layers(model, TEXTS, 3, method=method) == (0, 2, 5)
    assert torch.equal(model(IDS).logits, mostly_idle()(IDS).logits)


def divergence(model: PreTrainedModel, layers: tuple[int, ...]) -> float:
    expected = model(IDS).logits[0].log_softmax(1)
    with only_layers(model, layers):
        log_probs = model(IDS).logits[0].log_softmax(1)
    return float(torch.nn.functional.kl_div(log_probs, expected, reduction="sum", log_target=True))


@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_the_best_of_its_last_exchange_and_never_worse_than_influence(seed: int) -> None:
    model = tiny_model("qwen3", layers=5, seed=seed)
    influential = choose_layers(model, [TEXTS[1]], 2, method=Importance.BLOCK_INFLUENCE)
    chosen = choose_layers(model, [TEXTS[1]], 2)
    assert divergence(model, chosen) <= divergence(model, influential) * (1 + 1e-5)
    best_alone = min(range(5), key=lambda layer: divergence(model, (layer,)))
    assert choose_layers(model, [TEXTS[1]], 1) == (best_alone,)


@pytest.mark.parametrize("arch", ["gemma2", "gemma3", "qwen2"])
def test_only_layers_is_undone(arch: str) -> None:
    model, same = tiny_model(arch, layers=4), tiny_model(arch, layers=4)
    with only_layers(model, [1, 2]):
        assert not torch.equal(model(IDS).logits, same(IDS).logits)
    assert torch.equal(model(IDS).logits, same(IDS).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **options), same.generate(IDS, **options))


def test_block_influence_is_one_minus_the_cosine() -> None:
    model = tiny_model("llama", layers=3)
    states = model(IDS, output_hidden_states=True).hidden_states  # the last is after the final norm
    found = block_influence(model, [IDS])
    for layer in (0, 1):
        cosine = torch.cosine_similarity(states[layer], states[layer + 1], dim=-1)
        assert found[layer] == pytest.approx(float((1 - cosine).mean()), abs=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_channels_and_heads_without_effect_go_first(tmp_path: Path, arch: str) -> None:
    model = tiny_model(arch, layers=3)
    idle = torch.arange(64) % 4 == 1
    for index, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.weight[:, idle] = 0
        first_group = slice(0, 16) if index % 2 else slice(16, 32)
        layer.self_attn.o_proj.weight[:, first_group] = 0
    expected = model(IDS).logits
    before = sum(p.numel() for p in model.parameters())
    prune_width(model, TEXTS, intermediate_size=48, num_key_value_heads=1)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == before - 3 * (16 * 3 * 32 + (16 + 8 + 8 + 16) * 32) - (
        3 * (16 + 8 + 8) if arch == "qwen2" else 0
    )
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (reloaded.config.intermediate_size, reloaded.config.num_attention_heads) == (48, 2)
    torch.testing.assert_close(reloaded(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_layers_built_otherwise_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.gate_proj = torch.nn.Identity()
    with pytest.raises(UnsupportedModel, match="gate_proj"):
        prune_width(model, TEXTS, intermediate_size=8)


def test_init_writes_the_whole_shape(tmp_path: Path) -> None:
    save_tiny(tmp_path / "t", layers=6)
    mostly_idle().save_pretrained(tmp_path / "t")
    shape = DraftShape(
        num_layers=3,
        importance=Importance.GREEDY,
        intermediate_size=40,
        num_key_value_heads=1,
        vocab=DraftVocab((0, 7, 9)),
    )
    target = ModelRef(ModelKind.DIRECTORY, str(tmp_path / "t"))
    kept = init_draft(target, tmp_path / "d", shape=shape, calibration=TEXTS, progress=lambda _: None)
    assert kept == (0, 2, 5)
    provenance = json.loads((tmp_path / "d" / DRAFT_CONFIG).read_text())
    wanted = {"layers": [0, 2, 5], "importance": "greedy", "intermediate_size": 40, "draft_vocab_size": 3}
    assert {key: provenance[key] for key in wanted} == wanted
    assert DraftVocab.read(tmp_path / "d") == shape.vocab
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "d")
    assert draft.config.num_key_value_heads == 1
    assert provenance["num_parameters"] == sum(p.numel() for p in draft.parameters())


@pytest.mark.parametrize(
    ("shape", "texts", "message"),
    [
        (DraftShape(num_layers=2, importance=Importance.GREEDY), [], "no calibration text"),
        (DraftShape(num_layers=2, importance=Importance.GREEDY), [[1]], "no calibration text"),
        (DraftShape(num_layers=7, importance=Importance.GREEDY), TEXTS, "out of range"),
        (DraftShape(layers=[0], intermediate_size=65), TEXTS, "--intermediate-size 65"),
        (DraftShape(layers=[0], num_key_value_heads=0), TEXTS, "--num-key-value-heads 0"),
        (DraftShape(layers=[0], num_key_value_heads=1), [], "no calibration text"),
    ],
)
def test_bad_shapes_are_one_clear_line(tmp_path: Path, shape: DraftShape, texts: list[list[int]], message: str) -> None:
    target = ModelRef(ModelKind.DIRECTORY, str(save_tiny(tmp_path / "t")))
    with pytest.raises(ConfigError, match=message):
        init_draft(target, tmp_path / "d", shape=shape, calibration=texts, progress=lambda _: None)
    assert not (tmp_path / "d").exists()


def example(prompt: tuple[int, ...], output: tuple[int, ...]) -> Example:
    return Example("r", 0, "a", 0.0, prompt, output, SamplingParams(), (None,) * len(output))


def test_draft_vocabulary_prefers_outputs_then_prompts_then_low_ids() -> None:
    examples = [example((50, 51, 51, 9), (9, 9, 9, 8)), example((52,), (8, 7, 9))]
    assert draft_vocabulary(examples, 2, vocab_size=64).ids == (8, 9)
    assert draft_vocabulary(examples, 4, vocab_size=64, always=[63, 0]).ids == (0, 8, 9, 63)
    assert draft_vocabulary(examples, 8, vocab_size=64).ids == (0, 1, 7, 8, 9, 50, 51, 52)
    assert len(draft_vocabulary([], 64, vocab_size=64).ids) == 64
    assert coverage(examples, DraftVocab((8, 63))) == pytest.approx(2 / 7)
    for size in (0, 1, 65):
        with pytest.raises(ConfigError, match="out of range"):
            draft_vocabulary(examples, size, vocab_size=64, always=[1, 2])
