"""A draft from the registry is an ordinary checkpoint: plain transformers takes it as its assistant model."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from redraft.models.demo_draft import demo_draft_directory
from redraft.models.loader import weights_fingerprint
from redraft.models.source import resolve_source
from redraft.models.tokenizer import load_tokenizer
from redraft.registry.contents import describe_directory
from redraft.registry.manifest import DraftManifest
from redraft.registry.store import DraftRegistry
from tests.demo_models import DEMO, DemoModels
from tests.fixtures_prompts import demo_prompts

pytestmark = pytest.mark.model

NEW_TOKENS, NUM_DRAFTED = 40, 4


def test_a_published_draft_assists_plain_transformers(
    tmp_path: Path, reference: PreTrainedModel, demo_models: DemoModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same text as without it, in fewer runs of the target than there are tokens."""
    directory, _, _ = demo_draft_directory()
    manifest = DraftManifest(
        version="v1",
        created_unix_s=time.time(),
        files=describe_directory(directory),
        target_name="demo",
        target_fingerprint=weights_fingerprint(resolve_source(DEMO, cache_dir=None).directory),
        tokenizer_fingerprint=load_tokenizer(DEMO).fingerprint,
        num_parameters=1,
    )
    registry = DraftRegistry(str(tmp_path / "registry"))
    registry.publish(directory, manifest)

    assistant = AutoModelForCausalLM.from_pretrained(tmp_path / "registry" / "drafts" / "v1", dtype=torch.float32)
    assistant.generation_config.num_assistant_tokens = NUM_DRAFTED
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    runs = 0
    forward = reference.forward

    def counted(*arguments: object, **named: object) -> object:
        nonlocal runs
        runs += 1
        return forward(*arguments, **named)

    monkeypatch.setattr(reference, "forward", counted)
    for text in demo_prompts(2):
        ids = torch.tensor([demo_models.chat_prompt(text)])
        options = {
            "attention_mask": torch.ones_like(ids),
            "do_sample": False,
            "max_new_tokens": NEW_TOKENS,
            "pad_token_id": 2,
        }
        plain = reference.generate(ids, **options)
        runs = 0
        assisted = reference.generate(ids, assistant_model=assistant, **options)
        assert torch.equal(plain, assisted)
        assert runs < 0.8 * (plain.shape[1] - ids.shape[1])
