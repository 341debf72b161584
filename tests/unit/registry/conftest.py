from __future__ import annotations

import itertools
import secrets
from pathlib import Path

import pytest

from redraft import object_store
from redraft.registry.store import DraftRegistry
from tests.unit.registry.fakes import Drafts


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "FIRST_WAIT_S", 0.0)


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "registry") if request.param == "local" else f"memory://registry-{secrets.token_hex(8)}"


@pytest.fixture
def memory_url() -> str:
    return f"memory://registry-{secrets.token_hex(8)}"


@pytest.fixture
def registry(url: str) -> DraftRegistry:
    ticks = itertools.count(1_000_000)
    return DraftRegistry(url, clock=lambda: float(next(ticks)))


@pytest.fixture
def drafts(registry: DraftRegistry, tmp_path: Path) -> Drafts:
    return Drafts(registry, tmp_path / "made")
