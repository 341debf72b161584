"""A reduced output vocabulary: the file, the runner's logits, and what a draft shares with its target."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from redraft.errors import ModelError, TokenizerMismatch, UnsupportedModel
from redraft.models.draft import LoadedDraft, load_draft
from redraft.models.draft_vocab import DRAFT_VOCAB, DraftVocab
from redraft.models.heads import embedding, output_head
from redraft.models.loader import LoadedModel, load_model
from redraft.models.ref import ModelKind, ModelRef
from redraft.models.runner import Chunk, ModelRunner
from redraft.sampling.params import SamplingParams
from redraft.sampling.processors import SamplingRow, probabilities
from tests.fakes import ARCHITECTURES, save_tiny, tiny_model, tiny_tokenizer

IDS = (0, 5, 6, 17, 40, 63)
PROMPT = [3 + i * 7 % 60 for i in range(13)]


def reference(path: Path) -> ModelRef:
    return ModelRef(ModelKind.DIRECTORY, str(path))


def load(path: Path) -> LoadedModel:
    return load_model(reference(path), progress=lambda _: None)


def draft_of(path: Path, target: LoadedModel) -> LoadedDraft:
    return load_draft(reference(path), target, progress=lambda _: None)


def run(model: LoadedModel | LoadedDraft, output_ids: torch.Tensor | None = None) -> torch.Tensor:
    runner = ModelRunner(model.model, num_blocks=8, block_size=4, vocab_size=64, output_ids=output_ids)
    return runner.forward([Chunk(PROMPT, 0, range(4), len(PROMPT))])


def test_file_round_trip(tmp_path: Path) -> None:
    assert DraftVocab.read(tmp_path) is None
    DraftVocab(IDS).write(tmp_path)
    assert DraftVocab.read(tmp_path) == DraftVocab(IDS)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"ids": [1]}',
        '{"schema_version": 2, "ids": [1]}',
        '{"schema_version": 1, "ids": {}}',
        '{"schema_version": 1, "ids": []}',
        '{"schema_version": 1, "ids": [2, 1]}',
        '{"schema_version": 1, "ids": [1, 1]}',
        '{"schema_version": 1, "ids": [-1, 1]}',
        '{"schema_version": 1, "ids": [true, 2]}',
        '{"schema_version": 1, "ids": ["1"]}',
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / DRAFT_VOCAB).write_text(text)
    with pytest.raises(ModelError):
        DraftVocab.read(tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_runner_computes_only_the_given_ids(arch: str) -> None:
    ids = torch.tensor(IDS)
    expected = tiny_model(arch)(torch.tensor([PROMPT])).logits[0]
    runner = ModelRunner(tiny_model(arch), num_blocks=8, block_size=4, vocab_size=64, output_ids=ids)
    head = output_head(runner.model)
    assert head is not None
    assert head.out_features == len(IDS)
    logits = runner.forward([Chunk(PROMPT, 0, range(4), len(PROMPT))])
    assert logits.shape == (len(PROMPT), 64)
    torch.testing.assert_close(logits[:, ids], expected[:, ids], rtol=1e-4, atol=2e-5)
    others = torch.tensor([v for v in range(64) if v not in IDS])
    assert torch.isneginf(logits[:, others]).all()
    for params in (SamplingParams(temperature=0.0), SamplingParams(temperature=0.7, top_p=0.95), SamplingParams()):
        q = probabilities(logits, [SamplingRow(params)] * len(PROMPT))
        assert (q[:, others] == 0).all()
        torch.testing.assert_close(q.sum(1), torch.ones(len(PROMPT)))


def test_bias_follows_its_rows() -> None:
    model = tiny_model("llama", tied=False)
    head = nn.Linear(32, 64, bias=True).requires_grad_(False)
    model.set_output_embeddings(head)
    expected = model(torch.tensor([PROMPT])).logits[0, :, list(IDS)]
    runner = ModelRunner(model, num_blocks=8, block_size=4, vocab_size=64, output_ids=torch.tensor(IDS))
    logits = runner.forward([Chunk(PROMPT, 0, range(4), len(PROMPT))])
    torch.testing.assert_close(logits[:, list(IDS)], expected, rtol=1e-4, atol=2e-5)


def test_a_packed_head_cannot_be_cut() -> None:
    model = tiny_model("llama")
    ModelRunner(model, num_blocks=8, block_size=4, vocab_size=64)
    with pytest.raises(UnsupportedModel, match="cannot be cut"):
        ModelRunner(model, num_blocks=8, block_size=4, vocab_size=64, output_ids=torch.tensor(IDS))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("packed_before", [True, False])
def test_draft_shares_its_targets_ends(tmp_path: Path, tied: bool, packed_before: bool) -> None:
    target = load(save_tiny(tmp_path / "t", layers=3, tied=tied))
    save_tiny(tmp_path / "d", layers=3, tied=tied)
    alone = run(load(tmp_path / "d"))
    if packed_before:
        run(target)
    draft = draft_of(tmp_path / "d", target)
    assert draft.shares_embedding
    assert embedding(draft.model).weight is embedding(target.model).weight
    assert torch.equal(run(draft), alone)
    if not packed_before:
        run(target)
    one_head = output_head(draft.model) is output_head(target.model)
    assert one_head is (tied or not packed_before)
    assert torch.equal(run(target), alone)


def test_draft_with_another_embedding_keeps_its_own(tmp_path: Path) -> None:
    target = load(save_tiny(tmp_path / "t", seed=1))
    save_tiny(tmp_path / "d", "qwen3", seed=2)
    draft = draft_of(tmp_path / "d", target)
    assert not draft.shares_embedding
    assert torch.equal(run(draft), run(load(tmp_path / "d")))


def test_draft_vocabulary_is_read_and_the_head_cut(tmp_path: Path) -> None:
    target = load(save_tiny(tmp_path / "t", tied=True))
    DraftVocab(IDS).write(save_tiny(tmp_path / "d", tied=True))
    draft = draft_of(tmp_path / "d", target)
    assert draft.output_ids is not None
    assert draft.output_ids.tolist() == list(IDS)
    logits = run(draft, draft.output_ids)
    torch.testing.assert_close(logits[:, list(IDS)], run(target)[:, list(IDS)], rtol=1e-4, atol=2e-5)


def test_what_does_not_fit_the_target_is_refused(tmp_path: Path) -> None:
    target = load(save_tiny(tmp_path / "t"))
    other = save_tiny(tmp_path / "vocab")
    DraftVocab((0, 64)).write(other)
    with pytest.raises(ModelError, match="64"):
        draft_of(other, target)
    tiny_tokenizer(60).save_pretrained(save_tiny(tmp_path / "tokens"))
    with pytest.raises(TokenizerMismatch):
        draft_of(tmp_path / "tokens", target)
    narrow = save_tiny(tmp_path / "shapes")
    config = (narrow / "config.json").read_text()
    assert '"intermediate_size": 64' in config
    (narrow / "config.json").write_text(config.replace('"intermediate_size": 64', '"intermediate_size": 48'))
    with pytest.raises(ModelError, match="shapes"):
        draft_of(narrow, target)
