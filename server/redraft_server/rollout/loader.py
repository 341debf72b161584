"""From a version in the registry to a draft that is ready to serve, beside an engine at work."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Protocol

from redraft.models.ref import ModelKind, ModelRef
from redraft.registry.errors import DraftWithdrawn
from redraft.registry.manifest import DraftState, check_target
from redraft.registry.store import DraftRegistry
from redraft_server.engine.drafts import DraftHost, ResidentDraft, RunPass


class DraftSource(Protocol):
    """Where the rollout gets drafts from."""

    def load(self, version: str, run: RunPass) -> ResidentDraft: ...


class DraftLoader:
    """Fetches, checks and loads, all on the calling thread.

    Args:
        registry: where the drafts are.
        host: loads a checkpoint for the engine, whose target the drafts must have been made for.
        cache: fetched files are kept here while they are read, not longer.
    """

    def __init__(self, registry: DraftRegistry, host: DraftHost, cache: Path) -> None:
        self._registry = registry
        self._host = host
        self._cache = cache

    def load(self, version: str, run: RunPass = lambda timed_pass: timed_pass()) -> ResidentDraft:
        """The draft, every file's hash verified, made for this target, warmed up by passes given to `run`.

        Raises `RegistryError` if it cannot be had, is not what its manifest says, is for another target or was
        withdrawn; `ModelError` if it cannot be used.
        """
        entry = self._registry.get(version)
        if entry.state is not DraftState.PUBLISHED:
            raise DraftWithdrawn(f"draft {version} is {entry.state.replace('_', ' ')}: {entry.reason}")
        check_target(entry.manifest, self._host.target_fingerprint, self._host.tokenizer_fingerprint)
        self._cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="draft-", dir=self._cache))
        try:
            directory = self._registry.fetch(version, scratch / version)
            ref = ModelRef(ModelKind.DIRECTORY, str(directory))
            return self._host.load(ref, entry.manifest, run=run, progress=_quiet)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _quiet(line: str) -> None:
    """Nobody watches a server's terminal for the loading of a draft; the log has it."""
