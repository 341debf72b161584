"""The demo model, its drafts and one server process, each made once for the whole session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from redraft.models.loader import load_model
from redraft_training.student.prune import init_draft
from scripts.server_process import ServerProcess
from tests.demo_models import DEMO, DRAFT_LAYERS, DemoModels

BUILT_DRAFT = Path("build/demo-draft")  # `make model` makes it


@pytest.fixture(scope="session")
def draft_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draft A of the demo target."""
    if (BUILT_DRAFT / "model.safetensors").is_file():
        return BUILT_DRAFT.resolve()
    directory = tmp_path_factory.mktemp("drafts") / "A"
    init_draft(DEMO, directory, layers=DRAFT_LAYERS["A"])
    return directory


@pytest.fixture(scope="session")
def reference() -> PreTrainedModel:
    """transformers' own demo target, float32."""
    return load_model(DEMO).model


@pytest.fixture(scope="session")
def demo_models(draft_dir: Path, reference: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> DemoModels:
    other = tmp_path_factory.mktemp("drafts") / "B"
    init_draft(DEMO, other, layers=DRAFT_LAYERS["B"])
    return DemoModels.load(reference, {"A": draft_dir, "B": other})


@pytest.fixture(scope="session")
def server_flags(draft_dir: Path) -> list[str]:
    """A server of the demo target with n-gram lookup before the draft."""
    return [
        *("--model.target", "demo", "--model.draft", str(draft_dir)),
        *("--speculation.proposer", "ngram+draft_model", "--engine.kv_cache_tokens", "4096"),
    ]


@pytest.fixture(scope="session")
def server(server_flags: list[str]) -> Iterator[ServerProcess]:
    with ServerProcess(server_flags) as process:
        yield process
